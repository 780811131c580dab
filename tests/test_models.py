"""Loading models: untying keeps the head, blank models are equal under a seed, bad names give one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import make, saved
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
)

from dpg_cli.engine.generator.policy import completion_logits
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel, load, pick_device, same_tokenizer, untie_head

CPU = torch.device("cpu")


def test_untying_keeps_the_heads_values() -> None:
    model = load("tiny", device=CPU).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, size = model.get_output_embeddings().weight.detach().clone(), ParameterSpace(model).size
    untie_head(model)
    head = model.get_output_embeddings().weight
    assert head is not model.get_input_embeddings().weight
    assert torch.equal(head, before)
    assert ParameterSpace(model).size == size + before.numel()
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, load("tiny", device=CPU).model(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_checkpoints_load(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = make(architecture, tied)
    loaded = load(str(saved(model, tmp_path / "model")), device=CPU)
    assert (loaded.head is loaded.model.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.head, model.get_output_embeddings().weight)
    untie_head(loaded.model)
    assert torch.equal(loaded.head, model.get_output_embeddings().weight)
    again = load(str(saved(loaded.model, tmp_path / "again")), device=CPU)
    assert again.head is not again.model.get_input_embeddings().weight
    assert same_tokenizer(again, loaded)


def test_blank_models_are_equal_under_a_seed_and_leave_the_rng_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (load("tiny", device=CPU, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.head, second.head)
    assert not torch.equal(first.head, other.head)
    assert not torch.equal(first.head, load("tiny", device=CPU).head)


def test_bad_models_give_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), str(broken), "nobody/no-such-model"):
        with pytest.raises(UsageError, match=r"no model folder|cannot be loaded|no weights") as caught:
            load(name, device=CPU)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.remedy


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    for name in ("cuda:99", "quantum", "banana", "cpu:x", ""):
        with pytest.raises(UsageError, match="cannot be used") as caught:
            pick_device(name)
        assert len(str(caught.value)) < 160


def test_contexts_of_architectures() -> None:
    """GPT-2 calls its limit n_positions; a sliding window is no limit; ALiBi models have none."""
    tokenizer = load("tiny", device=CPU).tokenizer
    sizes = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model, limit in (
        (GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=77, n_embd=16, n_layer=1, n_head=2)), 77),
        (
            MistralForCausalLM(
                MistralConfig(
                    **sizes, intermediate_size=16, num_key_value_heads=1, sliding_window=6, max_position_embeddings=90
                )
            ),
            90,
        ),
        (BloomForCausalLM(BloomConfig(vocab_size=512, hidden_size=16, n_layer=1, n_head=2)), None),
    ):
        assert LanguageModel(model, tokenizer, "x", 510, 511, (510,)).context == limit


def test_rollouts_go_beyond_a_sliding_window() -> None:
    """Left-padded prompts and completions longer than the window: log-probabilities are those of one full pass."""
    torch.manual_seed(0)
    tokenizer = load("tiny", device=CPU).tokenizer
    config = MistralConfig(
        vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=6, max_position_embeddings=90,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    prompts = ["the old cat paints a red boat and sings", "x"]
    rng = torch.Generator().manual_seed(0)
    rollout = sample(model, tokenizer, prompts, Sampling(2, 20, 20, 1.0, 510, 511), rng)
    assert rollout.prompt_ids_N_Q.shape[1] > 7
    full = torch.log_softmax(completion_logits(model, rollout).detach(), -1)
    full = full.gather(-1, rollout.ids_N_K[..., None])[..., 0]
    assert float((full[:, 19] - rollout.logprobs_N_K[:, 19]).abs().max()) < 1e-4
    model.config.sliding_window = 60
    wide = torch.log_softmax(completion_logits(model, rollout).detach(), -1)
    assert float((wide.gather(-1, rollout.ids_N_K[..., None])[..., 0] - full).abs().max()) > 1e-3
