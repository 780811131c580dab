"""Credits and the Hessian-vector product from one ordinary pass beside what the inner run knows of the batch.

The inner run went forwards and backwards at θ: it knows g and the loss ℓ of each token. At θ₊ = θ + ε d once more

    ℓ̇ = (ℓ₊ - ℓ) / ε        ∇<d, ∇L> = (g₊ - g) / ε

each with an error of ε, where differences to both sides (`central.py`) have one of ε² for twice the passes. Losses are kept in
float64, so that only the rounding of their softmax is in the difference. Credits of every label need hidden states at θ: then
the model goes forwards there again, and they come from ḣ = (h₊ - h) / ε. Source: DESIGN §7.

Rows with tokens whose embedding has no gradient (`WholeEmbeddings`) are taken to both sides: stock training's g lacks that row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.differences.central import Differenced, difference_pass, reads_padding
from dpg_cli.engine.soft import LabelSink


@dataclass(frozen=True)
class Base:
    """What the inner run knows of a batch at θ.

    Attributes:
        losses_B_S: ℓ_is, float64, or None where it is not known any more.
        grad: c g, with the data weights, shape (n,); None where no Hessian-vector product is asked for.
        clip: c, what the gradient was clipped by.
    """

    losses_B_S: Tensor | None = None
    grad: Tensor | None = None
    clip: float = 1.0

    def rows(self, start: int, stop: int, width: int) -> Base:
        """The losses of some rows of that width; their gradient is not known."""
        return Base(None if self.losses_B_S is None else self.losses_B_S[start:stop, :width])

    def known(
        self, run: TargetRun, theta: Tensor, batch: Examples, weights_B: Tensor, *, need_grad: bool, need_losses: bool
    ) -> Base:
        """With what is missing made by the pass that the inner run takes: the same bytes."""
        if (self.grad is not None or not need_grad) and (self.losses_B_S is not None or not need_losses):
            return self
        losses = theta.new_empty(batch.ids_N_S.shape, dtype=torch.float64)
        grad, _ = loss_gradient(run, theta, batch, weights_B, losses_into=losses)
        made = replace(self, losses_B_S=losses if self.losses_B_S is None else self.losses_B_S)
        return replace(made, grad=grad, clip=1.0) if made.grad is None and need_grad else made


def one_sided_pass(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    weights_B: Tensor,
    epsilon: float,
    base: Base,
    *,
    need_hvp: bool,
    need_labels: bool | Literal["factors"],
    sink: LabelSink | None = None,
) -> Differenced:
    """What `difference_pass` gives, by a difference to one side; `moved_B_S` is |ℓ₊ - ℓ| where no label's credit is asked for.

    Args:
        base: what is known at θ; the rest is made.
    """
    labels = bool(need_labels) or sink is not None
    if reads_padding(run, batch):
        return difference_pass(
            run, theta, direction, batch, weights_B, epsilon, need_hvp=need_hvp, need_labels=need_labels, sink=sink
        )
    base = base.known(run, theta, batch, weights_B, need_grad=need_hvp, need_losses=not labels)
    if labels:
        found = difference_pass(
            run, theta, direction, batch, weights_B, epsilon, need_hvp=need_hvp, need_labels=need_labels, sink=sink,
            one_sided=True,
        )  # fmt: skip
        if found.hvp is not None and base.grad is not None:
            found.hvp.sub_(base.grad, alpha=1 / (base.clip * epsilon))
        return found
    losses = theta.new_empty(batch.ids_N_S.shape, dtype=torch.float64)
    side = torch.add(theta, direction, alpha=epsilon)
    hvp, _ = loss_gradient(run, side, batch, weights_B, losses_into=losses, need_gradient=need_hvp)
    del side
    if base.grad is not None and need_hvp:
        hvp.sub_(base.grad, alpha=1 / base.clip).div_(epsilon)
    assert base.losses_B_S is not None
    change = losses.sub_(base.losses_B_S)
    tokens = (change / (epsilon * run.normalizer(batch))).to(theta)
    return Differenced(tokens, None, hvp if need_hvp else None, moved_B_S=change.abs_().to(theta))
