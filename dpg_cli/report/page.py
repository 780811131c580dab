"""From facts to the page: texts, tables and the template. Everything from the run is escaped by jinja2's autoescape.

The page asks for nothing from outside. Its Content-Security-Policy forbids it, and lets only the two inline blocks of ours
run, by their hashes; no element carries a style or a handler of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpg_cli import __version__
from dpg_cli.report.charts import short
from dpg_cli.report.curves import curves, table
from dpg_cli.report.gather import Facts
from dpg_cli.report.reading import reading
from dpg_cli.report.samples import SHADES, Row, Sample
from dpg_cli.report.text import visible
from dpg_cli.runs.commands import command

_HERE = Path(__file__).parent
PER_PAGE = 10  # examples
_NAMES = {
    "phi": "\u03a6",
    "hits": "share that is what was asked for",
    "well_formed": "of these, well-formed sentences",
    "payload": "read back by zxing-cpp",
    "steps": "optimiser steps",
    "tokens": "tokens trained on",
    "folds": "\u03a6 after a quarter of the data",
}


def render_page(facts: Facts) -> str:
    """The page as HTML text."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    script = (_HERE / "browse.js").read_text(encoding="utf-8")
    environment = templates(_HERE)
    environment.filters["moment"] = lambda text: text.replace("T", " ").replace("+00:00", " UTC")
    environment.filters["short"] = lambda value: short(value) if isinstance(value, int | float) else str(value)
    control = facts.info.get("control")
    charts = curves(facts.rows, control if isinstance(control, dict) else {})
    return environment.get_template("page.html").render(
        facts=facts,
        version=__version__,
        state=state(facts),
        engine=comparison(facts.info.get("measures"), control),
        stock=stock_comparison(facts),
        reading=reading(facts.verdict),
        asked=asked(facts),
        charts=charts,
        numbers=table(facts.rows, charts),
        legend=[] if facts.sample is None else legend(facts.sample),
        per_page=PER_PAGE,
        classes=shade_class,
        repeat=repeat(facts),
        versions=_strings(facts.info.get("versions")),
        hardware=_strings(facts.info.get("hardware")),
        data=Markup(embedded(facts.sample)),
        style=Markup(style),
        script=Markup(script),
        policy=Markup(policy(style, script)),
    )


def templates(folder: Path) -> Environment:
    """The templates of a folder: every value is escaped, and made safe to show."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )


def policy(style: str, script: str) -> str:
    """The Content-Security-Policy: nothing but data URIs for pictures, and our own two blocks by their hashes."""

    def hashed(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii") + "'"

    return (
        f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(sample: Sample | None) -> str:
    """The sample as JSON that is safe within a script element: ASCII alone, without <, > and &."""

    def plain(row: Row, origin: str) -> dict[str, Any]:
        return {
            "origin": origin,
            "number": row.number,
            "rank": row.rank,
            "reward": None if row.reward is None else float(f"{row.reward:.4g}"),
            "prompt": visible(row.prompt),
            "pieces": [
                [visible(piece.text), None if piece.reward is None else float(f"{piece.reward:.3g}"), piece.shade]
                for piece in row.pieces
            ],
        }

    rows = []
    if sample is not None:
        rows = [plain(row, "trained") for row in sample.rows] + [plain(row, "control") for row in sample.control]
    text = json.dumps({"perPage": PER_PAGE, "rows": rows}, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def state(facts: Facts) -> dict[str, str]:
    """The verdict in words: `kind` (good, bad, open), `title`, `text`."""
    verify = command("verify", facts.path, metric=metric_file(facts))
    done, steps = len(facts.rows), facts.setting("steps", "?")
    if not facts.finished:
        text = f"{done} of {steps} outer steps are logged. Nothing below is a result yet."
        return {"kind": "open", "title": "This run is not finished", "text": text}
    verdict = facts.verdict
    if verdict is None:
        text = (
            "The figures below are the engine's own. That command confirms or refutes them by stock PyTorch alone, with the "
            "untrained generator's data as control."
        )
        return {"kind": "open", "title": f"Not verified yet: {verify}", "text": text}
    if not verdict.current:
        text = f"The dataset has changed since it was verified ({verdict.when}). Verify it again: {verify}"
        return {"kind": "open", "title": "Not verified: the verdict is of another dataset", "text": text}
    if verdict.verified:
        text = (
            "The dataset shows the effect by means independent of the engine; the untrained generator's data does not."
        )
        return {"kind": "good", "title": "Verified", "text": text}
    return {"kind": "bad", "title": "Not verified", "text": verdict.reason + "."}


def comparison(data: Any, control: Any) -> list[list[str]]:
    """Rows of (measure, this data, untrained generator's data) from two flat mappings of numbers or texts."""
    if not isinstance(data, Mapping):
        return []
    control = control if isinstance(control, Mapping) else {}
    return [
        [_measure_name(str(name)), _cell(value), _cell(control[name]) if name in control else "\u2013"]
        for name, value in data.items()
    ]


def stock_comparison(facts: Facts) -> list[list[str]]:
    """The same rows from the details of the verification."""
    if facts.verdict is None:
        return []
    details = facts.verdict.details
    rows = comparison(_reading(details.get("data")), _reading(details.get("control")))
    before, saved = details.get("before"), details.get("saved")
    if isinstance(before, Mapping):
        rows += [[f"{_measure_name(str(name))} before fine-tuning", _cell(v), _cell(v)] for name, v in before.items()]
    if isinstance(saved, Mapping):
        rows += [[f"{_measure_name(str(name))} of target/ as saved", _cell(v), "\u2013"] for name, v in saved.items()]
    return rows


def _reading(data: Any) -> Any:
    """What one training gave, flat: its measures, and of the \u03a6 of its quarters the least and the greatest."""
    if not isinstance(data, Mapping):
        return data
    flat: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            flat |= value
        elif isinstance(value, list) and value and all(isinstance(number, float) for number in value):
            flat[name] = f"{_cell(min(value))} to {_cell(max(value))}"
        else:
            flat[name] = value
    return flat


def asked(facts: Facts) -> list[tuple[str, str]]:
    """What was asked for, as terms and their values."""
    models, steps = facts.setting("models", {}), facts.setting("steps", "?")
    prompts, group = facts.setting("prompts.per_step", 0), facts.setting("rollout.group_size", 0)
    count = prompts * group if isinstance(prompts, int) and isinstance(group, int) else "?"
    pairs = [("Task", facts.task)]
    if facts.effect:
        pairs.append(("The data is for", facts.effect))
    if isinstance(models, Mapping):
        for role in ("generator", "target"):
            if role in models:
                init = models.get(f"{role}_init", "")
                pairs.append((role.capitalize(), f"{models[role]}" + (f" ({init} weights)" if init else "")))
    inner = f"{facts.setting('inner.optimizer')}, learning rate {_cell(facts.setting('inner.lr'))}"
    pairs += [
        ("Training", f"{steps} outer steps of {count} completions, seed {facts.setting('seed', 0)}"),
        ("Inner run", inner),
        ("Credit", str(facts.setting("credit.mode"))),
    ]
    return pairs


def metric_file(facts: Facts) -> str:
    """The file of a custom metric, which every command must be given again; empty for any other metric."""
    path = str(facts.setting("metric.path", ""))
    return path if ".py:" in path else ""


def repeat(facts: Facts) -> list[tuple[str, str]]:
    """Commands, as (what for, command)."""
    again = shlex.join(["--metric", metric_file(facts)]) + " " if metric_file(facts) else ""
    lines = [
        (
            "Run it again with the same settings",
            f"dpg run --config {shlex.quote(facts.path + '/config.toml')} {again}--out again",
        )
    ]
    if facts.finished:
        lines.append(("Check the effect by stock PyTorch", command("verify", facts.path, metric=metric_file(facts))))
    lines.append(("Write this page anew", command("report", facts.path)))
    if facts.command:
        lines.insert(0, ("The command of this run", facts.command))
    return lines


def legend(sample: Sample) -> list[tuple[str, str]]:
    """The shades from most negative to most positive: class and the rewards that it stands for."""
    if sample.scale <= 0:
        return []
    step = sample.scale / SHADES
    rows = []
    for number in range(-SHADES, SHADES + 1):
        if abs(number) == SHADES:
            edge = short(float(f"{(SHADES - 0.5) * step:.2g}"))
            text = f"\u2265 {edge}" if number > 0 else f"\u2264 \u2212{edge}"
        else:
            text = short(float(f"{number * step:.2g}"))
        rows.append((shade_class(number), text))
    return rows


def shade_class(number: int) -> str:
    """The style-sheet class of a shade: n5 … n1, z, p1 … p5."""
    return "z" if number == 0 else f"{'p' if number > 0 else 'n'}{abs(number)}"


def _measure_name(name: str) -> str:
    return _NAMES.get(name, name.replace("_", " "))


def _cell(value: Any) -> str:
    """A value of a table."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return short(value, 6) if abs(value) < 1e300 else str(value)
    return str(value)


def _strings(mapping: Any) -> list[tuple[str, str]]:
    return [(str(key), str(value)) for key, value in mapping.items()] if isinstance(mapping, Mapping) else []
