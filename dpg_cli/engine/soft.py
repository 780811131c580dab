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
