"""Transfer: data made for one target, trained into others. How much of the effect is left?

Generators are trained for pattern-67 and l2-shrink in the small world, against the blank target of one seed. 1,024 fresh completions are then trained into: the same target; three blank targets of other
seeds; a wider one; and the same target by another optimiser (SGD with a first step as long; AdamW with the default ε).
The control is the same training on the untrained generator's completions. Stock PyTorch trains all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.study import world
from benchmarks.study.pages import Axes, pick, several, table
from benchmarks.study.statistics import interval
from dpg_cli.driver.build import Built, build
from dpg_cli.evidence.stock import fine_tune
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.settings.config import Config, InnerConfig, ModelsConfig

NAME = "transfer"
PANELS = 2
CAPTION = "Effect of the data on each target, against the control; left pattern-67, right l2-shrink"
SEEDS = (0, 1, 2)
TASKS = ("pattern-67", "l2-shrink")
STEPS, QUICK_STEPS = 150, 40
EXAMPLES = 1024
WIDE = 48
OTHERS = (1, 2, 3)  # added to the seed
MEASURE = {"pattern-67": "pixel_accuracy", "l2-shrink": "norm_change"}


def cells(quick: bool) -> list[dict[str, Any]]:
    """Each task at each seed."""
    seeds, steps = (SEEDS[:1], QUICK_STEPS) if quick else (SEEDS, STEPS)
    return [{"task": task, "seed": seed, "steps": steps} for seed in seeds for task in (TASKS[:1] if quick else TASKS)]


def targets(built: Built, config: Config) -> Iterator[tuple[str, LanguageModel, InnerConfig]]:
    """Each target with the optimiser that trains it."""
    inner = config.inner
    cpu = torch.device("cpu")

    def blank(seed: int, width: int = 32) -> LanguageModel:
        folder = world.small_model(width)
        return load_target(ModelsConfig(target=folder, target_init="random", init_seed=seed), cpu)

    yield "the same", built.players.target, inner
    for other in OTHERS:
        yield "another seed", blank(100 * config.seed + 10 + other), inner
    yield f"wider ({WIDE})", blank(config.seed, WIDE), inner
    yield "by SGD", built.players.target, inner.model_copy(update={"optimizer": "sgd", "lr": inner.lr / inner.eps})
    yield "by AdamW, ε = 1e-8", built.players.target, inner.model_copy(update={"eps": 1e-8})


def effect(
    target: LanguageModel, sequences: list[list[int]], inner: InnerConfig, config: Config
) -> tuple[float, float]:
    """Φ and the measure after stock fine-tuning of a copy in one step."""
    model = copy.deepcopy(target.model)
    metric = build_metric(config.metric, target)
    fine_tune(model, sequences, inner, config.inner.steps_of_epoch(config.examples_per_step))
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        return float(metric(after, nn.Module())), metric.measures(after, nn.Module())[MEASURE[config.task]]


def measure(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each target."""
    config = world.resolve(
        world.settings(
            settings["task"],
            settings["seed"],
            steps=settings["steps"],
            credit={"mode": "expected", "discount": 0.5},
        ),
        [],
    )
    made = []
    for built in (world.trained(config), build(config)):
        examples = world.examples_of(built, world.fresh(built, EXAMPLES, 55 + settings["seed"]))
        made.append([row[keep].tolist() for row, keep in zip(examples.ids_N_S, examples.attention_N_S, strict=True)])
    rows = []
    for name, target, inner in targets(built, config):
        (phi, value), (control_phi, control) = (effect(target, sequences, inner, config) for sequences in made)
        rows.append({"target": name, "phi": phi, "value": value, "control_phi": control_phi, "control": control})
    return rows


ORDER = ("the same", "by SGD", "by AdamW, ε = 1e-8", "another seed", f"wider ({WIDE})")


def section(rows: list[dict[str, Any]]) -> str:
    """Transfer's part of the page."""
    parts = []
    for task in several(row["task"] for row in rows):
        lines = []
        for name in ORDER:
            if chosen := pick(rows, task=task, target=name):
                lines.append(
                    [
                        name, str(len(chosen)), *(interval([row[key] for row in chosen]).text(".4f") for key in ("value", "control")),
                        interval([row["value"] - row["control"] for row in chosen]).text(".4f"),
                    ]
                )  # fmt: skip
        name = MEASURE[task].replace("_", " ")
        head = ["trained into", "targets", name, "control", "difference"]
        parts += [f"{task}:", "", table(head, lines)]
    return "\n".join(
        [
            "## Transfer: data made for one target, trained into another",
            "",
            "`python -m benchmarks.study --only transfer`. Small world, `expected` credit with γ = 0.5, "
            f"{rows[0]['steps']} outer steps of 64 completions; one step of",
            f"stock PyTorch on {EXAMPLES:,} fresh completions.",
            "",
            "**Expected**: a pattern in the weights of a blank target rests on that target's random features, so it should survive another",
            "optimiser and not another seed or width. **Came**: " + verdict(rows),
            "",
            *parts,
        ]
    )


def verdict(rows: list[dict[str, Any]]) -> str:
    """The share of the effect on its own target that is left, by task and target."""
    found = []
    for task in several(row["task"] for row in rows):
        own = pick(rows, task=task, target="the same")
        if not own:
            continue
        size = sum(row["value"] - row["control"] for row in own) / len(own)
        shares = []
        for name in ORDER[1:]:
            chosen = pick(rows, task=task, target=name)
            if chosen and size:
                shares.append(f"{name} {sum(row['value'] - row['control'] for row in chosen) / len(chosen) / size:.0%}")
        found.append(f"{task}, of the effect beyond the control: {', '.join(shares)}")
    return "; ".join(found) + "."


def figure(rows: list[dict[str, Any]], axes: Axes) -> None:
    """The difference from the control for each target."""
    for panel, task in zip(axes, TASKS, strict=True):
        chosen = [pick(rows, task=task, target=name) for name in ORDER]
        heights = [interval([row["value"] - row["control"] for row in group]) for group in chosen]
        panel.bar(range(len(ORDER)), [h.mean for h in heights], 0.6, yerr=[h.half for h in heights])
        panel.set_xticks(range(len(ORDER)), [name.replace(", ", ",\n") for name in ORDER], fontsize=7, rotation=20)
        panel.set_ylabel(f"{MEASURE[task].replace('_', ' ')} less the control's")
        panel.set_title(task, fontsize=9)
