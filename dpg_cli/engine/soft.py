"""Labels as distributions: what stands at a position in place of the one token that was drawn there (DESIGN §9).

A position's soft loss is the expectation of its loss over labels, ℓ_is = -Σ_y q_is(y) log p_θ(y | prefix), q detached: the mean
over draws of that label, the prefix kept. Where q is a language model's, it is made anew for a chunk of tokens from hidden
states and an LM head, so that nothing of size tokens × vocabulary exists for longer than a chunk's turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

Rows = Callable[[slice], Tensor]  # q of a chunk of some tokens, (m, V)


class SoftLabels(Protocol):
    """The distributions of the tokens of N sequences of S columns."""

    def at(self, places_M: Tensor) -> Tensor:
        """q at places of the flat (N · S) axis, (M, V)."""
        ...

    def rows(self, start: int, stop: int, width: int) -> SoftLabels:
        """Those of sequences start … stop - 1, cut to `width` columns."""
        ...

    def take(self, index_N: Tensor) -> SoftLabels:
        """Those of the sequences of an index."""
        ...

    def resized(self, width: int) -> SoftLabels:
        """The same cut or padded to `width` columns."""
        ...

    def to(self, device: torch.device | str) -> SoftLabels:
        """The same on another device."""
        ...


class LabelSink(Protocol):
    """Takes the credit of every label a chunk at a time, so that it need not be kept."""

    def add(self, labels: SoftLabels, places_M: Tensor, drawn_M: Tensor, q_M_V: Tensor, credit_M_V: Tensor) -> None:
        """Take in some tokens. Each token comes once for every inner step that trained on it.

        Args:
            labels: of the sequences that the places are counted in.
            places_M: of the tokens, on their flat (N · S) axis.
            drawn_M: the tokens that were drawn there.
            q_M_V: the labels' distribution, the value of `labels.at(places_M)`; may be written to.
            credit_M_V: τ(y) of every label y; may be written to.
        """
        ...


@dataclass(frozen=True)
class TableLabels:
    """Distributions that are all at hand: for small vocabularies and tests.

    Attributes:
        q_N_S_V: a distribution over labels for each column; what stands where no loss is taken is not read.
    """

    q_N_S_V: Tensor

    def at(self, places_M: Tensor) -> Tensor:
        """See `SoftLabels`."""
        return self.q_N_S_V.flatten(0, 1)[places_M]

    def rows(self, start: int, stop: int, width: int) -> TableLabels:
        """See `SoftLabels`."""
        return TableLabels(self.q_N_S_V[start:stop, :width])

    def take(self, index_N: Tensor) -> TableLabels:
        """See `SoftLabels`."""
        return TableLabels(self.q_N_S_V[index_N])

    def resized(self, width: int) -> TableLabels:
        """See `SoftLabels`."""
        return TableLabels(torch.nn.functional.pad(self.q_N_S_V, (0, 0, 0, width - self.q_N_S_V.shape[1])))

    def to(self, device: torch.device | str) -> TableLabels:
        """See `SoftLabels`."""
        return TableLabels(self.q_N_S_V.to(device))


@dataclass(frozen=True)
class HeadLabels:
    """A generator's distributions, from its hidden states and its LM head: q = softmax((h Wᵀ + a) / temperature).

    Attributes:
        hidden_N_K_D: the hidden state that each completion token was drawn from.
        number_N: which rows of the whole batch these are, int64.
        weight: W, (V, D).
        bias: a, (V,), or None.
        temperature: of sampling.
        offset: columns of a sequence that stand before the completion.
        width: S, columns of a sequence.
        ends: tokens that end a completion, int64.
        barred: columns of the completion in which those cannot be drawn.
    """

    hidden_N_K_D: Tensor
    number_N: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    offset: int = 0
    width: int = 0
    ends: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    barred: int = 0

    def columns(self, places_M: Tensor) -> tuple[Tensor, Tensor]:
        """Row here, and column of the completion, of places of the flat (N · S) axis."""
        row = torch.div(places_M, self.width, rounding_mode="floor")
        return row, places_M - row * self.width - self.offset

    def hidden(self, places_M: Tensor) -> Tensor:
        """The hidden states that predict places of the flat (N · S) axis, (M, D)."""
        return self.hidden_N_K_D[self.columns(places_M)]

    @torch.no_grad()
    def at(self, places_M: Tensor) -> Tensor:
        """See `SoftLabels`."""
        row, column = self.columns(places_M)
        logits = torch.nn.functional.linear(self.hidden_N_K_D[row, column], self.weight, self.bias)
        if self.temperature != 1:
            logits.div_(self.temperature)
        if self.barred and len(self.ends):
            banned = (column < self.barred).nonzero()[:, :1]
            logits[banned, self.ends] = -torch.inf
        return torch.softmax(logits, -1)

    def rows(self, start: int, stop: int, width: int) -> HeadLabels:
        """See `SoftLabels`."""
        part = slice(start, stop)
        return replace(self, hidden_N_K_D=self.hidden_N_K_D[part], number_N=self.number_N[part], width=width)

    def take(self, index_N: Tensor) -> HeadLabels:
        """See `SoftLabels`."""
        return replace(self, hidden_N_K_D=self.hidden_N_K_D[index_N], number_N=self.number_N[index_N])

    def resized(self, width: int) -> HeadLabels:
        """See `SoftLabels`."""
        return replace(self, width=width)

    def to(self, device: torch.device | str) -> HeadLabels:
        """See `SoftLabels`."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(
            self,
            hidden_N_K_D=self.hidden_N_K_D.to(device),
            number_N=self.number_N.to(device),
            weight=self.weight.to(device),
            bias=bias,
            ends=self.ends.to(device),
        )


@dataclass(frozen=True)
class Expected:
    """The distributions of the trained tokens of a piece, flattened.

    Attributes:
        labels: of the piece's sequences.
        places_M: the tokens, on the flat (B · S) axis.
        train: the loss is the expectation under them; else it is that of the drawn tokens, and they only serve a `LabelSink`.
    """

    labels: SoftLabels
    places_M: Tensor
    train: bool = True

    def q(self, part: slice) -> Tensor:
        """q of a chunk of the tokens, (m, V)."""
        return self.labels.at(self.places_M[part])


@dataclass(frozen=True)
class StepFactors:
    """What an inner step said of the labels of its tokens: τ(y) = f (Σ_u p_u ż_u - ż_y), p = softmax(h Wᵀ + a), ż = ḣ Wᵀ + h Ẇᵀ + ȧ.

    Attributes:
        row_N: which row here each of the N sequences is, int64; -1 for those that the step did not train on.
        hidden_B_S_D, tangent_B_S_D: h and ḣ of the hidden state that predicts each token.
        factor_B_S: f, mask / Z.
        weight, weight_t, bias, bias_t: W, Ẇ (V, D), a, ȧ (V,); None where there is none.
    """

    row_N: Tensor
    hidden_B_S_D: Tensor
    tangent_B_S_D: Tensor
    factor_B_S: Tensor
    weight: Tensor
    weight_t: Tensor | None = None
    bias: Tensor | None = None
    bias_t: Tensor | None = None

    def credit(self, row_M: Tensor, column_M: Tensor) -> Tensor:
        """τ of every label of some tokens, (M, V)."""
        hidden, tangent = self.hidden_B_S_D[row_M, column_M], self.tangent_B_S_D[row_M, column_M]
        linear = torch.nn.functional.linear
        p = torch.softmax(linear(hidden, self.weight, self.bias), -1)
        moved = linear(tangent, self.weight, self.bias_t)
        if self.weight_t is not None:
            moved.addmm_(hidden, self.weight_t.mT)
        mean = torch.linalg.vecdot(p, moved)[:, None]
        return torch.sub(mean, moved, out=moved).mul_(self.factor_B_S[row_M, column_M][:, None])


@dataclass(frozen=True)
class LabelFactors:
    """The credit of every label, (N, K, V), in factors: hidden states and heads with their tangents, made anew for a chunk of tokens.

    A token's credit is the sum over the steps that trained on it.

    Attributes:
        steps: of the inner run; a sequence is in several where it was trained on several times.
        width: columns of a sequence, K.
        offset: columns of the target's sequences that stand before those.
        scale: by which all are multiplied, (), or those of each sequence, (N,).
    """

    steps: tuple[StepFactors, ...]
    width: int
    offset: int = 0
    scale: Tensor | None = None

    @torch.no_grad()
    def at(self, place_M: Tensor) -> Tensor:
        """Credits of the labels at places of the flat (N · K) axis, (M, V)."""
        number = torch.div(place_M, self.width, rounding_mode="floor")
        column = place_M - number * self.width + self.offset
        found: Tensor | None = None
        for step in self.steps:
            row = step.row_N[number]
            here = (row >= 0) & (column < step.factor_B_S.shape[1])
            if not bool(here.any()):
                continue
            if bool(here.all()):
                made = step.credit(row, column)
                found = made if found is None else found.add_(made)
                continue
            places = here.nonzero()[:, 0]
            made = step.credit(row[places], column[places])
            found = made.new_zeros(len(place_M), made.shape[1]) if found is None else found
            found.index_add_(0, places, made)
        if found is None:
            first = self.steps[0].weight
            found = first.new_zeros(len(place_M), len(first))
        if self.scale is None:
            return found
        return found.mul_(self.scale if self.scale.ndim == 0 else self.scale[number, None])

    def take(self, index_N: Tensor) -> LabelFactors:
        """Those of the sequences of an index."""
        steps = tuple(replace(step, row_N=step.row_N[index_N]) for step in self.steps)
        scale = self.scale if self.scale is None or self.scale.ndim == 0 else self.scale[index_N]
        return replace(self, steps=steps, scale=scale)

    def scaled(self, factor: Tensor) -> LabelFactors:
        """The same times a number, (), or a number for each sequence, (N,)."""
        return replace(self, scale=factor if self.scale is None else self.scale * factor)

    def placed(self, width: int, offset: int) -> LabelFactors:
        """The same by completion tokens: `width` columns, of which the first is the target's column `offset`."""
        return replace(self, width=width, offset=offset)

    @classmethod
    def merged(cls, parts: list[Tensor], factors: list[LabelFactors]) -> LabelFactors:
        """Of several runs over parts of the sequences, as of one over all.

        Args:
            parts: the sequences of each run, int64.
            factors: its credits.
        """
        total, steps = sum(len(part) for part in parts), []
        for part, found in zip(parts, factors, strict=True):
            for step in found.steps:
                row_N = step.row_N.new_full((total,), -1)
                row_N[part.to(row_N.device)] = step.row_N[: len(part)]
                steps.append(replace(step, row_N=row_N))
        return cls(tuple(steps), factors[0].width)
