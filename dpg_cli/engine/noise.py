"""How much of a change of the LM head is the noise of drawn tokens, measured where a metric reads it.

One inner step (T = 1) moves the head's weight (r, c) by -lr u(g), g = E[(p_r - e_r) h_c] over the dataset's tokens, each drawn
from q. A dataset of N tokens leaves on g the standard error

    σ² = (E[(p_r² - 2 p_r q_r + q_r) h_c²] - g²) / N

and on the weight that times u(g) / g, the slope of the secant, so that weight / error is g / σ whatever the optimiser bends.
(With q = p this is E[p_r (1 - p_r) h_c²] / N, the Fisher's diagonal: DESIGN §9.) Where no distributions are known, the drawn
tokens stand for q.

Over T steps, each of its own tokens, the weight moves by Σ_t c_t g_t near the mean gradient g, c_t the optimiser's response to
the gradient of step t, found by its adjoint. The error is then that of one step times sqrt(T Σ c_t²) / |Σ c_t|, at the slope of
the whole run. That leaves out what a step's noise does to the gradients of later ones. So the formula is calibrated: a few drawn inner
runs on examples that they do not share differ by what noise does, and one factor for all weights, `measured_factor`, makes
the formula right for them in the mean square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.inner.head import chunks, find_head, logits_at
from dpg_cli.engine.inner.optimizers import OptimizerSpec, State, adjoint, by_matrix, initial_state, update
from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.inner.target import CPU_TOKENS, Labelled, fused_activations, hidden_of
from dpg_cli.engine.natural.head_policy import with_ones
from dpg_cli.engine.natural.reach import Reach
from dpg_cli.engine.records import Examples
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.errors import DegenerateError

TOKENS = 65536  # that moments are taken of, at most
PARTS, FEWEST = 4, 128  # drawn runs of a calibration; of half the examples together, but no fewer each if there are
UNKNOWN = 3.0  # a factor of the formula beyond which it explains nothing
TINY = 1e-30  # a learning rate that a schedule puts to 0


@dataclass(frozen=True)
class PatchNoise:
    """What is known of the change of a rectangle of the LM head by one inner step.

    Attributes:
        error_R_C: its standard error at the size of the dataset, in units of the weights.
        slope_R_C: change of a weight for a change of minus its gradient.
        reach: what a change of the generator's head does to minus the gradient.
        examples: of the dataset.
        excess: variance of the noise of a change that is measured, in units of that of the dataset: examples of the dataset
            for each of an outer step with drawn labels, 0 with soft ones.
    """

    error_R_C: Tensor
    slope_R_C: Tensor
    reach: Reach
    examples: int
    excess: float = 0.0


@runtime_checkable
class HearsNoise(Protocol):
    """A metric that reads a rectangle of the LM head and can use what is known of its noise."""

    head: str  # name of the head's weight among the target's parameters

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the head."""
        ...

    def hear(self, noise: PatchNoise) -> None:
        """Take it in."""
        ...

    @property
    def heard(self) -> PatchNoise | None:
        """What was taken in last."""
        ...

    def pull(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The adjoint of the rectangle's weights, (R, C), that a policy step is to follow: ∂Φ/∂W, or what it aims at."""
        ...

    @property
    def aims(self) -> bool:
        """`pull` is no gradient of Φ: it asks for certain changes, and its length counts."""
        ...


@dataclass(frozen=True)
class Aimed:
    """A metric with the value of another, whose derivative is what that one pulls by."""

    metric: Any

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ, and a graph to the head whose gradient is `pull`."""
        with torch.no_grad():
            value, pull = self.metric(parameters, model), self.metric.pull(parameters)
        patch = parameters[self.metric.head][self.metric.window]
        return value + (pull * (patch - patch.detach())).sum()

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Those of the metric."""
        return self.metric.measures(parameters, model)

    def describe(self) -> str:
        """As the metric does."""
        return self.metric.describe()


def tilt_of(metric: HearsNoise, final: Mapping[str, Tensor], noise: PatchNoise, like_V_D: Tensor) -> Tensor:
    """The change of the generator's head that a natural step finds, but for rows that the metric does not read, (V, D).

    Args:
        metric: what pulls.
        final: θ_T.
        noise: of its patch.
        like_V_D: the generator's head, a column for a bias included.
    """
    tilt = torch.zeros_like(like_V_D)
    found = noise.reach.tilt((noise.slope_R_C * metric.pull(final)).to(tilt)).x
    tilt[metric.window[0], : found.shape[1]] = found
    return tilt


@dataclass(frozen=True)
class Moments:
    """Of one token's gradient by the head's weights in a window.

    Attributes:
        mean_R_C: g.
        square_R_C: E of its square.
        reach: of the generator's head on the window, from the same tokens. Where that head has the shape of the target's, or is not
            known, the target's hidden states stand for the generator's; for drawn tokens, the target's distributions.
    """

    mean_R_C: Tensor
    square_R_C: Tensor
    reach: Reach

    @property
    def tokens(self) -> int:
        """That they were taken of."""
        return self.reach.tokens

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
    square, reads, likely, own = torch.zeros_like(mean), [], [], []
    labels = some.soft if isinstance(some.soft, HeadLabels) else None
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
            reads.append(read)
            likely.append(p if marked.expected is None else q)
        soft = None if marked.expected is None else marked.expected.labels
        if marked.expected is not None and isinstance(soft, HeadLabels) and soft.weight.shape != weight.shape:
            own.append(with_ones(soft.hidden(marked.expected.places_M), soft.bias))
        else:
            own.append(hidden_M_D)
    count = max(1, sum(map(len, reads)))
    temperature = 1.0 if labels is None else labels.temperature
    one_model = labels is None or labels.weight.shape == weight.shape
    reach = Reach(torch.cat(own), torch.cat(reads), torch.cat(likely), columns.start, temperature, one_model)
    return Moments(mean / count, square / count, reach)


def head_optimizers(model: nn.Module, recipe: Recipe, steps: int = 1) -> list[OptimizerSpec]:
    """What each step of a run does to the LM head: the optimiser at that step's rate, without decay.

    Empty where that is no function of each weight's own gradients (clipping), or the run does not move the head.

    Args:
        model: the target.
        recipe: of the run.
        steps: T.
    """
    head, settings = find_head(model), recipe.settings(model)
    if head is None or recipe.max_grad_norm > 0 or by_matrix(recipe.optimizer):
        return []
    peak = recipe.optimizer.lr if settings is None else settings.get(head.weight, (0.0, 0.0))[0]
    rates = [peak * factor for factor in recipe.schedule.factors(steps, recipe.optimizer.lr)]
    if not any(rate > 0 for rate in rates):
        return []
    return [replace(recipe.optimizer, lr=max(rate, TINY), weight_decay=0.0) for rate in rates]


def patch_noise(
    moments: Moments,
    specs: Sequence[OptimizerSpec],
    tokens: float,
    examples: int,
    excess: float = 0.0,
    factor: float = 1.0,
) -> PatchNoise:
    """The noise of each weight's change by the inner steps.

    Args:
        moments: of the head's weights.
        specs: what each step does to them.
        tokens: trained tokens of the dataset, over all steps.
        examples, excess: see `PatchNoise`.
        factor: of the errors, `measured_factor`.
    """
    grad = moments.mean_R_C.flatten()
    floor = torch.finfo(grad.dtype).tiny ** 0.5  # where g is 0 the secant is the tangent
    grad = torch.where(grad.abs() > floor, grad, floor)
    states = [initial_state(specs[0], torch.zeros_like(grad))]
    for step, spec in enumerate(specs):
        states.append(update(spec, states[-1], grad, step, last=step == len(specs) - 1))
    slope = (states[-1].theta / grad).abs().view_as(moments.mean_R_C)
    wider = responses(specs, states, grad).view_as(slope) if len(specs) > 1 else 1.0
    return PatchNoise(factor * wider * slope * moments.error(tokens), slope, moments.reach, examples, excess)


def responses(specs: Sequence[OptimizerSpec], states: list[State], grad: Tensor) -> Tensor:
    """sqrt(T Σ c_t²) / |Σ c_t| of each weight, at least 1: how unevenly the steps' gradients count.

    Args:
        specs: of the T steps.
        states: before each step, and after the last.
        grad: the gradient of all steps.
    """
    bar = State(torch.ones_like(grad), torch.zeros_like(grad), torch.zeros_like(states[0].v))
    total, squares = torch.zeros_like(grad), torch.zeros_like(grad)
    for step in reversed(range(len(specs))):
        found, bar = adjoint(specs[step], bar, states[step], grad, step)
        total += found
        squares += found.square()
    even = (len(specs) * squares).sqrt() / total.abs().clamp_min(torch.finfo(grad.dtype).tiny)
    return even.clamp(1.0, len(specs) ** 0.5)


@dataclass(frozen=True)
class Nothing:
    """A metric of nothing, for inner runs of which the weights alone are wanted."""

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """0."""
        return next(iter(parameters.values())).new_zeros(())

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """None."""
        return {}

    def describe(self) -> str:
        """In words."""
        return "nothing"


def measured_factor(
    model: nn.Module, examples: Examples, metric: HearsNoise, inner: InnerSettings, moments: Moments
) -> float:
    """What the formula's errors must be multiplied with: from four drawn inner runs on examples that they do not share.

    Args:
        model: the target θ_0.
        examples: of an outer step.
        metric: whose window of the head is read.
        inner: the inner run's settings.
        moments: of the window.

    Returns:
        The factor, for the mean square over the window's weights.

    Raises:
        DegenerateError: if the runs differ by far more or less than the formula says: nobody knows the noise then.
    """
    size = max(1, min(len(examples) // PARTS, max(len(examples) // (2 * PARTS), FEWEST)))
    places = (torch.arange(PARTS * size) * (len(examples) / (PARTS * size))).long()
    recipe = replace(inner.recipe, batches=inner.recipe.batches.rescaled(len(examples), size))
    steps = recipe.batches.steps(size)
    finals, expected = [], []
    for number in range(PARTS):
        drawn = replace(examples.take(places[number::PARTS]), soft=None, drawn=False)
        run = effect(model, drawn, Nothing(), replace(inner, optimizer=recipe))
        tokens = int(drawn.label_N_S.sum())
        expected.append(patch_noise(moments, head_optimizers(model, recipe, steps), tokens, size).error_R_C)
        finals.append(run.final[metric.head][metric.window])
    spread = torch.stack(finals).var(0).mean() / torch.stack(expected).square().mean()
    factor = float(spread.sqrt())
    if not 1 / UNKNOWN < factor < UNKNOWN:
        raise DegenerateError(
            f"Drawn inner runs of {steps} steps differ by {factor:.2g} times what the noise of their tokens explains: the "
            "standard errors of the patch are not known.",
            "Take one inner step (inner.batch_size), a larger inner.eps or a smaller inner.lr; or set metric.margin = 0.",
        )
    return factor
