"""Credit: three estimators of one policy gradient, at equal examples.

*Learning*: pattern-67 in the small world, the same rollouts' size and learning rate for each mode; Φ and pixel accuracy of each
outer step against the examples generated so far, and the factor in examples to reach `sequence`'s final level.

*Variance*: at a fixed generator rollouts are drawn R times. From each the unnormalised policy gradient of each mode is taken
(γ = 1, where all three have one expectation). With d_r the difference of two modes on one rollout, ‖E d‖² is estimated without bias
by (‖Σ d_r‖² - Σ ‖d_r‖²) / (R (R-1)); its interval is a jackknife over r.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.study import world
from benchmarks.study.pages import Axes, pick, several, table
from benchmarks.study.statistics import interval, reach, trailing
from dpg_cli.driver.build import Built, build
from dpg_cli.engine.generator.credit import MODES, assign
from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_loss
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.loop import attribute

NAME = "credit"
PANELS = 2
CAPTION = "Left: pixel accuracy against generated examples, by credit. Right: variance of one rollout's policy gradient"
SEEDS = (0, 1, 2)
STEPS, QUICK_STEPS = 300, 100
VARIANTS = {  # name: mode, γ
    "sequence": ("sequence", 1.0),
    "token": ("token", 1.0),
    "expected": ("expected", 1.0),
    "expected, γ = 0.5": ("expected", 0.5),
}
RESAMPLED, QUICK_RESAMPLED = 200, 40
LAST = 0.1  # share of the outer steps that a final level is the mean of
# Where variance is measured: sharpness s of the metric (20: linear in the head's change; 2000: pixels that are right stop
# pulling), and prompts a rollout.
PLACES = ((20.0, 16), (2000.0, 16), (2000.0, 64))


def cells(quick: bool) -> list[dict[str, Any]]:
    """A training run for each variant and seed, and the variances."""
    seeds = SEEDS[:2] if quick else SEEDS
    steps, resampled = (QUICK_STEPS, QUICK_RESAMPLED) if quick else (STEPS, RESAMPLED)
    made: list[dict[str, Any]] = [
        {"part": "learning", "seed": seed, "credit": name, "steps": steps} for seed in seeds for name in VARIANTS
    ]
    made += [
        {
            "part": "variance", "seed": seed, "sharpness": sharpness, "prompts": prompts,
            "resampled": resampled if prompts <= 16 else resampled // 3,
        }
        for seed in seeds[: 1 if quick else 3]
        for sharpness, prompts in PLACES[: 2 if quick else 3]
    ]  # fmt: skip
    return made


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The curve, a row an outer step; or a row for each mode and pair."""
    return learning(settings) if settings["part"] == "learning" else variance(settings)


def learning(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Φ and pixel accuracy of each outer step."""
    mode, discount = VARIANTS[settings["credit"]]
    config = world.resolve(
        world.settings(
            "pattern-67", settings["seed"], steps=settings["steps"], credit={"mode": mode, "discount": discount}
        ),
        [],
    )
    rows: list[dict[str, Any]] = []
    world.trained(
        config,
        lambda report: rows.append(
            {
                "step": report.step,
                "examples": (report.step + 1) * config.examples_per_step,
                "phi": report.numbers["phi"],
                "pixel_accuracy": report.numbers["pixel_accuracy"],
                "entropy": report.numbers["entropy"],
            }
        ),
    )
    return rows


def gradient(built: Built, token_N_K: Tensor, label: Tensor | None, rollout: Any, mode: str) -> Tensor:
    """The policy gradient (ascent) of one rollout, unnormalised, flat."""
    group = built.spec.sampling.group_size
    credit = assign(mode, token_N_K, label, rollout.mask_N_K, group, normalize=False)
    model = built.players.generator.model
    model.zero_grad(set_to_none=True)
    loss, _ = policy_loss(completion_logits(model, rollout), rollout, credit, PolicySpec())
    loss.backward()
    return -torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def resampled(built: Built, count: int, seed: int) -> dict[str, Tensor]:
    """Gradients of `count` rollouts by mode, (R, F)."""
    rng = torch.Generator().manual_seed(seed)
    generator = built.players.generator
    found: dict[str, list[Tensor]] = {mode: [] for mode in MODES}
    for number in range(count):
        rollout = sample(generator.model, generator.tokenizer, built.prompts.at(number), built.spec.sampling, rng)
        _, token_N_K, label = attribute(built.players, built.spec, rollout)
        for mode in MODES:
            found[mode].append(gradient(built, token_N_K, label, rollout, mode))
    return {mode: torch.stack(rows) for mode, rows in found.items()}


def square_of_mean(rows_R_F: Tensor) -> tuple[float, float, float]:
    """‖E x‖² without bias from R draws of x, with its 95 % interval by the jackknife."""
    gram = (
        (rows_R_F.double() @ rows_R_F.double().T)
        if rows_R_F.dtype == torch.float64
        else (rows_R_F @ rows_R_F.T).double()
    )
    count = len(gram)
    total, own = gram.sum(), gram.diagonal()
    full = float((total - own.sum()) / (count * (count - 1)))
    without = (total - 2 * gram.sum(1) + own) - (own.sum() - own)
    left_R = without / ((count - 1) * (count - 2))
    error = math.sqrt((count - 1) / count * float((left_R - left_R.mean()).square().sum()))
    return full, full - 1.96 * error, full + 1.96 * error


def variance(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Variance of each mode, and how far the modes' expectations are apart, relative to ‖E g‖²."""
    config = world.resolve(
        world.settings(
            "pattern-67", settings["seed"], credit={"mode": "expected"},
            metric={"sharpness": settings["sharpness"]}, prompts={"per_step": settings["prompts"]},
            inner={"batch_size": 4 * settings["prompts"]},
        ),
        [],
    )  # fmt: skip
    built = build(config)
    draws = resampled(built, settings["resampled"], 1000 + settings["seed"])
    size = square_of_mean(draws["expected"])[0]
    rows: list[dict[str, Any]] = []
    for mode, rows_R_F in draws.items():
        spread = float((rows_R_F - rows_R_F.mean(0)).square().sum() / (len(rows_R_F) - 1))
        squared = square_of_mean(rows_R_F)
        rows.append({"mode": mode, "against": "", "variance": spread / size, "square": squared[0] / size,
                     "low": squared[1] / size, "high": squared[2] / size})  # fmt: skip
    for first, second in (("sequence", "token"), ("sequence", "expected"), ("token", "expected")):
        apart = square_of_mean(draws[first] - draws[second])
        rows.append({"mode": first, "against": second, "variance": None, "square": apart[0] / size,
                     "low": apart[1] / size, "high": apart[2] / size})  # fmt: skip
    return rows


def curves(rows: list[dict[str, Any]], credit: str, value: str) -> list[tuple[list[int], list[float]]]:
    """Examples and the trailing mean (of five outer steps) of a value, for each seed."""
    found = []
    for seed in several(row["seed"] for row in rows):
        chosen = sorted(pick(rows, seed=seed, credit=credit), key=lambda row: row["step"])
        if chosen:
            found.append(([row["examples"] for row in chosen], trailing([row[value] for row in chosen], 5)))
    return found


def finals(rows: list[dict[str, Any]], credit: str, value: str) -> list[float]:
    """The mean of the last tenth of the outer steps, for each seed."""
    found = []
    for seed in several(row["seed"] for row in rows):
        chosen = sorted(pick(rows, seed=seed, credit=credit), key=lambda row: row["step"])
        last = [row[value] for row in chosen[-max(1, int(LAST * len(chosen))) :]]
        if last:
            found.append(sum(last) / len(last))
    return found


def shares(rows: list[dict[str, Any]], credit: str, value: str) -> list[float]:
    """For each seed: examples to reach `sequence`'s final level, over all of `sequence`'s examples."""
    found = []
    for level, (places, values) in zip(finals(rows, "sequence", value), curves(rows, credit, value), strict=False):
        found.append(reach(places, values, level) / places[-1])
    return found


def section(rows: list[dict[str, Any]]) -> str:
    """Credit's part of the page."""
    learning_rows, variance_rows = pick(rows, part="learning"), pick(rows, part="variance")
    total = max((row["examples"] for row in learning_rows), default=0)
    lines, worst = [], {}
    for name in VARIANTS:
        if not finals(learning_rows, name, "phi"):
            continue
        share = shares(learning_rows, name, "phi")
        worst[name] = max(share)
        lines.append(
            [
                name,
                str(len(share)),
                interval(finals(learning_rows, name, "phi")).text(),
                interval(finals(learning_rows, name, "pixel_accuracy")).text(),
                interval(share).text() if all(map(math.isfinite, share)) else "not reached by every seed",
            ]
        )
    reached = {name: share for name, share in worst.items() if name.startswith("expected")}
    verdict = "; ".join(
        f"{name}: {share:.3f} at the worst seed ({'as demanded' if share <= 0.1 else '**more than demanded**'})"
        for name, share in reached.items()
    )
    seeds = len(several(row["seed"] for row in learning_rows))
    page = [
        "## Credit: how a reward reaches a token",
        "",
        f"`python -m benchmarks.study --only credit`. pattern-67 in the small world (blank one-layer GPT-2, 64 tokens, T = 1): {total:,} examples",
        f"in outer steps of 64, up to {seeds} seeds, equal settings but for the credit. The last column is the share of `sequence`'s examples after which",
        "a mode has reached `sequence`'s final Φ (mean over five outer steps).",
        "",
        "**Expected**: `expected` needs at most a tenth of the examples. **Came**: " + verdict + ".",
        "",
        table(["credit", "seeds", "final Φ", "final pixel accuracy", "share of the examples"], lines),
    ]
    if variance_rows:
        page += variance_part(variance_rows)
    return "\n".join(page)


def variance_part(rows: list[dict[str, Any]]) -> list[str]:
    """The variances, and whether expectations agree."""
    lines, pairs, agree = [], [], []
    sharp = pick(rows, sharpness=2000.0, mode="sequence", against="expected")
    bent = (
        ", ".join(
            f"{interval([row['square'] for row in pick(sharp, prompts=prompts)]).text('.2f')} with {4 * prompts} examples"
            for prompts in several(row["prompts"] for row in sharp)
        )
        or "an amount not measured yet"
    )
    for sharpness in several(row["sharpness"] for row in rows):
        for prompts in several(row["prompts"] for row in pick(rows, sharpness=sharpness)):
            place = pick(rows, sharpness=sharpness, prompts=prompts)
            label = [f"{sharpness:g}", str(4 * prompts)]
            for mode in MODES:
                lines.append(
                    [
                        *label,
                        mode,
                        interval([row["variance"] for row in pick(place, mode=mode, against="")]).text(".1f"),
                    ]
                )
            for row in place:
                if row["against"]:
                    inside = row["low"] <= 0 <= row["high"]
                    agree += [inside] if sharpness < 100 else []
                    pairs.append(
                        [*label, str(row["seed"]), f"{row['mode']} - {row['against']}",
                         f"{row['square']:.3f} ({row['low']:.3f} to {row['high']:.3f})", "yes" if inside else "**no**"]
                    )  # fmt: skip
    return [
        "Variance of one rollout's policy gradient (γ = 1, unnormalised) at the untrained generator, relative to its squared mean:",
        "",
        table(["sharpness s", "examples", "credit", "variance / ‖E g‖²"], lines),
        "Do their expectations agree? ‖E(g_a - g_b)‖² over ‖E g‖² without bias, with its 95 % interval. **Expected**: 0 within the interval,",
        "where Φ is nearly linear in the data (s = 20). "
        f"**Came**: in {sum(agree)} of {len(agree)} comparisons there. Where Φ bends within one example's influence (s = 2000: a pixel that is right stops",
        f"pulling), the sampled modes see each token's effect on its own reward and `expected` does not; `sequence` and `expected` then differ by {bent}.",
        "",
        table(["sharpness s", "examples", "seed", "difference", "squared, relative", "0 inside"], pairs),
    ]


def figure(rows: list[dict[str, Any]], axes: Axes) -> None:
    """Learning curves, and variances."""
    learning_rows = pick(rows, part="learning")
    for name in VARIANTS:
        found = curves(learning_rows, name, "pixel_accuracy")
        if found:
            places = found[0][0]
            means = [interval([values[i] for _, values in found]) for i in range(len(places))]
            axes[0].plot(places, [mean.mean for mean in means], label=name)
            axes[0].fill_between(places, [m.low for m in means], [m.high for m in means], alpha=0.15)
    axes[0].set_ylim(0.4, 1.02)
    axes[0].set_xlabel("generated examples")
    axes[0].set_ylabel("pixel accuracy")
    axes[0].legend(fontsize=8)
    variance_rows = pick(rows, part="variance", against="")
    places_of = several((row["sharpness"], row["prompts"]) for row in variance_rows)
    for number, mode in enumerate(MODES):
        heights = [
            interval([row["variance"] for row in pick(variance_rows, sharpness=s, prompts=p, mode=mode)])
            for s, p in places_of
        ]
        axes[1].bar([i + 0.27 * (number - 1) for i in range(len(heights))], [h.mean for h in heights], 0.25, label=mode)
    axes[1].set_xticks(range(len(places_of)), [f"s = {s:g},\nN = {4 * p}" for s, p in places_of])
    axes[1].set_ylabel("variance / ‖E g‖²")
    axes[1].legend(fontsize=8)
