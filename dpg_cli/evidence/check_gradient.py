"""Checks of the metagradient itself: finite differences, metasmoothness, and the optimiser's ε against the gradients.

Finite differences: Φ(w + h e_i) - Φ(w - h e_i) over 2h against τ_i on a few examples. The rule errs by O(h²), rounding by
about ε|Φ|/h; the best of several h is taken, and the rounding there is reported as the floor.

Metasmoothness: along d = τ / max|τ| the data weights go to 1 + h d. Is Φ near the line h <τ, d> for weights that change by
up to half and up to all? And do the target's weights go on in the direction in which they began (the share of their
movement that keeps its sign; Engstrom et al., 2025, measure smoothness so)? A reward is the slope of that line; the
generator walks along it in finite steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpg_cli.engine.attribution import InnerSettings, take
from dpg_cli.engine.detect import SIGN_SHARE, observed, regime, rounding
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.phi import metric_gradient, metric_value
from dpg_cli.engine.records import Examples
from dpg_cli.evidence.check_findings import Finding, VerdictWord, rounded
from dpg_cli.metrics.base import TargetMetric

COMPARED = 4  # examples in finite differences
AGREE, DISAGREE = 1e-3, 5e-2  # relative error that is ok, and that fails
STRAIGHT, BENT = 0.9, 0.5  # R² of the line that is ok, and under which it fails
DEAD_ELASTICITY = 1e-4  # median, under which a single-step reward is rounding


@dataclass(frozen=True)
class Probe:
    """Inner runs of a few examples with chosen data weights.

    Attributes:
        model: the target θ_0.
        metric: Φ.
        examples: N sequences.
        inner: the inner run.
    """

    model: nn.Module
    metric: TargetMetric
    examples: Examples
    inner: InnerSettings

    @property
    def run(self) -> TargetRun:
        """The target with the choices of its inner run."""
        return self.inner.target_run(self.model, self.examples.ids_N_S.shape[1])

    def first(self, count: int) -> Probe:
        """The first examples alone, in as many inner steps as before."""
        count = min(count, len(self.examples))
        recipe = self.inner.recipe
        recipe = replace(recipe, batches=recipe.batches.rescaled(len(self.examples), count))
        inner = InnerSettings(
            recipe,
            micro_batch=self.inner.micro_batch,
            replay=self.inner.replay,
            second_order=self.inner.second_order,
        )
        return Probe(self.model, self.metric, take(self.examples, torch.arange(count)), inner)

    def end(self, weights_N: Tensor | None = None) -> tuple[float, Tensor]:
        """Φ and θ_T with these data weights."""
        with self.inner.recipe.prepared(self.model):
            run = self.run
            theta = run.space.read(self.model)
            examples, plan = self.inner.laid_out(self.examples)
            weights = theta.new_ones(len(examples))
            if weights_N is not None:
                weights[: len(weights_N)] = weights_N.to(theta)
            final = inner_run(run, theta, examples, self.inner.recipe, weights, plan=plan).theta
            with torch.no_grad():
                return metric_value(run, final, self.metric), final

    def start(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """θ_0, g_0, θ_T and ∂Φ/∂θ_T of the run with all weights 1."""
        with self.inner.recipe.prepared(self.model):
            run = self.run
            theta = run.space.read(self.model)
            examples, plan = self.inner.laid_out(self.examples)
            weights = theta.new_ones(len(examples))
            trace = inner_run(run, theta, examples, self.inner.recipe, weights, plan=plan)
            return theta, trace.steps[0].grad, trace.theta, metric_gradient(run, trace.theta, self.metric)[1]

    def rewards(self) -> Tensor:
        """τ, (N,)."""
        return metagradient(
            self.model,
            self.examples,
            self.inner.recipe,
            self.metric,
            micro_batch=self.inner.micro_batch,
            replay=self.inner.replay,
            second_order=self.inner.second_order,
        ).example_N


def finite_differences(probe: Probe, eps_first: str = "") -> Finding:
    """Does τ agree with differences of Φ on the examples where it is largest?

    Args:
        probe: the inner runs.
        eps_first: a larger ε to suggest, where the optimiser acts as sign(g); else the learning rate is to be changed.
    """
    tau = probe.rewards()
    chosen = tau.abs().argsort(descending=True)[:COMPARED]
    double = tau.dtype == torch.float64
    best, floor, step = float("inf"), 0.0, 0.0
    reference = float(tau[chosen].norm())
    for h in (1e-1, 1e-3, 1e-5) if double else (0.3, 0.1, 0.03):
        slopes = []
        for i in chosen.tolist():
            shift = torch.zeros_like(tau)
            shift[i] = h
            slopes.append((probe.end(1 + shift)[0] - probe.end(1 - shift)[0]) / (2 * h))
        error = float((torch.tensor(slopes, dtype=tau.dtype, device=tau.device) - tau[chosen]).norm()) / reference
        if error < best:
            value = probe.end()[0]
            best, step, floor = error, h, rounding(value, tau.dtype) / h / reference
    verdict: VerdictWord = "ok" if best <= AGREE else "warn" if best <= DISAGREE or best <= 3 * floor else "fail"
    precision = "float64" if double else "float32"
    says = f"metagradients agree with finite differences to {best:.1e} on {len(chosen)} examples ({precision}, h = {step:g})"
    if verdict != "ok":
        reason = "cannot be told from rounding" if best <= 3 * floor else "Φ bends within so small a step"
        says += f"; {reason} (rounding {floor:.1e})"
    lr = rounded(probe.inner.recipe.optimizer.lr * (10 if best <= 3 * floor else 0.1))
    change = ("inner.eps", eps_first) if eps_first else ("inner.lr", lr)
    return Finding(
        "finite differences",
        verdict,
        says,
        {"relative_error": best, "examples": len(chosen), "h": step, "rounding": floor, "dtype": precision},
        *(() if verdict == "ok" else change),
    )


def metasmoothness(probe: Probe, eps_first: str = "") -> Finding:
    """Is Φ near a line in the data weights along the metagradient?

    Args:
        probe: the inner runs.
        eps_first: a larger ε to suggest, where the optimiser acts as sign(g); else the learning rate is to be lowered.
    """
    tau = probe.rewards()
    direction = tau / tau.abs().max()
    slope = float((tau * direction).sum())
    base, theta = probe.end()
    points = {h: probe.end(1 + h * direction) for h in (-1.0, -0.5, 0.5, 1.0)}
    changes = {h: value - base for h, (value, _) in points.items()}
    residual = sum((changes[h] - h * slope) ** 2 for h in changes)
    total = sum(change**2 for change in changes.values())
    r2 = 1 - residual / total if total > 0 else 0.0
    departure = max(abs(changes[h] / (h * slope) - 1) for h in (-0.5, 0.5))
    early, late = points[0.5][1] - theta, points[1.0][1] - points[0.5][1]
    moved = float(early.abs().sum())
    agreement = float((early.abs() * early.sign() * late.sign()).sum()) / moved if moved > 0 else 0.0
    noise = rounding(base, tau.dtype) / (0.5 * abs(slope))
    right_way = changes[0.5] > 0 > changes[-0.5]
    verdict: VerdictWord = "ok" if r2 >= STRAIGHT else "warn" if (r2 >= BENT and right_way) or noise > 0.1 else "fail"
    says = (
        f"Φ departs {'tenfold or more' if departure > 10 else format(departure, '.0%')} from the metagradient's line when "
        f"weights change by half (R² {r2:.3f} up to all); "
        f"{agreement:.0%} of the target's movement keeps its sign"
    )
    if noise > 0.1:
        says += "; measured within rounding"
    setting, suggested = (
        ("inner.eps", eps_first) if eps_first else ("inner.lr", rounded(probe.inner.recipe.optimizer.lr / 3))
    )
    return Finding(
        "metasmoothness",
        verdict,
        says,
        {"departure": departure, "r2": r2, "sign_agreement": agreement, "slope": slope, "rounding": noise},
        *(() if verdict == "ok" else (setting, suggested)),
    )


def epsilon(spec: OptimizerSpec, grad: Tensor, theta_bar: Tensor, steps: int) -> Finding:
    """ε and √ε_root against the gradients on the coordinates that the metric reads.

    Args:
        spec: the inner optimiser.
        grad: g_0.
        theta_bar: ∂Φ/∂θ_T.
        steps: T; with one, the whole reward carries the update's elasticity.
    """
    values = observed(grad, theta_bar)
    if not values.numel():
        return Finding(
            "epsilon", "fail", "no weight that the metric reads has a gradient", {}, "rollout.max_tokens", "32"
        )
    low, median, high = (
        (float(values.quantile(q)) for q in (0.1, 0.5, 0.9)) if len(values) <= 2**20 else _quantiles(values)
    )
    numbers = regime(spec, grad, theta_bar)
    share, elastic = numbers["sign_share"], numbers["elasticity"]
    verdict: VerdictWord = (
        "ok" if share <= SIGN_SHARE else "fail" if steps == 1 and elastic < DEAD_ELASTICITY else "warn"
    )
    root = spec.eps_root**0.5
    says = (
        f"{share:.0%} of the coordinates that the metric reads update by sign(g): |g| {low:.1e} / {median:.1e} / {high:.1e} "
        f"(10, 50, 90 %), "
    ) + ("SGD is linear in them" if spec.name == "sgd" else f"eps {spec.eps:.1e}, root of eps_root {root:.1e}")
    measured = {
        "sign_share": share,
        "elasticity": elastic,
        "gradient_q10": low,
        "gradient_median": median,
        "gradient_q90": high,
        "eps": spec.eps,
        "eps_root_sqrt": root,
    }
    return Finding("epsilon", verdict, says, measured, *(() if verdict == "ok" else ("inner.eps", rounded(high))))


def _quantiles(values: Tensor) -> tuple[float, float, float]:
    """The same three quantiles where torch.quantile would refuse the size."""
    ordered = values.sort().values
    low, median, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.1, 0.5, 0.9))
    return low, median, high
