"""No decoder, no head, another tokeniser: what is no causal LM of text is refused, by its files and by what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CPU,
    add_tokenizer,
    bert_config,
    llama_config,
    loaded,
    make,
    reconfigured,
    reweighted,
    saved,
)
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)
from zoo.tiny import tiny_model

from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_step
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.records import Credit
from dpg_cli.models.folder import ModelError
from dpg_cli.models.sound import require_causal

SMALL = {"d_model": 16, "num_heads": 2, "d_kv": 8, "d_ff": 16, "num_layers": 1}


def gpt2(tied: bool) -> GPT2Config:
    return GPT2Config(vocab_size=512, n_positions=64, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied)


def bart() -> BartConfig:
    return BartConfig(
        vocab_size=512, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip


NO_DECODERS = {
    "classifier, tied": (lambda: LlamaForSequenceClassification(llama_config(True)), "LlamaForSequenceClassification"),
    "classifier, untied": (lambda: LlamaForSequenceClassification(llama_config()), "LlamaForSequenceClassification"),
    "classifier, GPT-2": (lambda: GPT2ForSequenceClassification(gpt2(True)), "GPT2ForSequenceClassification"),
    "tagger": (lambda: GPT2ForTokenClassification(gpt2(False)), "GPT2ForTokenClassification"),
    "BERT": (lambda: BertForMaskedLM(bert_config(False)), "BertForMaskedLM"),
    "BERT, untied": (lambda: BertForMaskedLM(bert_config(False, tied=False)), "BertForMaskedLM"),
    "BERT with a LM head that looks both ways": (lambda: BertLMHeadModel(bert_config(False)), "is no causal LM"),
    "BERT's encoder": (lambda: BertModel(bert_config(True, tied=False)), "do not fit"),
    "T5": (lambda: T5ForConditionalGeneration(T5Config(vocab_size=512, **SMALL)), "encoder with a decoder"),
    "BART": (lambda: BartForConditionalGeneration(bart()), "encoder with a decoder"),
    "a backbone, untied": (lambda: LlamaModel(llama_config()), "lm_head.weight is missing"),
    "pictures": (
        lambda: ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)),
        "is no causal LM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_DECODERS)
def test_no_decoder_or_no_head(name: str, tmp_path: Path) -> None:
    build, words = NO_DECODERS[name]
    folder = saved(build(), tmp_path / "model")
    for options in ({}, {"init": "random"}):
        if options and words in ("do not fit", "lm_head.weight is missing"):
            continue  # a blank model of such a configuration has its head
        with pytest.raises(ModelError, match=words) as caught:
            loaded(folder, **options)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.remedy


@pytest.mark.parametrize(
    "build",
    [
        lambda: LlamaModel(llama_config(True)),  # tied: the embedding is the head
        lambda: BartForCausalLM(bart()),  # a decoder on its own
        lambda: make("bert"),
        lambda: make("gpt2"),
    ],
)
def test_decoders_with_all_their_weights_are_taken(build: Any, tmp_path: Path) -> None:
    model = build()
    head = model.get_output_embeddings() or model.get_input_embeddings()
    assert torch.equal(loaded(saved(model, tmp_path / "model")).head, head.weight)


def test_a_decoder_that_looks_ahead_is_known_by_what_it_does(tmp_path: Path) -> None:
    """The class is a causal LM's; a mask that was taken away shows in the logits."""
    model = make("llama").eval()
    require_causal("good", model, 128)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(
        **inputs | {"attention_mask": torch.zeros(len(inputs["input_ids"]), 1, *[inputs["input_ids"].shape[1]] * 2)}
    )
    with pytest.raises(ModelError, match="depends on the tokens after it"):
        require_causal("ahead", model, 128)


def test_a_look_ahead_near_the_beginning_is_known_too() -> None:
    """ProphetNet's logits at the first places depend on the few after them, and on none of a row's second half."""
    model = tiny_model("prophetnet").float()
    with pytest.raises(ModelError, match="depends on the tokens after it"):
        require_causal("ahead", model, 128)


@pytest.mark.parametrize("rows", [500, 16, 511])
def test_a_tokeniser_larger_than_the_embedding(rows: int, tmp_path: Path) -> None:
    folder = saved(make("llama", rows=rows), tmp_path / "model")
    with pytest.raises(ModelError, match=rf"{512 - rows} tokens beyond the {rows} rows .* first with id {rows}\."):
        loaded(folder)
    added = saved(make("llama"), tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(added)
    tokenizer.add_special_tokens({"pad_token": "<|another pad|>"})
    tokenizer.save_pretrained(added)
    with pytest.raises(ModelError, match="1 tokens beyond the 512 rows"):
        loaded(added)


def test_a_folder_without_a_tokeniser(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match=r"no tokeniser.*save_pretrained"):
        loaded(tmp_path / "none")
    folder = saved(make("llama"), tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(folder)
    add_tokenizer(folder)
    reconfigured(folder, "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        loaded(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_is_never_drawn(tied: bool, tmp_path: Path) -> None:
    """Rows beyond the tokeniser, and holes in it, have no text. They get nothing of π, at first and after a policy step, and
    the policy is the distribution that was drawn from."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(tied, rows=640))
    with torch.no_grad():
        model.lm_head.weight[512:] *= 40  # a stock draw takes them nearly always
    found = loaded(saved(model, tmp_path / "model"))
    assert found.silent_ids == tuple(range(512, 640))
    spec = {"eos_id": found.eos_id, "pad_id": found.pad_id}
    prompts = ["the old cat", "a red boat"]

    def draw(**more: Any) -> Any:
        rng = torch.Generator().manual_seed(1)
        return sample(found.model, found.tokenizer, prompts, Sampling(16, 12, 12, 1.0, **spec, **more), rng)

    assert float((draw().ids_N_K >= 512).double().mean()) > 0.3
    for portable in (False, True):
        rollout = draw(silent_ids=found.silent_ids, portable=portable)
        assert int(rollout.ids_N_K.max()) < 512
        texts = [found.tokenizer.decode(row) for row in rollout.ids_N_K]
        assert all(texts)
    policy = PolicySpec(silent_ids=found.silent_ids, kl=0.1, minibatch=32)
    log_pi = policy.log_pi(completion_logits(found.model, rollout)).detach()
    assert float(log_pi[..., 512:].exp().max()) == 0.0
    drawn = log_pi.gather(-1, rollout.ids_N_K[..., None])[..., 0]
    assert float((drawn - rollout.logprobs_N_K).abs()[:, -1].max()) < 1e-5  # 12th token: the end can be drawn too
    optimizer = torch.optim.SGD(found.model.parameters(), lr=0.1)
    credit = Credit(torch.randn_like(rollout.logprobs_N_K), torch.randn(32, 12, 640), {})
    reference = loaded(tmp_path / "model").model
    stats = policy_step(found.model, optimizer, rollout, credit, policy, torch.Generator().manual_seed(0), reference)
    assert all(value == value for value in stats.values())
    assert abs(stats["kl"]) < 1e-6
    assert stats["clipped"] == 0.0
    if not tied:
        assert torch.equal(found.head[512:], model.lm_head.weight[512:])


def test_holes_in_a_vocabulary(tmp_path: Path) -> None:
    """Ids that a tokeniser skips are silent too."""
    folder = saved(make("llama", rows=520), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|far|>"])
    tokenizer.save_pretrained(folder)
    found = loaded(folder)
    assert found.tokenizer.convert_tokens_to_ids("<|far|>") == 512
    assert found.silent_ids == tuple(range(513, 520))


def test_a_gpt2_of_the_hubs_first_form_loads(tmp_path: Path) -> None:
    """Without `transformer.` and with buffers that no class has any more: both are the architecture's own, and known."""
    model = make("gpt2", tied=True)
    folder = saved(model, tmp_path / "model")

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        mask = {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.uint8) for layer in range(2)}
        return plain | mask

    found = loaded(reweighted(folder, old))
    assert torch.equal(found.head, model.lm_head.weight)
    assert found.head.device == CPU
