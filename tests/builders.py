"""Small models, batches and metrics that several test files share. Everything is seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpg_cli.engine import Examples
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.tiny import world

VOCAB = 29


class ExactRMSNorm(nn.Module):
    """RMSNorm in the precision of its input; the one in transformers rounds to float32, which finite differences see."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


def exact_norms(model: nn.Module) -> nn.Module:
    """The model, with norms that do not round to float32."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm"):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ExactRMSNorm(module.weight, module.variance_epsilon))
    return model


def make_target(architecture: str, *, tied: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A two-layer GPT-2 or Llama causal LM with 29 tokens and 16 hidden dimensions."""
    torch.manual_seed(seed)
    if architecture == "gpt2":
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB,
                n_positions=32,
                n_embd=16,
                n_layer=2,
                n_head=2,
                resid_pdrop=0.1,
                embd_pdrop=0.1,
                attn_pdrop=0.1,
                tie_word_embeddings=tied,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied,
                bos_token_id=0, eos_token_id=0,
            )
        )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():  # larger than the usual init, so that every nonlinearity is felt
            parameter.add_(0.2 * torch.randn_like(parameter))
    return exact_norms(model.to(dtype)).eval()


def make_examples(n: int, *, shortest: int = 2, longest: int = 9, seed: int = 0) -> Examples:
    """n ragged sequences of `shortest` … `longest` tokens, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator).tolist()
    return Examples.from_sequences(
        [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths], pad_id=VOCAB - 1
    )


def make_uneven(n: int = 15, *, longest: int = 20, seed: int = 1) -> Examples:
    """n sequences, mostly short, one as long as any: what packing is for."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [longest, *torch.randint(1, 9, (n - 1,), generator=rng).tolist()]
    return Examples.from_sequences(
        [torch.randint(0, VOCAB, (length,), generator=rng).tolist() for length in lengths], pad_id=VOCAB - 1
    )


def make_adapted(architecture: str, lora: Lora, *, moved: bool = True) -> nn.Module:
    """A small target with adapters beside its frozen base; `moved`: B is not zero, so that every path is felt."""
    model = adapt(make_target(architecture, tied=False), lora, 1).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if moved and "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return model


@dataclass
class HeldOutLoss:
    """Minus the mean token loss on one batch."""

    examples: Examples

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        ids = self.examples.ids_N_S
        logits = functional_call(model, dict(parameters), args=(), kwargs={"input_ids": ids, "use_cache": False}).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        mask = self.examples.label_N_S[:, 1:].to(losses.dtype)
        return -(losses * mask).sum() / mask.sum()

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"loss": -float(self(parameters, model))}


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'user' %}Today: {{ date_string }}\n{% endif %}"
    "{{ message['content'] }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_level(
    model: BPE, specials: list[str], *, bos: str | None, eos: str, chat: str = ""
) -> PreTrainedTokenizerFast:
    """A byte-level tokeniser around a BPE model; it adds no special tokens by itself."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    if chat:
        fast.chat_template = chat
    return fast


def byte_bpe(merges: list[tuple[str, str]], specials: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokeniser with all bytes and these merges, spelt in the byte-level alphabet."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    model = BPE(vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges=merges)
    return byte_level(model, specials, **options)


def trained_bpe(texts: list[str], size: int, specials: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokeniser trained on texts."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainer)
    return byte_level(tokenizer.model, specials, **options)


def save_instruct_llama(folder: Path) -> None:
    """A small Llama with its own tokeniser, a chat template, and an end of turn that its tokeniser does not call its end."""
    texts = world.sentences("train", "en", 300, seed=0) + world.sentences("train", "es", 300, seed=0)
    tokenizer = trained_bpe(
        texts, 380, ["<|begin|>", "<|end|>", "<|start|>", "<|eot|>"], bos="<|begin|>", eos="<|end|>", chat=CHAT_TEMPLATE
    )
    begin, end, eot = tokenizer.convert_tokens_to_ids(["<|begin|>", "<|end|>", "<|eot|>"])
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=begin,
            eos_token_id=end,
        )
    )  # fmt: skip
    model.generation_config.eos_token_id = [end, eot]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_gpt2(folder: Path) -> None:
    """A small GPT-2 with another tokeniser, whose end of sequence is also its beginning; no chat template."""
    texts = world.sentences("train", "en", 300, seed=1)
    tokenizer = trained_bpe(texts, 300, ["<|endoftext|>"], bos="<|endoftext|>", eos="<|endoftext|>")
    end = tokenizer.eos_token_id
    torch.manual_seed(2)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=160, n_embd=32, n_layer=2, n_head=2, bos_token_id=end, eos_token_id=end
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
