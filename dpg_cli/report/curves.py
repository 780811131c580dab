"""Which curves a run's metrics make: the target metric, its measures, rewards, the generator's health, seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dpg_cli.report.charts import Chart, Line, short

# Keys that are no measure of the target. Whatever else a line of metrics.jsonl holds is a measure and gets a curve.
_BOOKKEEPING = {"step", "phi", "gradient_median", "entropy", "lr", "examples", "tokens", "completion_tokens", "seconds"}
_BOOKKEEPING |= {"sign_share", "elasticity", "same_completions", "sgd_lr", "phi_error", "phi_z"}
_GROUPED = ("phi_runs_", "reward_", "policy_", "seconds_", "advantage_", "well_formed", "dead_groups")
_SHARES = {"pixel_accuracy", "accuracy"}

# (title, unit, about, shares, {key: label}); a chart appears where at least one of its keys was logged.
_NOISE = [
    (
        "Φ above the untrained generator's",
        "standard errors",
        "Counted in the noise that drawn tokens leave on Φ in a dataset of the final size.",
        False,
        {"phi_z": "z"},
    ),
]
_SPREAD = [
    (
        "Spread of rewards",
        "∂Φ/∂w",
        "Standard deviation of the examples' rewards. Where it falls to zero, nothing is left to learn from.",
        False,
        {"reward_std": "standard deviation"},
    ),
    (
        "Where the spread lies",
        "share",
        "Only differences within a group (completions of one prompt) teach in sequence credit; a dead group has none.",
        True,
        {
            "reward_within_groups": "of the variance, within groups",
            "dead_groups": "of the groups, dead",
            "same_completions": "of the groups, of one text",
        },
    ),
]
_INNER = [
    (
        "How far the inner update is from a sign",
        "",
        "Where all updates are signs, rewards vanish: raise inner.eps. The elasticity is then 0; 1 is linear in the data.",
        True,
        {"sign_share": "share of updates that are nearly signs", "elasticity": "median elasticity of an update"},
    ),
]
_GENERATOR = [
    (
        "Entropy of the generator",
        "nats a token",
        "How open its choice of the next token is. Near zero it writes the same text again and again.",
        False,
        {"entropy": "entropy"},
    ),
    (
        "Distance from the start",
        "nats a token",
        "KL divergence of the generator from the one that the run began with.",
        False,
        {"policy_kl": "KL to the start"},
    ),
    (
        "Fluency",
        "share of completions",
        "Completions that are one well-formed sentence of the little world.",
        True,
        {"well_formed": "well-formed, any language", "well_formed_asked": "well-formed, the asked language"},
    ),
    (
        "Length of completions",
        "tokens",
        "Mean over the step's completions, end-of-sequence included.",
        False,
        {"completion_tokens": "tokens"},
    ),
    (
        "Gradient of the generator",
        "norm",
        "Before clipping, mean over the step's optimiser steps.",
        False,
        {"policy_grad_norm": "gradient norm"},
    ),
    (
        "Seconds an outer step",
        "seconds",
        "Sampling; the inner run with its reverse; the generator's update.",
        False,
        {
            "seconds_rollout": "rollout",
            "seconds_metagradient": "inner run and metagradient",
            "seconds_policy": "policy step",
        },
    ),
]


def curves(rows: Sequence[Mapping[str, Any]], control: Mapping[str, Any]) -> list[Chart]:
    """The charts of a run, most important first.

    Args:
        rows: the lines of `metrics.jsonl`.
        control: Φ and measures of a target trained on the untrained generator's data; may be empty.
    """
    charts = [
        _chart(
            rows,
            0,
            "Target metric Φ",
            "",
            "Larger is better; of a target fine-tuned on the step's own completions.",
            False,
            {"phi": "Φ"},
            control.get("phi"),
        )
    ]
    for name in measures(rows):
        about = "Of a target fine-tuned on the step's own completions."
        title = name.replace("_", " ").capitalize()
        share = name in _SHARES
        charts.append(_chart(rows, len(charts), title, "", about, share, {name: title}, control.get(name)))
    for title, unit, about, share, keys in (*_NOISE, *_SPREAD, *_INNER, *_GENERATOR):
        charts.append(_chart(rows, len(charts), title, unit, about, share, keys, None))
    return [chart for chart in charts if chart is not None]


def measures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the readable measures that the rows log, in their order."""
    names = {key: None for row in rows for key in row}
    return [name for name in names if name not in _BOOKKEEPING and not name.startswith(_GROUPED)]


def _chart(
    rows: Sequence[Mapping[str, Any]],
    number: int,
    title: str,
    unit: str,
    about: str,
    share: bool,
    keys: Mapping[str, str],
    reference: Any,
) -> Chart | None:
    """A chart of some keys, or None where none of them has a finite value."""
    lines = []
    for key, label in keys.items():
        points = []
        for place, row in enumerate(rows):
            value, step = _number(row.get(key)), _number(row.get("step"))
            if value is not None:
                points.append((float(place) if step is None else step, value))
        if points:
            lines.append(Line(label, tuple(sorted(points))))
    if not lines:
        return None
    value = _number(reference)
    return Chart(
        ident=f"chart-{number}",
        title=title,
        unit=unit,
        about=about,
        lines=tuple(lines),
        reference=None if value is None else ("control, at the end", value),
        share=share,
    )


def _number(value: Any) -> float | None:
    """A finite number of sensible size, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e300 else None


def table(rows: Sequence[Mapping[str, Any]], charts: Sequence[Chart], most: int = 12) -> list[list[str]]:
    """Steps and values of all charted lines at up to `most` evenly spaced outer steps; the first row is the heading."""
    lines = [(chart, line) for chart in charts for line in chart.lines]
    steps = sorted({step for _, line in lines for step, _ in line.points})
    if not steps:
        return []
    if len(steps) > most:
        steps = [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]
    heading = ["outer step"]
    columns = []
    for chart, line in lines:
        heading.append(chart.title if len(chart.lines) == 1 else f"{chart.title}: {line.label}")
        columns.append(dict(line.points))
    body = [[short(step), *(short(column[step]) if step in column else "" for column in columns)] for step in steps]
    return [heading, *body]
