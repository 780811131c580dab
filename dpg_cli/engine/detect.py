"""Is there anything to learn from? Measures of one inner run, and the watch that stops a run whose reward is dead.

What is certain stops a run at once: a reward or a gradient that is not finite, rewards that are all zero, weights that
did not change at all. What may pass, rewards that are all equal or a metric that does not move, must last for `PATIENCE`
outer steps. A generator whose completions have become alike *after* Φ rose has converged: that is told, not refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.optimizers import OptimizerSpec, elasticity
from dpg_cli.engine.records import Metagradient
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric

PATIENCE = 5  # outer steps
SIGN_ELASTICITY = 0.1  # of an update, under which it counts as sign(g)
SIGN_SHARE = 0.5  # of the coordinates in that regime, from which a run warns
ROUNDINGS = 4  # a change of Φ within so many units of its rounding is none
CERTAIN = 1e-3  # nats a token, under which a generator has nothing left to choose
FIGURES = (  # of an outer step, that the watch reads
    *("phi", "reward_mean", "reward_std", "dead_groups"),
    *("same_completions", "policy_grad_norm", "entropy"),
)
MOVED = 0.01  # share of the weights, under which an inner run changed nothing
SAMPLE = 2**20  # coordinates that quantiles are taken of


def observed(grad: Tensor, theta_bar: Tensor) -> Tensor:
    """|g_0| on the coordinates that the metric reads and the data moves; a regular sample of them where there are many.

    A metric that reads most of a large model is sampled before it is masked; one that reads few coordinates is walked in
    blocks, which finds them all. No mask, index or copy of the vectors' size exists.
    """
    read = sum(int(torch.count_nonzero(part)) for part in theta_bar.split(SAMPLE))
    thin = max(1, len(grad) // (4 * SAMPLE)) if 2 * read > len(grad) else 1
    grad, theta_bar = grad[::thin], theta_bar[::thin]
    found = [
        values[(bar != 0) & (values != 0)].abs()
        for bar, values in zip(theta_bar.split(SAMPLE), grad.split(SAMPLE), strict=True)
    ]
    values = torch.cat(found)
    return values[:: max(1, values.numel() // SAMPLE)]


def regime(spec: OptimizerSpec, grad: Tensor, theta_bar: Tensor) -> dict[str, float]:
    """How far the first update is from sign(g), on the coordinates that the metric reads.

    Args:
        spec: the inner optimiser.
        grad: g_0, shape (n,).
        theta_bar: ∂Φ/∂θ_T, shape (n,).

    Returns:
        `sign_share`, the share of coordinates whose update is nearly sign(g), and `elasticity`, the median of
        d log|u| / d log|g|. Both 0 where no coordinate moves.
    """
    values = observed(grad, theta_bar)
    if not values.numel():
        return {"sign_share": 0.0, "elasticity": 0.0}
    shares = elasticity(spec, values)
    return {
        "sign_share": float((shares < SIGN_ELASTICITY).double().mean()),
        "elasticity": float(shares.median()),
    }


@torch.no_grad()
def metric_before(metric: TargetMetric, model: nn.Module) -> float:
    """Φ(θ_0), before any fine-tuning."""
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return float(metric(parameters, model))


def rounding(value: float, dtype: torch.dtype) -> float:
    """A change of Φ below this cannot be told from rounding."""
    return ROUNDINGS * torch.finfo(dtype).eps * abs(value)


@torch.no_grad()
def weights_changed(final: Mapping[str, Tensor], model: nn.Module) -> float:
    """Share of the trained weights that differ from θ_0; those that were 0 move by any update and do not count."""
    before = dict(model.named_parameters())
    changed = sum(int(((value != before[name]) & (before[name] != 0)).sum()) for name, value in final.items())
    return changed / max(1, sum(int((before[name] != 0).sum()) for name in final))


def refuse_dead_reward(result: Metagradient, per_example: bool = False) -> None:
    """Stop where the reward says nothing, instead of training on zeros.

    Raises:
        DegenerateError: naming the cause: no gradient reached the data, or it underflowed.
    """
    if per_example or bool((result.token_N_S != 0).any()):
        return
    if result.gradient_median == 0:
        raise DegenerateError(
            "Every reward is zero: the inner run has no gradient, because the completions hold no trained token.",
            "Raise rollout.max_tokens, or look at the completions.",
        )
    raise DegenerateError(
        f"Every reward is zero although the inner run's gradients are not (median {result.gradient_median:.1e}): "
        "the metric does not react to these weights, or the optimiser acts as sign(g).",
        "Raise inner.eps or inner.eps_root towards the gradients' size, or check that the metric reads trained weights.",
    )


def refuse_nonfinite(numbers: Mapping[str, float]) -> None:
    """Stop where the policy step or a figure of it overflowed: what was learnt then is lost.

    Raises:
        DegenerateError: naming the figure.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise DegenerateError(f"The training diverged: {name} is {value}.", "Lower policy.lr or inner.lr.")


@dataclass
class Watch:
    """Follows the logged figures of a run; a pure function of them, so that a resumed run can replay its earlier rows.

    Attributes:
        start: Φ(θ_0).
        dtype: of the target.
        optimizer: the inner optimiser.
        labels: credit `expected`, which learns from labels that were not sampled too.
        across: what rewards are compared with, "group" or "batch".
        soft: the inner run trains on the expectation over labels: a target that starts as the generator does then has no
            gradient at first, and nothing moves.
        alike, still: outer steps in a row with equal rewards, and with a Φ that did not move.
        alive: Φ of the first outer steps whose rewards differed.
    """

    start: float
    dtype: torch.dtype
    optimizer: OptimizerSpec
    labels: bool = False
    across: str = "group"
    soft: bool = False
    alike: int = 0
    still: int = 0
    alive: list[float] = field(default_factory=list)
    told: bool = False

    def replay(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Take in the rows of `metrics.jsonl` of an earlier part of the run; those that lack a figure are left out."""
        for row in rows:
            if all(isinstance(row.get(name), int | float) for name in FIGURES):
                self._count(row)

    def see(
        self, numbers: Mapping[str, float], changed: Callable[[], float] = lambda: 1.0
    ) -> tuple[str, DegenerateError | None]:
        """Take in an outer step.

        Args:
            numbers: its logged figures.
            changed: gives the share of the target's weights that the inner run changed; asked only if Φ did not move.

        Returns:
            A warning or nothing, and the error that ends the run, if the reward or the metric is dead.
        """
        self._count(numbers)
        broken = [name for name in ("phi", "reward_std", "policy_grad_norm") if not math.isfinite(numbers[name])]
        if broken:
            step = int(numbers["step"])
            return "", DegenerateError(
                f"{', '.join(broken)} is not finite at outer step {step}.", "Lower policy.lr or inner.lr."
            )
        fault = self._nothing_moved(changed) if self.still else None
        warning = self._sign_warning(numbers)
        if fault is None and self.alike >= PATIENCE and not self.told:
            cause = (
                f"for {self.alike} outer steps all rewards that are compared with each other were equal "
                f"(entropy of the generator {numbers['entropy']:.3g} nats a token)"
            )
            if self.alive and numbers["phi"] > sum(self.alive) / len(self.alive):
                self.told = True
                warning = (
                    f"{cause}; Φ has risen since the run began: the generator has converged, more steps add nothing."
                )
            else:
                fault = DegenerateError(
                    f"The reward is dead: {cause}.",
                    "Raise rollout.temperature or rollout.group_size so that completions differ; `dpg check` says which.",
                )
        return warning, fault

    def _count(self, numbers: Mapping[str, float]) -> None:
        """Add one outer step to the counts."""
        self.still = self.still + 1 if abs(numbers["phi"] - self.start) <= rounding(self.start, self.dtype) else 0
        self.alike = self.alike + 1 if self._equal(numbers) else 0
        if not self.alike:
            self.told = False
            if len(self.alive) < PATIENCE:
                self.alive.append(numbers["phi"])

    def _equal(self, numbers: Mapping[str, float]) -> bool:
        """The rewards of an outer step teach nothing."""
        if numbers["policy_grad_norm"] == 0:
            return True
        if self.across == "batch":
            return numbers["reward_std"] <= rounding(numbers["reward_mean"], self.dtype)
        if self.labels:  # rewards of labels differ always; they cannot act on a generator that is certain
            return numbers["entropy"] < CERTAIN
        return numbers["dead_groups"] == 1 or numbers["same_completions"] == 1

    def _nothing_moved(self, changed: Callable[[], float]) -> DegenerateError | None:
        """The error for a metric that has not moved, once that is certain."""
        lr = self.optimizer.lr
        if not self.soft and changed() < MOVED:
            return DegenerateError(
                f"Nothing moved: the inner run left the target's weights as they were (Φ stays at {self.start:.6g}).",
                f"Raise inner.lr: at {lr:g} its updates vanish in the rounding of the weights.",
            )
        if self.still < PATIENCE:
            return None
        return DegenerateError(
            f"Nothing moved: for {self.still} outer steps Φ after the inner run was Φ before it, {self.start:.6g}, "
            "to within rounding.",
            f"Raise inner.lr (it is {lr:g}), or make the metric more sensitive.",
        )

    def _sign_warning(self, numbers: Mapping[str, float]) -> str:
        """Only for the first outer step."""
        share = numbers.get("sign_share", 0.0)
        if numbers["step"] > 0 or share <= SIGN_SHARE:
            return ""
        return (
            f"the inner optimiser acts as sign(g) on {share:.0%} of the weights that the metric reads (eps "
            f"{self.optimizer.eps:g}, root of eps_root {self.optimizer.eps_root**0.5:.2g}, median gradient "
            f"{numbers['gradient_median']:.1e}): metagradients are small and learning slow. Raise inner.eps towards "
            "the gradients' size; `dpg check` suggests a value."
        )
