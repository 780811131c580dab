"""The paper's ablation, scaled down: what the reward is differentiated through, and how large the inner run is.

At equal total examples (3,840) and equal policy updates (480 of 8 completions): attribution through AdamW, through SGD, and naive;
1, 8 and 96 inner steps of 8 examples an outer step, as in the paper; and completions of one prompt kept apart. `sequence` credit
throughout, as in the paper. All are judged alike: 512 fresh completions of the trained generator, 8 inner steps of 64.
"""

from __future__ import annotations

from typing import Any

from benchmarks.study import world
from benchmarks.study.pages import Axes, pick, several, table
from benchmarks.study.statistics import interval
from dpg_cli.driver.build import build
from dpg_cli.errors import DegenerateError

NAME = "ablation"
PANELS = 2
CAPTION = (
    "What 512 fresh completions do to the target, by attribution and inner steps; left pattern-67, right l2-shrink"
)
TASKS = ("pattern-67", "l2-shrink")
METHODS = ("metagradient", "sgd", "naive")
INNER_STEPS = (1, 8, 96)
SEEDS = (0, 1, 2)
BATCH, TOTAL, QUICK_TOTAL = 8, 3840, 960
JUDGED, JUDGED_BATCH = 512, 64
MEASURE = {"pattern-67": "pixel_accuracy", "l2-shrink": "norm_change"}


def cells(quick: bool) -> list[dict[str, Any]]:
    """Methods by inner steps, and completions of one prompt kept apart (4 inner runs, T = 8)."""
    total, seeds = (QUICK_TOTAL, SEEDS[:2]) if quick else (TOTAL, SEEDS)
    sizes = INNER_STEPS[1:2] if quick else INNER_STEPS
    made = []
    for seed in seeds:
        for task in TASKS[:1] if quick else TASKS:
            for method in METHODS:
                kept = sizes if task == "pattern-67" or method == "metagradient" else (8,)
                made += [cell(task, seed, method, size, True, total) for size in kept]
            made += [cell(task, seed, "metagradient", 8, False, total)]
    return made


def cell(task: str, seed: int, method: str, inner_steps: int, cross_group: bool, total: int) -> dict[str, Any]:
    """The settings of a cell."""
    return {
        "task": task, "seed": seed, "method": method, "inner_steps": inner_steps, "cross_group": cross_group,
        "total": total,
    }  # fmt: skip


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train, then judge the trained and the untrained generator's completions alike."""
    count = BATCH * settings["inner_steps"]
    runs = 4 if settings["method"] == "naive" or not settings["cross_group"] else 1
    runs = min(runs, count // 4) if settings["cross_group"] else runs  # each takes a whole group at the least
    config = world.resolve(
        world.settings(
            settings["task"],
            settings["seed"],
            steps=settings["total"] // count,
            prompts={"per_step": count // 4},
            inner={"batch_size": BATCH, "lr": 3e-4},
            attribution={"method": settings["method"], "cross_group": settings["cross_group"], "inner_runs": runs},
            policy={"minibatch": 8, "lr": 2e-3},
        ),
        [],
    )
    untrained = build(config)
    name = MEASURE[settings["task"]]
    row: dict[str, Any] = {"stopped": ""}
    own: list[float] = []
    try:
        built = world.trained(config, lambda report: own.append(report.numbers["phi"]))
    except DegenerateError as error:
        return [{"stopped": error.cause, "phi": None, "value": None, "control_phi": None, "control": None, "own": None}]
    for side, players in (("", built), ("control_", untrained)):
        completions = world.examples_of(players, world.fresh(players, JUDGED, 77 + settings["seed"]))
        result = world.outcome(players, completions, batch_size=JUDGED_BATCH)
        row |= {f"{side}phi": result.value, "control" if side else "value": result.measures[name]}
    return [row | {"own": own[-1]}]


def label(row: dict[str, Any]) -> tuple[str, int, bool]:
    """What tells the lines of the table apart."""
    return row["method"], row["inner_steps"], row["cross_group"]


def section(rows: list[dict[str, Any]]) -> str:
    """The ablation's part of the page."""
    names = {"metagradient": "AdamW (exact)", "sgd": "SGD", "naive": "naive"}
    parts = []
    for task in several(row["task"] for row in rows):
        chosen = [row for row in pick(rows, task=task) if not row["stopped"]]
        control = interval(list({row["seed"]: row["control"] for row in chosen}.values())).text(".4f")
        lines = []
        for method, steps, cross in sorted(
            {label(row) for row in chosen}, key=lambda key: (METHODS.index(key[0]), key[1:])
        ):
            cell_rows = pick(chosen, method=method, inner_steps=steps, cross_group=cross)
            lines.append(
                [
                    names[method], str(steps), "shared" if cross else "apart", str(len(cell_rows)),
                    interval([row["phi"] for row in cell_rows]).text(".4f"),
                    interval([row["value"] for row in cell_rows]).text(".4f"),
                ]
            )  # fmt: skip
        measure_name = MEASURE[task].replace("_", " ")
        head = ["attribution", "inner steps", "completions of a prompt", "seeds", "Φ", measure_name]
        parts += [f"{task} (untrained generator: {measure_name} {control}):", "", table(head, lines)]
    stopped = [row for row in rows if row["stopped"]]
    total = rows[0]["total"]
    return "\n".join(
        [
            "## The paper's ablation, scaled down",
            "",
            f"`python -m benchmarks.study --only ablation`. Blank models of the small world, `sequence` credit, {total:,} examples in batches of",
            f"{BATCH} and as many policy updates for all; judged by {JUDGED} fresh completions, {JUDGED // JUDGED_BATCH} inner steps of {JUDGED_BATCH}. Naive takes 4 inner runs an outer step (2 where T = 1).",
            "",
            "**Expected** (paper): differentiating through AdamW is better than through SGD, and both are better than the shared naive reward.",
            "**Came**: "
            + verdict(rows)
            + (f" {len(stopped)} runs stopped: {stopped[0]['stopped']}" if stopped else ""),
            "",
            *parts,
        ]
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """For each task and number of inner steps, the methods from the best mean Φ to the worst."""
    names = {"metagradient": "AdamW", "sgd": "SGD", "naive": "naive"}
    found = []
    for task in several(row["task"] for row in rows):
        for steps in several(row["inner_steps"] for row in rows):
            chosen = [row for row in pick(rows, task=task, inner_steps=steps, cross_group=True) if not row["stopped"]]
            means = {
                method: interval([row["phi"] for row in pick(chosen, method=method)]).mean
                for method in METHODS
                if pick(chosen, method=method)
            }
            if len(means) == len(METHODS):
                order = " > ".join(names[method] for method in sorted(means, key=means.__getitem__, reverse=True))
                gaps = []
                for better, worse in (("metagradient", "sgd"), ("sgd", "naive")):
                    other = {row["seed"]: row["phi"] for row in pick(chosen, method=worse)}
                    paired = [
                        row["phi"] - other[row["seed"]] for row in pick(chosen, method=better) if row["seed"] in other
                    ]
                    gaps.append(f"{names[better]} less {names[worse]} {interval(paired).text('.4f')}")
                found.append(f"{task}, T = {steps}: {order} ({', '.join(gaps)})")
    return (
        "by mean Φ, and the difference paired by seed, " + "; ".join(found) + "."
        if found
        else "too few cells to compare."
    )


def figure(rows: list[dict[str, Any]], axes: Axes) -> None:
    """The measure by inner steps and method, with every seed."""
    for panel, task in zip(axes, TASKS, strict=True):
        chosen = [row for row in pick(rows, task=task, cross_group=True) if not row["stopped"]]
        for number, method in enumerate(METHODS):
            mine = pick(chosen, method=method)
            places = [several(INNER_STEPS).index(row["inner_steps"]) + 0.12 * (number - 1) for row in mine]
            panel.scatter(places, [row["value"] for row in mine], s=16, label=method)
        if chosen:
            panel.axhline(interval([row["control"] for row in chosen]).mean, color="k", linestyle=":", linewidth=1)
        panel.set_xticks(range(len(INNER_STEPS)), [str(steps) for steps in INNER_STEPS])
        panel.set_xlabel("inner steps T (dotted: untrained generator)")
        panel.set_ylabel(MEASURE[task].replace("_", " "))
        panel.set_title(task, fontsize=9)
        panel.legend(fontsize=8)
