"""What a policy of the LM head alone needs: the head's gradients, from credits of labels and of sampled tokens; the change
of the head since it began; and how far its distributions have gone, in nats a token.

Hidden states are those that the rollout was drawn from (`HeadLabels`); a head with a bias is taken as one matrix, the bias as
its last column.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpg_cli.engine.inner.head import Head, chunks
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.engine.soft import HeadLabels, LabelSink, SoftLabels


@dataclass
class HeadChange:
    """A generator's head, and the head that it started with.

    Attributes:
        head: of the generator; its parameters are changed in place.
        start: its weight and bias (or None) before any training.
    """

    head: Head
    start: tuple[Tensor, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        layer = self.head.layer
        self.start = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()

    @property
    def now(self) -> tuple[Tensor, Tensor | None]:
        """Its weight and bias, detached; what is written to them changes the generator."""
        layer = self.head.layer
        return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()

    @torch.no_grad()
    def add(self, change_V_D: Tensor, factor: float = 1.0) -> None:
        """Add a change; its last column is the bias's where there is one."""
        weight, bias = self.now
        weight.add_(change_V_D[:, : weight.shape[1]], alpha=factor)
        if bias is not None:
            bias.add_(change_V_D[:, -1], alpha=factor)

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """Scale the whole change since the start."""
        for now, start in zip(self.now, self.start, strict=True):
            if now is not None and start is not None:
                now.lerp_(start, 1 - factor)


@dataclass
class LabelGradient:
    """A sink that turns the credits of labels into the gradient of Φ by the head, Σ (q ⊙ (τ - <q, τ>)) hᵀ / temperature.

    Attributes:
        total: (V, D), and a column for the bias where there is one.
        chosen: the completion tokens that count, (N · K), bool.
        hidden_bar: the gradient by the hidden states too, (N · K, D), where more than the head is trained.
    """

    total: Tensor
    chosen: Tensor
    hidden_bar: Tensor | None = None

    @classmethod
    def like(cls, labels: HeadLabels, places_M: Tensor, backbone: bool = False) -> LabelGradient:
        """Nothing yet.

        Args:
            labels: of a rollout, its `width` K.
            places_M: of the tokens that count.
            backbone: the hidden states' gradient is asked for as well.
        """
        chosen = torch.zeros(len(labels.number_N) * labels.width, dtype=torch.bool, device=places_M.device)
        chosen[places_M] = True
        bar = labels.weight.new_zeros(len(chosen), labels.weight.shape[1]) if backbone else None
        return cls(torch.zeros_like(with_bias(labels.weight, labels.bias)), chosen, bar)

    @torch.no_grad()
    def pulled(self, labels: HeadLabels, places_M: Tensor, pull_M_V: Tensor) -> None:
        """Add the adjoints of some tokens' logits.

        Args:
            labels: of the rollout, for the head and the temperature.
            places_M: the tokens, on the flat (N · K) axis, each at most once.
            pull_M_V: the adjoints at temperature 1.
        """
        if self.hidden_bar is not None:
            self.hidden_bar[places_M] += (pull_M_V @ labels.weight).div_(labels.temperature)

    def sum_over(self, ranks: Ranks) -> None:
        """The whole gradient on every rank."""
        ranks.sum_(self.total)
        if self.hidden_bar is not None:
            ranks.sum_(self.hidden_bar)

    def scale(self, factor: float) -> None:
        """Multiply it."""
        self.total.mul_(factor)
        if self.hidden_bar is not None:
            self.hidden_bar.mul_(factor)

    @torch.no_grad()
    def add(self, labels: SoftLabels, places_M: Tensor, drawn_M: Tensor, q_M_V: Tensor, credit_M_V: Tensor) -> None:
        """See `LabelSink`."""
        if not isinstance(labels, HeadLabels):
            raise TypeError("the gradient by a head needs the labels of a head")
        row, column = labels.columns(places_M)
        flat = labels.number_N[row] * labels.hidden_N_K_D.shape[1] + column
        own = self.chosen[flat]
        if not bool(own.all()):
            row, column, flat, q_M_V, credit_M_V = row[own], column[own], flat[own], q_M_V[own], credit_M_V[own]
        hidden = labels.hidden_N_K_D[row, column]
        pull = credit_M_V.sub_(torch.linalg.vecdot(q_M_V, credit_M_V)[:, None]).mul_(q_M_V)
        self.pulled(labels, flat, pull)
        weight = self.total[:, : hidden.shape[1]]
        weight.addmm_(pull.mT, hidden, alpha=1 / labels.temperature)
        if labels.bias is not None:
            self.total[:, -1].add_(pull.sum(0), alpha=1 / labels.temperature)


@dataclass
class DrawnCredit:
    """A sink that keeps τ of the token that was drawn, where the inner run trained on the expectation.

    Attributes:
        token_N_K: by completion token; a token that was trained on several times has the sum.
    """

    token_N_K: Tensor

    @torch.no_grad()
    def add(self, labels: SoftLabels, places_M: Tensor, drawn_M: Tensor, q_M_V: Tensor, credit_M_V: Tensor) -> None:
        """See `LabelSink`."""
        if not isinstance(labels, HeadLabels):
            raise TypeError("credits by completion token need the labels of a rollout")
        row, column = labels.columns(places_M)
        self.token_N_K[labels.number_N[row], column] += credit_M_V.gather(-1, drawn_M[:, None])[:, 0]


@dataclass(frozen=True)
class Sinks:
    """Several sinks, one after another.

    Attributes:
        each: those that write to what they are given come last.
    """

    each: tuple[LabelSink, ...]

    def add(self, labels: SoftLabels, places_M: Tensor, drawn_M: Tensor, q_M_V: Tensor, credit_M_V: Tensor) -> None:
        """See `LabelSink`."""
        for sink in self.each:
            sink.add(labels, places_M, drawn_M, q_M_V, credit_M_V)


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The head as one matrix: the weight, and the bias as its last column."""
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def with_ones(hidden_M_D: Tensor, bias: Tensor | None) -> Tensor:
    """Hidden states, with a column of ones where the head has a bias."""
    return hidden_M_D if bias is None else torch.cat([hidden_M_D, torch.ones_like(hidden_M_D[:, :1])], 1)


@torch.no_grad()
def add_advantages(
    gradient: LabelGradient, labels: HeadLabels, rollout: Rollout, credit: Credit, ranks: Ranks = ALONE
) -> None:
    """Add Σ_s A_s (e_y - q_s) h_sᵀ / temperature over the sampled tokens that count; each rank its share."""
    total_V_D = gradient.total
    weights = (credit.advantage_N_K * rollout.mask_N_K).flatten() * gradient.chosen
    places = weights.nonzero()[:, 0]
    places = places[ranks.shard(len(places))]
    ids = rollout.ids_N_K.flatten()
    for part in chunks(len(places), len(total_V_D)):
        at = places[part]
        pull = labels.at(at).neg_()
        pull.scatter_add_(1, ids[at, None], torch.ones_like(pull[:, :1]))
        hidden = with_ones(labels.hidden(at), labels.bias)
        gradient.pulled(labels, at, pull.mul_(weights[at, None]))
        total_V_D.addmm_(pull.mT, hidden, alpha=1 / labels.temperature)


@torch.no_grad()
def divergence(
    hidden_M_D: Tensor, now: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None], temperature: float
) -> float:
    """Mean KL(now ‖ other) a token, nats, in float64.

    Args:
        hidden_M_D: hidden states of the tokens, without a column of ones.
        now, other: weight and bias of two heads.
        temperature: of both distributions.
    """
    total = 0.0
    for part in chunks(len(hidden_M_D), len(now[0])):
        first, second = (
            torch.log_softmax(torch.nn.functional.linear(hidden_M_D[part], weight, bias).div_(temperature), -1)
            for weight, bias in (now, other)
        )
        total += float(torch.linalg.vecdot(first.exp(), first - second).sum(dtype=torch.float64))
    return total / max(1, len(hidden_M_D))


@torch.no_grad()
def step_divergence(
    hidden_M_D: Tensor, now: tuple[Tensor, Tensor | None], change_V_D: Tensor, factor: float, temperature: float
) -> float:
    """Mean KL(now ‖ before) a token, nats, where `now` is before and `factor` times a change; no copy of the head is needed."""
    total, moved = 0.0, with_ones(hidden_M_D, now[1])
    for part in chunks(len(hidden_M_D), len(now[0])):
        logits = torch.nn.functional.linear(hidden_M_D[part], *now)
        earlier = torch.addmm(logits, moved[part], change_V_D.mT, alpha=-factor).div_(temperature)
        first, second = torch.log_softmax(logits.div_(temperature), -1), torch.log_softmax(earlier, -1)
        total += float(torch.linalg.vecdot(first.exp(), first - second).sum(dtype=torch.float64))
    return total / max(1, len(hidden_M_D))


@torch.no_grad()
def divergence_gradient(
    hidden_M_D: Tensor, now: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None], temperature: float
) -> Tensor:
    """The gradient of `divergence` by `now`, (V, D) with the bias as its last column."""
    total = torch.zeros_like(with_bias(*now))
    width = hidden_M_D.shape[1]
    for part in chunks(len(hidden_M_D), len(now[0])):
        first, second = (
            torch.log_softmax(torch.nn.functional.linear(hidden_M_D[part], weight, bias).div_(temperature), -1)
            for weight, bias in (now, other)
        )
        q, pull = first.exp(), first.sub_(second)
        pull.sub_(torch.linalg.vecdot(q, pull)[:, None]).mul_(q)
        total[:, :width].addmm_(pull.mT, hidden_M_D[part])
        if now[1] is not None:
            total[:, -1].add_(pull.sum(0))
    return total.div_(max(1, len(hidden_M_D)) * temperature)
