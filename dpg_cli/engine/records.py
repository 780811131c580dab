"""Frozen records that pass between the stages of an outer step.

Axes: P prompts, G completions a prompt (a group), N = P·G examples, K completion tokens, S target tokens,
V vocabulary, T inner steps, B examples an inner batch. Rows n·G … n·G + G - 1 of an N axis are one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine import batches
from dpg_cli.engine.soft import LabelFactors, SoftLabels
from dpg_cli.errors import BadTypeError, BadValueError


@dataclass(frozen=True)
class Layout:
    """Where each token of rows that hold several examples comes from; anything on padding. All (N, S), int64.

    Attributes:
        owner_N_S: the example; of a prefix that several share, the first one.
        column_N_S: its column there, which is its position.
        before_N_S: the place in the row of the token before it in its example; None where that is the place before its own.
        until_N_S: the first later place in the row that does not see it, where prefixes are shared: place i sees place j if
            j <= i < until_j. None where they are not, and examples begin where positions begin anew.
    """

    owner_N_S: Tensor
    column_N_S: Tensor
    before_N_S: Tensor | None = None
    until_N_S: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """The same change of all."""
        both = (None if part is None else change(part) for part in (self.before_N_S, self.until_N_S))
        return Layout(change(self.owner_N_S), change(self.column_N_S), *both)


@dataclass(frozen=True)
class Examples:
    """Token sequences for the target; each row's tokens stand together, padded on the right, or on the left.

    Padding on the left is only another way to write the same rows: the run sees them padded on the right, and credits come
    back in the places given. `batches.py` makes examples from messages, data sets and what a collator gives.

    Attributes:
        ids_N_S: token ids, integers; anything where padded.
        attention_N_S: True on real tokens, bool.
        label_N_S: True on tokens whose loss is trained, bool. The first token of a row has no prediction and must be False.
        soft: distributions that the trained tokens were drawn from, or None.
        drawn: train on the drawn tokens all the same; `soft` then only tells what else could have stood there.
        layout: where the tokens of rows that hold several examples come from, or None.

    Raises:
        BadValueError: if shapes differ, a row has a hole, or a label stands where no prediction is.
    """

    ids_N_S: Tensor
    attention_N_S: Tensor
    label_N_S: Tensor
    soft: SoftLabels | None = None
    drawn: bool = False
    layout: Layout | None = None

    def __post_init__(self) -> None:
        ids, attention, label = self.ids_N_S, self.attention_N_S, self.label_N_S
        if not ids.shape == attention.shape == label.shape or ids.ndim != 2:
            raise BadValueError(
                "ids, attention and labels must share one (N, S) shape; got "
                f"{tuple(ids.shape)}, {tuple(attention.shape)}, {tuple(label.shape)}."
            )
        if ids.is_floating_point() or ids.dtype == torch.bool or not attention.dtype == label.dtype == torch.bool:
            raise BadTypeError(
                f"Token ids must be integers, attention and labels bool; got {ids.dtype}, {attention.dtype}, {label.dtype}."
            )
        if bool((label & ~attention).any()):
            raise BadValueError(
                f"{self._row(label & ~attention)} has a label on padding.", "Let labels be real tokens."
            )
        starts = attention & ~nn.functional.pad(attention, (1, 0))[:, :-1]
        if bool((starts.sum(1) > 1).any()):
            row = int((starts.sum(1) > 1).nonzero()[0])
            raise BadValueError(
                f"Row {row} has padding between its tokens: no causal run reads it so.",
                "Leave the padding out, or give its parts as rows of their own.",
            )
        if bool((label & starts).any()):
            raise BadValueError(
                f"{self._row(label & starts)} has a label on its first token, which has nothing before it that could "
                "predict it: label_N_S must be False there."
            )

    @staticmethod
    def _row(marks: Tensor) -> str:
        return f"Row {int(marks.any(1).nonzero()[0])}"

    def __len__(self) -> int:
        return self.ids_N_S.shape[0]

    def __repr__(self) -> str:
        rows, width = self.ids_N_S.shape
        real, trained = int(self.attention_N_S.sum()), int(self.label_N_S.sum())
        return f"Examples({rows} rows of up to {width} tokens; {real} real, {trained} trained; {self.ids_N_S.device})"

    def _of(self, change: Callable[[Tensor], Tensor], soft: SoftLabels | None) -> Examples:
        """The same change of all three tensors; what was right stays so, and is not looked at again."""
        made = object.__new__(Examples)
        object.__setattr__(made, "soft", soft)
        object.__setattr__(made, "drawn", self.drawn)
        object.__setattr__(made, "layout", None if self.layout is None else self.layout.map(change))
        for name in ("ids_N_S", "attention_N_S", "label_N_S"):
            object.__setattr__(made, name, change(getattr(self, name)))
        return made

    def rows(self, start: int, stop: int) -> Examples:
        """Rows start … stop - 1, cut to their longest sequence; of examples padded on the right."""
        attention = self.attention_N_S[start:stop]
        counted = torch.arange(1, attention.shape[1] + 1, device=attention.device)
        longest = max(1, int((attention.any(0) * counted).max())) if attention.shape[1] else 1
        soft = None if self.soft is None else self.soft.rows(start, stop, longest)
        return self._of(lambda part: part[start:stop, :longest], soft)

    def take(self, index_N: Tensor) -> Examples:
        """The rows of an index, at the width of all of them."""
        index = index_N.to(self.ids_N_S.device)
        soft = None if self.soft is None else self.soft.take(index)
        return self._of(lambda part: part[index], soft)

    def at(self, rows: slice | Tensor) -> Examples:
        """The rows of a slice or an index list (int64, on any device), cut to their longest sequence."""
        return self.rows(rows.start, rows.stop) if isinstance(rows, slice) else self.take(rows).rows(0, len(rows))

    def to(self, device: torch.device | str) -> Examples:
        """The same examples on another device."""
        soft = None if self.soft is None else self.soft.to(device)
        return self._of(lambda part: part.to(device), soft)

    def _shift(self) -> Tensor | None:
        """How many places each row begins after the first, or None where all begin there."""
        first = self.attention_N_S.long().argmax(1)  # 0 for an empty row
        return first if bool(first.any()) else None

    def aligned(self) -> Examples:
        """The same rows, padded on the right.

        Raises:
            BadValueError: if rows with distributions are padded on the left.
        """
        shift = self._shift()
        if shift is None:
            return self
        if self.soft is not None:
            raise BadValueError("Rows with soft labels must be padded on the right.", "Pad them there.")
        places = (torch.arange(self.ids_N_S.shape[1], device=shift.device) + shift[:, None]) % self.ids_N_S.shape[1]
        return self._of(lambda part: part.gather(1, places), None)

    def as_given(self, values: Tensor) -> Tensor:
        """Values (N, S, ...) of the aligned rows in the places that these rows have them; 0 where padded."""
        shift = self._shift()
        if shift is None:
            return values
        width = self.ids_N_S.shape[1]
        places = (torch.arange(width, device=shift.device) - shift[:, None]) % width
        return values[torch.arange(len(self), device=shift.device)[:, None], places]

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]], *, pad_id: int = 0, prefix: int | Sequence[int] = 1
    ) -> Examples:
        """Pad lists of token ids into one batch.

        Args:
            sequences: N lists of token ids, each with at least one token.
            pad_id: id that fills the padding.
            prefix: number of leading tokens that are context only (1: every token but the first is trained); one number,
                or one a row.

        Returns:
            The batch, on the CPU.

        Raises:
            BadValueError: if there is no sequence, one is empty, or there are more or fewer prefixes.
        """
        return cls(*batches.from_sequences(sequences, pad_id, prefix))

    @classmethod
    def from_batch(cls, batch: Mapping[str, Any]) -> Examples:
        """From a `BatchEncoding` or a collator's dict, padded on either side; see `batches.from_batch`."""
        return cls(*batches.from_batch(batch))

    @classmethod
    def from_dataset(cls, dataset: Iterable[Any], *, pad_id: int = 0) -> Examples:
        """From a torch data set or a list of rows with `input_ids` (and `labels`); see `batches.from_dataset`."""
        return cls(*batches.from_dataset(dataset, pad_id))

    @classmethod
    def from_messages(
        cls, tokenizer: Any, conversations: Sequence[Any], *, pad_id: int | None = None, **options: Any
    ) -> Examples:
        """From conversations, of which the assistant's turns are trained; see `batches.from_messages`."""
        return cls(*batches.from_messages(tokenizer, conversations, pad_id, options))


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
class Visits:
    """The M visits of examples in a run of T steps, in its order.

    Attributes:
        step_M: t of each, int64 on the CPU.
        example_M: which example, int64 on the CPU.
        credit_M: ∂Φ/∂w of the example's loss in that step alone.
    """

    step_M: Tensor
    example_M: Tensor
    credit_M: Tensor


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
        notes: what was chosen for this model and was not asked for, a sentence each.
        visits: τ of each visit of an example, which sum to its τ_i; None unless asked for.
        factors: the credit of every label in factors, where that was asked for.
    """

    value: float
    measures: dict[str, float]
    example_N: Tensor
    token_N_S: Tensor
    label_N_S_V: Tensor | None
    final: dict[str, Tensor]
    gradient_median: float
    stats: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    visits: Visits | None = None
    factors: LabelFactors | None = None

    def __repr__(self) -> str:
        """Three lines: Φ and its measures, the rewards, what was kept."""
        rewards = self.example_N.detach().double()
        known = ", ".join(f"{name} {number:.6g}" for name, number in self.measures.items())
        labels = "" if self.label_N_S_V is None else f", labels {tuple(self.label_N_S_V.shape)}"
        spread = ""
        if len(rewards):
            best, worst = int(rewards.argmax()), int(rewards.argmin())
            spread = f", mean {rewards.mean():.3g}, from {rewards[worst]:.3g} (example {worst}) to {rewards[best]:.3g} ({best})"
        weights = sum(value.numel() for value in self.final.values())
        return (
            f"Metagradient: Φ = {self.value:.6g}{f' ({known})' if known else ''}\n"
            f"  example_N: {len(rewards)} rewards{spread}; token_N_S {tuple(self.token_N_S.shape)}{labels}\n"
            f"  final: {len(self.final)} parameters, {weights} weights; median |g| {self.gradient_median:.3g}"
            f"{'; ' + ' '.join(self.notes) if self.notes else ''}"
        )


@dataclass(frozen=True)
class Metagradients:
    """What one inner run and one reverse pass give for Q metrics (*queries*). See `Metagradient`.

    Attributes:
        value_Q: Φ(θ_T) of each, float64 on the CPU.
        measures: of each.
        example_Q_N: ∂Φ_q/∂w_i.
        token_Q_N_S: the derivative by the weight of each token's loss.
        final: θ_T by parameter name, detached.
        gradient_median, stats, notes: as there.
        visits: of each query, or None.
    """

    value_Q: Tensor
    measures: list[dict[str, float]]
    example_Q_N: Tensor
    token_Q_N_S: Tensor
    final: dict[str, Tensor]
    gradient_median: float
    stats: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    visits: tuple[Visits, ...] | None = None

    def __len__(self) -> int:
        return len(self.measures)

    def __getitem__(self, query: int) -> Metagradient:
        """What the run says of one metric."""
        return Metagradient(
            value=float(self.value_Q[query]),
            measures=self.measures[query],
            example_N=self.example_Q_N[query],
            token_N_S=self.token_Q_N_S[query],
            label_N_S_V=None,
            final=self.final,
            gradient_median=self.gradient_median,
            stats=self.stats,
            notes=self.notes,
            visits=None if self.visits is None else self.visits[query],
        )


@dataclass(frozen=True)
class Credit:
    """Rewards as they reach the generator's tokens.

    Attributes:
        advantage_N_K: advantage of each sampled token.
        label_N_K_V: reward of every token that could have been sampled (`expected` mode), else None.
        stats: reward and advantage statistics for the log.
        factors: the same in factors, in place of `label_N_K_V`: for vocabularies whose rewards would not fit.
    """

    advantage_N_K: Tensor
    label_N_K_V: Tensor | None = None
    stats: dict[str, float] = field(default_factory=dict)
    factors: LabelFactors | None = None

    @property
    def knows_labels(self) -> bool:
        """Whether there are rewards of every token."""
        return self.label_N_K_V is not None or self.factors is not None

    def labels_at(self, place_M: Tensor) -> Tensor:
        """Rewards of every token at places of the flat (N · K) axis, (M, V); the caller's own."""
        if self.factors is not None:
            return self.factors.at(place_M)
        if self.label_N_K_V is None:
            raise ValueError("the credit of labels was not asked for")
        return self.label_N_K_V.flatten(0, 1)[place_M]

    def rows(self, index: Tensor, width: int) -> Credit:
        """The rows of a 1-D index, cut to `width` columns."""
        return replace(
            self,
            advantage_N_K=self.advantage_N_K[index, :width],
            label_N_K_V=None if self.label_N_K_V is None else self.label_N_K_V[index, :width],
            factors=None if self.factors is None else self.factors.take(index).placed(width, self.factors.offset),
        )

    def weighted(self, weight_N_K: Tensor) -> Credit:
        """The same under importance weights.

        Args:
            weight_N_K: of each sampled token, which leave rewards of labels alone: these are summed over all tokens, drawn or
                not; or of a whole completion, (N, 1), which weigh both.
        """
        weighted = replace(self, advantage_N_K=self.advantage_N_K * weight_N_K)
        if weight_N_K.shape[1] != 1:
            return weighted
        return replace(
            weighted,
            label_N_K_V=None if self.label_N_K_V is None else self.label_N_K_V * weight_N_K[..., None],
            factors=None if self.factors is None else self.factors.scaled(weight_N_K[:, 0]),
        )
