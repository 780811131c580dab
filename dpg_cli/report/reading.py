"""How the data reads beside its control, from what `dpg verify` kept: tables and examples as texts. Nothing in it is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpg_cli.report.charts import short
from dpg_cli.runs.verdict import SavedVerdict

MOST = 20  # rows of a table, and examples of each kind
LONGEST = 2000  # characters of an example


@dataclass(frozen=True)
class Example:
    """An example with what it costs.

    Attributes:
        number: of its row in the dataset.
        prompt, text: what it was written for, and what it says.
        nats: what it costs each reader, in words.
    """

    number: str
    prompt: str
    text: str
    nats: str


@dataclass(frozen=True)
class Reading:
    """What the page's section shows.

    Attributes:
        examples: how many were judged, in words.
        nats: rows of (reader, this data, control, difference, ratio of perplexities).
        telling: rows of (means, AUC of one example, of a hundred).
        kl: nats a token, or nothing.
        data, control: random examples of each.
        notes: what could not be measured.
    """

    examples: str
    nats: list[list[str]]
    telling: list[list[str]]
    kl: str
    data: list[Example]
    control: list[Example]
    notes: list[str]


def reading(verdict: SavedVerdict | None) -> Reading | None:
    """What is known of how a run's data reads; None where that was not measured, or of another dataset."""
    if verdict is None or not verdict.current:
        return None
    found = verdict.details.get("fluency")
    if not isinstance(found, Mapping):
        return None
    return Reading(
        examples=" and ".join(
            f"{count:,}" for count in dict.fromkeys(_list(found, "examples")) if isinstance(count, int)
        ),
        nats=[_nats(row) for row in _mappings(found, "nats")],
        telling=[
            [_text(row.get("by")), _auc(row.get("example")), _auc(row.get("many"))]
            for row in _mappings(found, "telling")
        ],
        kl=_number(found.get("kl"), ""),
        data=[_example(row) for row in _mappings(found, "data")],
        control=[_example(row) for row in _mappings(found, "control")],
        notes=[_text(note) for note in _list(found, "notes")],
    )


def _nats(row: Mapping[str, Any]) -> list[str]:
    difference = f"{_number(row.get('difference'), '', sign=True)} ± {_number(row.get('error'), '')}"
    values = [_number(row.get("data")), _number(row.get("control")), difference, _number(row.get("ratio"))]
    return [_text(row.get("reader")), *values]


def _example(row: Mapping[str, Any]) -> Example:
    nats = row.get("nats")
    each = (
        [f"{_number(value)} under {_text(name)}" for name, value in nats.items()] if isinstance(nats, Mapping) else []
    )
    number = row.get("number")
    return Example(
        f"{number}" if isinstance(number, int) else "",
        _text(row.get("prompt")),
        _text(row.get("text")),
        ", ".join(each),
    )


def _auc(row: Any) -> str:
    if not isinstance(row, Mapping):
        return "\u2013"
    return f"{_number(row.get('value'))} ± {_number(row.get('error'))}"


def _number(value: Any, missing: str = "\u2013", *, sign: bool = False) -> str:
    """Four decimals, or fewer digits where they are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return missing
    if abs(value) >= 1e4:
        return short(float(value))
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def _text(value: Any) -> str:
    return value[:LONGEST] if isinstance(value, str) else ""


def _list(found: Mapping[str, Any], key: str) -> list[Any]:
    value = found.get(key)
    return list(value)[:MOST] if isinstance(value, list | tuple) else []


def _mappings(found: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [row for row in _list(found, key) if isinstance(row, Mapping)]
