"""Nats that a language model needs for completions: what the data costs a reader, against what the control costs it.

    nats a token = Σ_rows -log p(completion | context) / Σ_rows tokens          the ratio of perplexities is exp of a difference

Standard errors are over rows, by the linearised ratio; rows of data and control that share a prompt are taken in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpg_cli.models.loading import LanguageModel

LOGITS_AT_ONCE = {"cpu": 1 << 22}  # numbers; see `evidence/stock.py`
LOGITS_ELSEWHERE = 1 << 26
ROWS_AT_ONCE = 256

Progress = Callable[[int, int], None]  # rows done, of how many


@dataclass(frozen=True)
class Sampled:
    """The distribution that completions were sampled from, where it is not the model's own.

    Attributes:
        temperature: divides the logits.
        min_tokens: no token of `end_ids` before this many tokens.
        end_ids: tokens that end a completion.
        silent_ids: tokens that are never drawn.
    """

    temperature: float = 1.0
    min_tokens: int = 1
    end_ids: tuple[int, ...] = ()
    silent_ids: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether it is the model's own distribution after all."""
        return self.temperature == 1 and self.min_tokens <= 1 and not self.silent_ids


@dataclass(frozen=True)
class Cost:
    """What rows cost a model.

    Attributes:
        nats_N: -log p of each completion, float64.
        sampled_N: the same under the distribution that it was sampled from.
        tokens_N: how many tokens that were.
    """

    nats_N: np.ndarray
    sampled_N: np.ndarray
    tokens_N: np.ndarray

    @property
    def mean(self) -> float:
        """Nats a token."""
        return float(self.nats_N.sum() / max(1, self.tokens_N.sum()))

    @property
    def residual_N(self) -> np.ndarray:
        """How far each row pulls the mean, times the number of rows; it averages 0."""
        return (self.nats_N - self.mean * self.tokens_N) / max(1e-300, float(self.tokens_N.mean()))


@dataclass(frozen=True)
class Comparison:
    """Nats a token of the data beside the control's.

    Attributes:
        reader: who reads.
        data, control: nats a token.
        difference: of the two.
        error: its standard error.
    """

    reader: str
    data: float
    control: float
    difference: float
    error: float

    @property
    def ratio(self) -> float:
        """Of the perplexities."""
        return math.exp(min(self.difference, 700.0))


def compare(reader: str, data: Cost, control: Cost, paired: bool) -> Comparison:
    """Put two costs beside each other.

    Args:
        reader: whose they are.
        data, control: the costs.
        paired: row n of the data and row n of the control share a prompt.
    """
    one_N, other_M = data.residual_N, control.residual_N
    parts = [one_N - other_M] if paired else [one_N, other_M]
    error = math.sqrt(sum(float(part.var(ddof=1)) / len(part) if len(part) > 1 else math.nan for part in parts))
    return Comparison(reader, data.mean, control.mean, data.mean - control.mean, error)


@torch.no_grad()
def cost(
    reader: LanguageModel,
    contexts: Sequence[Sequence[int]],
    completions: Sequence[np.ndarray],
    sampled: Sampled | None = None,
    progress: Progress = lambda done, total: None,
) -> Cost:
    """What completions cost a model.

    Args:
        reader: the model.
        contexts: tokens before each completion, which cost nothing; where there are none, the model's
            beginning-of-sequence or else end-of-sequence token.
        completions: tokens, in the model's own tokeniser. What does not fit the model's context is not counted.
        sampled: the sampling distribution, for `sampled_N`.
        progress: called after each batch.
    """
    sampled = sampled or Sampled()
    start = reader.eos_id if reader.bos_id is None else reader.bos_id
    pairs = [
        fitted(list(context) or [start], row, reader.context)
        for context, row in zip(contexts, completions, strict=True)
    ]
    order = sorted(range(len(pairs)), key=lambda number: len(pairs[number][0]) + len(pairs[number][1]), reverse=True)
    nats_N, sampled_N = np.zeros(len(pairs)), np.zeros(len(pairs))
    done = 0
    while done < len(order):
        longest = len(pairs[order[done]][0]) + len(pairs[order[done]][1])
        numbers = LOGITS_AT_ONCE.get(reader.head.device.type, LOGITS_ELSEWHERE)
        size = max(1, min(ROWS_AT_ONCE, numbers // (longest * reader.head.shape[0])))
        rows = order[done : done + size]
        nats_N[rows], sampled_N[rows] = _batch(reader, [pairs[number] for number in rows], sampled)
        done += len(rows)
        progress(done, len(order))
    return Cost(nats_N, sampled_N, np.array([len(row) for _, row in pairs], dtype=np.int64))


def fitted(context: list[int], row: np.ndarray, limit: int | None) -> tuple[list[int], np.ndarray]:
    """Context and completion in so many tokens: the context loses its beginning, then the completion its end."""
    if limit is None or len(context) + len(row) <= limit:
        return context, row
    context = context[-max(1, limit - len(row)) :]
    return context, row[: limit - len(context)]


def _batch(
    reader: LanguageModel, pairs: Sequence[tuple[list[int], np.ndarray]], sampled: Sampled
) -> tuple[np.ndarray, np.ndarray]:
    """-log p of some completions, by the model and by the sampling distribution."""
    device, width = reader.head.device, max(len(context) + len(row) for context, row in pairs)
    ids = np.zeros((len(pairs), width), dtype=np.int64)
    place = np.full((len(pairs), width - 1), -1)  # of the predicted token in its completion; -1: it is none
    for number, (context, row) in enumerate(pairs):
        ids[number, : len(context)], ids[number, len(context) : len(context) + len(row)] = context, row
        place[number, len(context) - 1 : len(context) + len(row) - 1] = np.arange(len(row))
    tokens = torch.from_numpy(ids).to(device)
    # right-padded rows need no attention mask: a causal model never looks to the right
    logits = reader.model(input_ids=tokens, use_cache=False).logits[:, :-1]
    counted, places = torch.from_numpy(place >= 0).to(device), torch.from_numpy(place).to(device)
    flat, labels, places = logits[counted], tokens[:, 1:][counted], places[counted]
    row_of = counted.nonzero()[:, 0]

    def summed(logits: Tensor) -> np.ndarray:
        picked = logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)
        total = torch.zeros(len(pairs), dtype=torch.float64, device=device)
        return -total.index_add_(0, row_of, picked.double()).cpu().numpy()

    nats = summed(flat)
    if sampled.plain:
        return nats, nats
    flat = flat / sampled.temperature
    flat[:, list(sampled.silent_ids)] = -torch.inf
    early = (places < sampled.min_tokens - 1).nonzero()[:, 0]
    flat[early[:, None], torch.tensor(sampled.end_ids, dtype=torch.int64, device=device)[None]] = -torch.inf
    return nats, summed(flat)
