"""Frozen records that pass between the stages of an outer step.

Axes: P prompts, G completions a prompt (a group), N = P·G examples, K completion tokens, S target tokens,
V vocabulary, T inner steps, B examples an inner batch. Rows n·G … n·G + G - 1 of an N axis are one group.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dpg_cli.engine.soft import SoftLabels


@dataclass(frozen=True)
class Examples:
    """Token sequences for the target, right-padded.

    Attributes:
        ids_N_S: token ids, int64; anything where padded.
        attention_N_S: True on real tokens, bool.
        label_N_S: True on tokens whose loss is trained, bool. Column 0 has no prediction and must be False.
        soft: distributions that the trained tokens were drawn from, or None.
        drawn: train on the drawn tokens all the same; `soft` then only tells what else could have stood there.
    """

    ids_N_S: Tensor
    attention_N_S: Tensor
    label_N_S: Tensor
    soft: SoftLabels | None = None
    drawn: bool = False

    def __post_init__(self) -> None:
        if not self.ids_N_S.shape == self.attention_N_S.shape == self.label_N_S.shape or self.ids_N_S.ndim != 2:
            raise ValueError(
                "ids, attention and labels must share one (N, S) shape; got "
                f"{tuple(self.ids_N_S.shape)}, {tuple(self.attention_N_S.shape)}, {tuple(self.label_N_S.shape)}"
            )
        if bool(self.label_N_S[:, :1].any()):
            raise ValueError(
                "the first token of a sequence has nothing before it that could predict it: label_N_S[:, 0] must be False"
            )

    def __len__(self) -> int:
        return self.ids_N_S.shape[0]

    def rows(self, start: int, stop: int) -> Examples:
        """Rows start … stop - 1, cut to their longest sequence."""
        attention = self.attention_N_S[start:stop]
        longest = max(1, int(attention.any(0).nonzero().max()) + 1) if attention.any() else 1
        return Examples(
            self.ids_N_S[start:stop, :longest],
            attention[:, :longest],
            self.label_N_S[start:stop, :longest],
            None if self.soft is None else self.soft.rows(start, stop, longest),
            self.drawn,
        )

    def take(self, index_N: Tensor) -> Examples:
        """The rows of an index, at the width of all of them."""
        index = index_N.to(self.ids_N_S.device)
        soft = None if self.soft is None else self.soft.take(index)
        return Examples(self.ids_N_S[index], self.attention_N_S[index], self.label_N_S[index], soft, self.drawn)

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on another device."""
        soft = None if self.soft is None else self.soft.to(device)
        return Examples(
            self.ids_N_S.to(device), self.attention_N_S.to(device), self.label_N_S.to(device), soft, self.drawn
        )

    @classmethod
    def from_sequences(cls, sequences: list[list[int]], *, pad_id: int = 0, prefix: int = 1) -> Examples:
        """Pad lists of token ids into one batch.

        Args:
            sequences: N lists of token ids, each with at least one token.
            pad_id: id that fills the padding.
            prefix: number of leading tokens that are context only (1: every token but the first is trained).

        Returns:
            The batch, on the CPU.
        """
        length = max(len(sequence) for sequence in sequences)
        ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
        attention = torch.zeros(len(sequences), length, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
            attention[row, : len(sequence)] = True
        label = attention.clone()
        label[:, : max(prefix, 1)] = False
        return cls(ids, attention, label)


@dataclass(frozen=True)
class Rollout:
    """Completions sampled from the generator.

    Attributes:
        prompts: the P·G prompt texts, one a row.
        prompt_ids_N_Q: prompt token ids, left-padded, int64.
        prompt_mask_N_Q: True on real prompt tokens.
        ids_N_K: completion token ids, right-padded; the end-of-sequence token is the last real one of a finished row.
        mask_N_K: True on real completion tokens.
        logprobs_N_K: log π(token | prefix) under the sampling distribution, float; 0 where padded.
        group_size: G.
        entropy: mean entropy of the sampling distribution over real tokens, nats.
    """

    prompts: list[str]
    prompt_ids_N_Q: Tensor
    prompt_mask_N_Q: Tensor
    ids_N_K: Tensor
    mask_N_K: Tensor
    logprobs_N_K: Tensor
    group_size: int
    entropy: float

    def __len__(self) -> int:
        return self.ids_N_K.shape[0]

    @property
    def same_completions(self) -> float:
        """Share of groups whose completions are all the same; 0 where a group is one completion."""
        if self.group_size == 1:
            return 0.0
        ids = self.ids_N_K.masked_fill(~self.mask_N_K, -1).unflatten(0, (-1, self.group_size))
        return float((ids == ids[:, :1]).flatten(1).all(1).double().mean())

    def rows(self, index: Tensor) -> Rollout:
        """The rows of a 1-D index or boolean mask (grouping may be lost)."""
        numbers = torch.arange(len(self), device=self.ids_N_K.device)[index].tolist()
        return replace(
            self,
            prompts=[self.prompts[n] for n in numbers],
            prompt_ids_N_Q=self.prompt_ids_N_Q[index],
            prompt_mask_N_Q=self.prompt_mask_N_Q[index],
            ids_N_K=self.ids_N_K[index],
            mask_N_K=self.mask_N_K[index],
            logprobs_N_K=self.logprobs_N_K[index],
        )


@dataclass(frozen=True)
class Metagradient:
    """What one inner run and its reverse pass give.

    Attributes:
        value: Φ(θ_T).
        measures: readable measures of θ_T, from the metric.
        example_N: τ_i = ∂Φ/∂w_i.
        token_N_S: τ_is, the derivative by the weight of each token's loss; sums to example_N.
        label_N_S_V: τ_is(y), the same for every label y that could have stood at s; None unless asked for.
        final: θ_T by parameter name, detached.
        gradient_median: median |g_0| over parameters with a gradient, what ε must be compared with.
        stats: further figures of the inner run for the log.
    """

    value: float
    measures: dict[str, float]
    example_N: Tensor
    token_N_S: Tensor
    label_N_S_V: Tensor | None
    final: dict[str, Tensor]
    gradient_median: float
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Credit:
    """Rewards as they reach the generator's tokens.

    Attributes:
        advantage_N_K: advantage of each sampled token.
        label_N_K_V: reward of every token that could have been sampled (`expected` mode), else None.
        stats: reward and advantage statistics for the log.
    """

    advantage_N_K: Tensor
    label_N_K_V: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)
