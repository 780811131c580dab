"""How much of a change of the LM head is the noise of drawn tokens, measured where a metric reads it.

One inner step (T = 1) moves the head's weight (r, c) by -lr u(g), g = E[(p_r - e_r) h_c] over the dataset's tokens, each drawn
from q. A dataset of N tokens leaves on g the standard error

    σ² = (E[(p_r² - 2 p_r q_r + q_r) h_c²] - g²) / N

and on the weight that times u(g) / g, the slope of the secant, so that weight / error is g / σ whatever the optimiser bends.
(With q = p this is E[p_r (1 - p_r) h_c²] / N, the Fisher's diagonal: DESIGN §9.) Where no distributions are known, the drawn
tokens stand for q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.head import chunks, find_head, logits_at
from dpg_cli.engine.inner.optimizers import OptimizerSpec, by_matrix, initial_state, update
from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.inner.target import CPU_TOKENS, Labelled, fused_activations, hidden_of
from dpg_cli.engine.records import Examples

TOKENS = 65536  # that moments are taken of, at most


@runtime_checkable
class HearsNoise(Protocol):
    """A metric that reads a rectangle of the LM head and can use its noise."""

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the head."""
        ...

    def hear(self, noise_R_C: Tensor, examples: int, excess: float) -> None:
        """Take in the noise of the head's weights.

        Args:
            noise_R_C: the standard error of each weight's change at the size of the dataset, in units of the weights.
            examples: of the dataset.
            excess: variance of the noise of the change that is measured, in units of that of the dataset: examples of the
                dataset for each of an outer step with drawn labels, 0 with soft ones.
        """
        ...


@dataclass(frozen=True)
class Moments:
    """Of one token's gradient by the head's weights in a window.

    Attributes:
        mean_R_C: g.
        square_R_C: E of its square.
        tokens: that it was taken of.
    """

    mean_R_C: Tensor
    square_R_C: Tensor
    tokens: int

    def error(self, tokens: float) -> Tensor:
        """σ, the standard error of g at so many tokens."""
        return ((self.square_R_C - self.mean_R_C.square()).clamp_min(0) / tokens).sqrt()


@torch.no_grad()
def head_moments(
    model: nn.Module, examples: Examples, window: tuple[slice, slice], most: int = TOKENS
) -> Moments | None:
    """The moments over evenly spread examples, about `most` tokens in all; None where the target has no standard head.

    Args:
        model: the target θ_0.
        examples: sequences with their trained tokens, and their distributions where those are known.
        window: rows and columns of the head.
    """
    head = find_head(model)
    if head is None:
        return None
    parameters: Mapping[str, Tensor] = {name: value.detach() for name, value in model.named_parameters()}
    weight, bias = head.parameters(parameters)
    rows, columns = window
    labelled = int(examples.label_N_S.sum())
    stride = max(1, -(-labelled // most))
    some = examples.take(torch.arange(0, len(examples), stride)) if stride > 1 else examples
    mean = weight.new_zeros(rows.stop - rows.start, columns.stop - columns.start)
    square, count = torch.zeros_like(mean), 0
    size = max(1, CPU_TOKENS // some.ids_N_S.shape[1])
    for start in range(0, len(some), size):
        piece = some.rows(start, start + size)
        marked = Labelled.of(piece, weight.new_ones(len(piece)), 1.0)
        with fused_activations(model):
            hidden_M_D = hidden_of(head, dict(parameters), piece).flatten(0, 1)[marked.before_M]
        for part in chunks(len(hidden_M_D), len(weight)):
            hidden = hidden_M_D[part]
            p = torch.softmax(logits_at(hidden, weight, bias), -1)[:, rows]
            if marked.expected is None:
                names = torch.arange(rows.start, rows.stop, device=p.device)
                q = (marked.ids_M[part, None] == names).to(p)
            else:
                q = marked.expected.q(part)[:, rows]
            read = hidden[:, columns]
            mean.addmm_((p - q).mT, read)
            square.addmm_((p * (p - 2 * q) + q).mT, read.square())
            count += len(hidden)
    return Moments(mean / max(1, count), square / max(1, count), count)


def head_optimizer(model: nn.Module, recipe: Recipe) -> OptimizerSpec | None:
    """What the first and only step of a run does to the LM head: the optimiser at that step's rate, without decay.

    None where that is no function of each weight's own gradient (clipping), or the step does not move the head.
    """
    head, settings = find_head(model), recipe.settings(model)
    if head is None or recipe.max_grad_norm > 0 or by_matrix(recipe.optimizer):
        return None
    peak = recipe.optimizer.lr if settings is None else settings.get(head.weight, (0.0, 0.0))[0]
    rate = peak * recipe.schedule.factors(1, recipe.optimizer.lr)[0]
    return replace(recipe.optimizer, lr=rate, weight_decay=0.0) if rate > 0 else None


def weight_noise(moments: Moments, spec: OptimizerSpec, tokens: float) -> Tensor:
    """The standard error of each weight's change by one inner step on so many tokens.

    Args:
        moments: of the head's weights.
        spec: the inner optimiser.
        tokens: trained tokens of the dataset.
    """
    grad = moments.mean_R_C.flatten()
    floor = torch.finfo(grad.dtype).tiny ** 0.5  # where g is 0 the secant is the tangent
    grad = torch.where(grad.abs() > floor, grad, floor)
    moved = update(spec, initial_state(spec, torch.zeros_like(grad)), grad, 0, last=True).theta
    return (moved / grad).abs().view_as(moments.mean_R_C) * moments.error(tokens)
