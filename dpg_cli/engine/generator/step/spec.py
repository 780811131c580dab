"""The settings of the policy step by an optimiser, and the distribution that completions are drawn from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NOTHING = -1e9  # a logit of probability 0, finite so that differences of log-probabilities are
Compute = Literal["float32", "bf16"]


def computing(device: str, precision: Compute) -> AbstractContextManager[object]:
    """A context within which a generator's passes compute in this precision; in float32 they compute as its weights are."""
    return torch.autocast(device, torch.bfloat16) if precision == "bf16" else nullcontext()


@dataclass(frozen=True)
class PolicySpec:
    """Settings of the policy step.

    Attributes:
        temperature: of sampling; π is the tempered distribution.
        clip: c, the ratio's clipping range.
        kl: β, coefficient of the KL to the starting generator.
        epochs: passes over the rollout.
        minibatch: completions an optimiser step.
        micro_batch: completions in memory at once; 0 for the whole mini-batch. Changes nothing beyond rounding.
        micro_batch_tokens: tokens in memory at once, padding included, of completions sorted by length; 0 for no such limit.
            A row longer than that is alone. Changes nothing beyond rounding.
        max_grad_norm: gradient clipping, 0 for none.
        silent_ids: ids that sampling never draws; π gives them nothing either.
        share: completions of a group may be read in one row with their prompt, where that is cheaper (`rows.py`); for models that
            `sharing.py` has found to read them so. Mini-batches are then of whole groups.
        precision: "bf16": forward and backward passes compute in bf16, parameters and their gradients stay as they are.
    """

    temperature: float = 1.0
    clip: float = 0.2
    kl: float = 0.0
    epochs: int = 1
    minibatch: int = 256
    micro_batch: int = 0
    micro_batch_tokens: int = 0
    max_grad_norm: float = 1.0
    silent_ids: tuple[int, ...] = ()
    share: bool = False
    precision: Compute = "float32"

    def log_pi(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the distribution that completions are drawn from, from the generator's logits (..., V)."""
        logits = logits / self.temperature
        if self.silent_ids:
            silent = torch.tensor(self.silent_ids, dtype=torch.int64, device=logits.device)
            logits.index_fill_(-1, silent, NOTHING)  # of the quotient, not of what was given
        return torch.log_softmax(logits, -1)
