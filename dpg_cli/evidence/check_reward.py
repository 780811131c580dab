"""Checks of what an outer step learns from: the metric's movement, the rewards' spread, the generator, the tokenisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dpg_cli.driver.prospect import SURE, Prospect
from dpg_cli.engine.detect import CERTAIN, rounding
from dpg_cli.engine.generator.agreement import Agreement
from dpg_cli.engine.natural.scalar import ScalarProspect
from dpg_cli.engine.records import Rollout
from dpg_cli.evidence.check_findings import Finding, VerdictWord, rounded

STILL = 1e-5  # relative movement of Φ that is worth a warning
STEPS_OF_ROUNDING = 16.0  # of the weights, under which their movement is coarse
LOW_ENTROPY = 0.1  # nats a token


def movement(
    before: float, after: float, lr: float, theta: Tensor, final: Tensor, planned: Tensor, read: Tensor, unit: float
) -> Finding:
    """Does the metric move at all in the inner run?

    Args:
        before, after: Φ(θ_0) and Φ(θ_T).
        lr: of the inner run.
        theta, final: θ_0 and θ_T, shape (n,).
        planned: the first update before it is rounded to θ's precision, float64 (n,).
        read: the coordinates that the metric reads and the data moves, bool (n,).
        unit: what Φ can change by at the most, to first order: Σ|τ|; 0 where unknown.
    """
    size = abs(before) or 1.0
    relative = abs(after - before) / size
    limit = rounding(before, theta.dtype)
    base = theta[read].abs()
    spacing = (torch.nextafter(base, torch.full_like(base, torch.inf)) - base).double()
    steps = _median((final - theta)[read].double().abs() / spacing)
    intended = max(steps, _median(planned[read].abs() / spacing))
    verdict: VerdictWord = "ok"
    factor = 1.0
    if steps < 1 or abs(after - before) <= limit:
        verdict, factor = "fail", max(10.0, 64 / intended if intended > 0 else 1000.0)
    elif steps < STEPS_OF_ROUNDING or max(relative, unit / size) < STILL:
        verdict, factor = "warn", max(3.0, 64 / intended)
    says = (
        f"Φ goes from {before:.6g} to {after:.6g} in the inner run ({relative:.1e} of its size, rounding {limit / size:.0e}); "
        f"the weights that it reads move by {steps:.3g} steps of their rounding"
    )
    if verdict == "fail":
        says = f"nothing moved: {says}"
    measured = {
        "phi_before": before,
        "phi_after": after,
        "relative": relative,
        "first_order": unit / size,
        "rounding": limit / size,
        "weight_steps": steps,
    }
    return Finding(
        "movement", verdict, says, measured, *(() if verdict == "ok" else ("inner.lr", rounded(lr * factor)))
    )


def _median(values: Tensor) -> float:
    """The median; 0 of nothing."""
    return float(values.median()) if values.numel() else 0.0


def spread(
    stats: dict[str, float], rollout: Rollout, *, across: str, labels: bool, temperature: float, runs: int
) -> Finding:
    """Is there anything to compare?

    Args:
        stats: of the credit: standard deviation, share of variance within groups, dead groups.
        rollout: the completions.
        across: what rewards are compared with, "group" or "batch".
        labels: credit `expected`.
        temperature: of the sampling.
        runs: inner runs.
    """
    same, dead = rollout.same_completions, stats["dead_groups"]
    within, std = stats["reward_within_groups"], stats["reward_std"]
    warmer = rounded(1.0 if temperature < 1 else 1.5 * temperature)
    verdict: VerdictWord = "ok"
    change: tuple[str, str] | tuple[()] = ()
    if across == "batch":
        if std == 0:
            verdict, change = "fail", ("attribution.inner_runs", str(2 * runs))
        says = f"rewards are compared across the batch; their standard deviation is {std:.2e} over {runs} inner runs"
    else:
        says = (
            f"{within:.0%} of the rewards' variance is within groups, {dead:.0%} of the groups have no spread, "
            f"{same:.0%} hold one completion only"
        )
        blank = max(dead, same)
        if rollout.group_size == 1:
            says = "a group is one completion: only the labels' rewards teach (credit expected)"
        elif blank == 1:
            verdict = "warn" if labels else "fail"
        elif blank > 0.5 or within < 0.05:
            verdict = "warn"
        if verdict != "ok":
            change = (
                ("rollout.temperature", warmer) if blank > 0.5 else ("rollout.group_size", str(2 * rollout.group_size))
            )
    measured = {"reward_std": std, "within_groups": within, "dead_groups": dead, "same_completions": same}
    return Finding("reward spread", verdict, says, measured, *change)


def exploration(entropy: float, vocabulary: int, temperature: float) -> Finding:
    """Can the generator explore?

    Args:
        entropy: mean over the sampled tokens, nats.
        vocabulary: V.
        temperature: of the sampling.
    """
    verdict: VerdictWord = "ok" if entropy >= LOW_ENTROPY else "warn" if entropy >= CERTAIN else "fail"
    says = f"the generator's entropy is {entropy:.3g} nats a token of at most {math.log(vocabulary):.2f}"
    warmer = rounded(1.0 if temperature < 1 else 1.5 * temperature)
    change = () if verdict == "ok" else ("rollout.temperature", warmer)
    return Finding("exploration", verdict, says, {"entropy": entropy, "entropy_max": math.log(vocabulary)}, *change)


def cost(seen: Prospect | ScalarProspect | None) -> list[Finding]:
    """Can the policy's KL budget show the pattern in the final dataset, or move another metric beyond its noise?

    Args:
        seen: the law; None where none was asked for, which gives no finding.
    """
    if seen is None:
        return []
    if isinstance(seen, ScalarProspect):
        known = {name: value for name, value in seen.as_dict().items() if value is not None}
        if seen.z >= SURE:
            return [Finding("nats", "ok", seen.line(), known)]
        return [Finding("nats", "fail", seen.line(), known, "policy.kl_budget", rounded(2 * seen.nats(SURE)))]
    change: tuple[str, str] | tuple[()] = ()
    verdict: VerdictWord = "ok"
    if not seen.occurs:
        verdict, change = "fail", ("metric.origin", "frequent")
    elif not seen.within:
        verdict, change = "fail", ("policy.kl_budget", rounded(1.5 * seen.nats))
    elif seen.law.first_order(seen.z, seen.tokens) > 1:
        verdict = "warn"
    says = seen.line()
    if not seen.occurs:
        says = f"the rarest row's token is {seen.law.rarest:.1e} of what the generator writes: it hardly ever occurs"
    measured = {name: value for name, value in seen.as_dict().items() if value is not None}
    return [Finding("nats", verdict, says, measured, *change)]


def tokenisers(compared: Agreement, mode: str) -> Finding:
    """Which credit modes the tokenisers leave, and how far two of them agree.

    Args:
        compared: those of generator and target.
        mode: the credit mode of the settings.
    """
    if compared.shared:
        says, verdict = "generator and target share a tokeniser: sequence, token and expected credit are there", "ok"
    else:
        says = f"{compared.as_text()}: sequence and token credit remain, expected has no labels"
        verdict = "fail" if mode == "expected" else "ok"
    change = ("credit.mode", "token") if verdict == "fail" else ()
    numbers = {**compared.as_dict(), "credit": mode}
    return Finding("tokenisers", verdict, says, numbers, *change)  # type: ignore[arg-type]
