"""How well a model reads held-out prose, and what it writes. The card's figures come from here, and a test repeats them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.prose.shapes import NEW_TOKENS, POSITIONS

_ROWS = 32  # texts a forward pass


@dataclass(frozen=True)
class Reading:
    """Mean losses over held-out passages, in nats a token.

    Attributes:
        nats: over the whole passages, cut at the model's context.
        opening: over the first `NEW_TOKENS` tokens of each, what a completion without a prompt is as long as.
        tokens: tokens behind `nats`.
    """

    nats: float
    opening: float
    tokens: int


@torch.no_grad()
def read(model: PreTrainedModel, tokenizer: Any, texts: Sequence[str]) -> Reading:
    """Measure a model on texts, each after a beginning-of-sequence token.

    Args:
        model: a causal language model, on the CPU.
        tokenizer: its tokeniser.
        texts: what it reads.
    """
    rows = [[tokenizer.bos_token_id, *ids][:POSITIONS] for ids in tokenizer(list(texts))["input_ids"]]
    losses = [loss for start in range(0, len(rows), _ROWS) for loss in token_losses(model, rows[start : start + _ROWS])]
    whole, opening = torch.cat(losses), torch.cat([loss[:NEW_TOKENS] for loss in losses])
    return Reading(whole.mean().item(), opening.mean().item(), len(whole))


@torch.no_grad()
def token_losses(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The loss of every token of each row but its first, in nats.

    Args:
        model: a causal language model, on the CPU.
        rows: token ids, each row at least two long.

    Returns:
        One float32 vector a row, one shorter than it.
    """
    length = max(map(len, rows))
    # filled up on the right, where a causal model does not look
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [loss[: len(row) - 1] for loss, row in zip(losses, rows, strict=True)]


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: Any, prompts: Sequence[str], seed: int) -> list[list[int]]:
    """A completion of at most `NEW_TOKENS` tokens for each prompt, at temperature 1.

    Args:
        model: a causal language model, on the CPU.
        tokenizer: its tokeniser.
        prompts: what to complete; an empty one asks for the beginning of a text.
        seed: of the sampling.

    Returns:
        Token ids of each completion, up to and with end-of-text.
    """
    end = tokenizer.eos_token_id
    encoded = tokenizer(
        [tokenizer.bos_token + text for text in prompts], padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
        )
    rows = out[:, encoded["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
