"""Flags of `dpg run` that set the metric: for which tasks each one is, and which exclude each other. Imports no torch."""

from __future__ import annotations

from typing import Any

import typer

from dpg_cli.errors import UsageError, suggestion

FREQUENT = "frequent"  # as `settings/metric_options.py` has it
FLAGS = {  # setting of the metric -> (flag, metric); settings that are not listed are checked by the settings alone
    "image": ("--image", "pattern"),
    "text": ("--text", "pattern"),
    "version": ("--qr-version", "pattern"),
    "error_correction": ("--error-correction", "pattern"),
    "origin": ("--patch-origin", "pattern"),
    "language": ("--language", "text-loss"),
    "uuid": ("--uuid", "text-loss"),
    "file": ("--eval-text", "text-loss"),
    "parameter": ("--parameter", "norm"),
    "path": ("--metric", "custom"),
}
SUITS = {
    "pattern": "the tasks qr-embed and pattern-67",
    "text-loss": "the tasks language-rephrase and uuid-emit",
    "norm": "the task l2-shrink",
    "custom": "the tasks custom and subliminal-trait",
}
SOURCES = ("image", "text")


def check_flags(given: dict[str, Any], metric: str, task: str) -> None:
    """Refuse flags that do not fit the task, or each other.

    Args:
        given: settings of the metric that flags gave.
        metric: name of the task's metric.
        task: the task, for the message.

    Raises:
        UsageError: naming the flags as they were typed.
    """
    for key in given:
        flag, suits = FLAGS.get(key, ("", metric))
        if suits != metric:
            own = [name for name, other in FLAGS.values() if other == metric]
            remedy = f"{task} takes {', '.join(own)}." if own else "Leave it out."
            raise UsageError(f"{flag} is for {SUITS[suits]}, not for {task}.", remedy)
    sources = [FLAGS[key][0] for key in SOURCES if key in given]
    if len(sources) > 1:
        raise UsageError(f"{' and '.join(sources)} exclude each other.", "Give one.")


def metric_name(data: dict[str, Any], overrides: list[str]) -> str:
    """Name of the metric that settings and `--set` choose."""
    from dpg_cli.settings.presets import merge, parse_override

    for text in overrides:
        data = merge(data, parse_override(text))
    metric = data.get("metric")
    return str(metric.get("name", "pattern")) if isinstance(metric, dict) else "pattern"


def custom_settings(named: str | None) -> dict[str, str]:
    """What --metric puts into the settings: an absolute reference and the file's sha256. Nothing is imported.

    Raises:
        UsageError: if it is no reference, or the file cannot be read.
    """
    if named is None:
        return {}
    from dpg_cli.metrics.custom import digest, parse_reference

    reference = parse_reference(named)
    return {"path": str(reference), "sha256": digest(reference)}


def require_metric(name: str) -> None:
    """Refuse the name of a metric that is neither built in nor installed.

    Raises:
        UsageError: naming the nearest.
    """
    from dpg_cli.metrics.custom import installed
    from dpg_cli.settings.config import METRIC_NAMES

    known = [point.name for point in installed()]
    if name not in known:
        built_in = [other for other in METRIC_NAMES if other != "custom"]
        raise UsageError(f"There is no metric {name!r}.", suggestion(name, [*built_in, *known], "Metrics"))


def note_change(recorded: dict[str, Any], given: dict[str, Any]) -> None:
    """Say on stderr that a metric file differs from the one that a settings file was written with."""
    old = recorded.get("sha256") if isinstance(recorded, dict) else None
    if old and given.get("sha256") and old != given["sha256"]:
        typer.echo(f"dpg: note: {given['path']} has changed since these settings were written.", err=True)


def origin(text: str) -> list[int] | str:
    """`ROW,COLUMN` as two numbers; `frequent` as it is.

    Raises:
        UsageError: if it is no such pair, or one of them is negative.
    """
    if text.strip() == FREQUENT:
        return FREQUENT
    parts = text.replace(" ", "").split(",")
    if len(parts) != 2 or not all(part.removeprefix("-").isdecimal() for part in parts):
        raise UsageError(
            f"--patch-origin {text!r} is not ROW,COLUMN.", "For example: --patch-origin 100,0, or frequent."
        )
    if any(part.startswith("-") for part in parts):
        raise UsageError(
            f"--patch-origin {text!r} is negative.", "Rows (token ids) and columns (hidden dimensions) count from 0."
        )
    return [int(part) for part in parts]
