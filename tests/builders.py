"""Small models, batches and metrics that several test files share. Everything is seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dpg_cli.engine import Examples

VOCAB = 29


class ExactRMSNorm(nn.Module):
    """RMSNorm in the precision of its input; the one in transformers rounds to float32, which finite differences see."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


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
    model = model.to(dtype)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], ExactRMSNorm(module.weight, module.variance_epsilon))
    return model.eval()


def make_examples(n: int, *, longest: int = 9, seed: int = 0) -> Examples:
    """n ragged sequences of 2 … `longest` tokens, right-padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (n,), generator=generator).tolist()
    return Examples.from_sequences(
        [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths], pad_id=VOCAB - 1
    )


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
