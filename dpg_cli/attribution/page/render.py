"""From facts to the page: one file that asks for nothing from outside and stays quick with 100,000 rows.

What a query, a block of texts or a query's tokens need is packed (gzip, base64) in a block of its own, which the script opens
when it is looked at. Everything of the user's is escaped or reaches the page as text; see `report/page.py` for the policy.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from dpg_cli import __version__, report
from dpg_cli.attribution.page.gather import Facts, Query
from dpg_cli.data.sources import files_of
from dpg_cli.escape import pasted
from dpg_cli.report.page import policy, templates
from dpg_cli.report.text import visible

_HERE = Path(__file__).parent
TEXTS = 500  # of a block
PER_PAGE = 10


@dataclass(frozen=True)
class Block:
    """A packed part of the page's data.

    Attributes:
        name: its element's id.
        data: base64 of gzip of JSON or of an array's bytes.
    """

    name: str
    data: Markup


def render(facts: Facts, place: Path) -> str:
    """The page as HTML text.

    Args:
        facts: what it shows.
        place: where it will lie; the source of the rows is linked from there.
    """
    style = "\n".join((at / "style.css").read_text(encoding="utf-8") for at in (Path(report.__file__).parent, _HERE))
    script = (_HERE / "browse.js").read_text(encoding="utf-8")
    return (
        templates(_HERE)
        .get_template("page.html")
        .render(
            title=facts.path.name,
            version=__version__,
            count=len(facts.ids_N),
            queries=facts.queries,
            facts=made(facts),
            notes=[str(note) for note in facts.record.get("notes") or []],
            selections=facts.selections,
            remedy=facts.remedy,
            validated=any(query.validation for query in facts.queries),
            select=[
                f"dpg select {pasted(facts.path)} --drop 50",
                f"dpg select {pasted(facts.path)} --drop 50 --side helpful",
            ],
            blocks=list(blocks(facts, place)),
            style=Markup(style),
            script=Markup(script),
            policy=Markup(policy(style, script)),
        )
    )


def made(facts: Facts) -> list[tuple[str, str]]:
    """How the scores were made, as terms and values."""
    record = facts.record
    data, recipe, target = (
        found if isinstance(found := record.get(name), dict) else {} for name in ("data", "recipe", "target")
    )
    shown = ("optimizer", "lr", "schedule", "batch_size", "epochs", "eps", "max_grad_norm", "order")
    made_of = record.get("fingerprint") if isinstance(record.get("fingerprint"), dict) else {}
    rows = [
        ("Data", " · ".join(str(data[key]) for key in ("source", "shape") if data.get(key))),
        ("Rows", f"{len(facts.ids_N):,}"),
        ("Target", str(target.get("target", ""))),
        ("Weights", str((made_of or {}).get("weights", ""))[:16]),
        ("Recipe", ", ".join(f"{key} = {recipe[key]}" for key in shown if recipe.get(key) not in (None, "", 0))),
        ("Optimiser steps", str(record.get("inner_steps", ""))),
        ("Seed", str(record.get("seed", ""))),
        ("dpg", str(record.get("dpg", ""))),
    ]
    return [(term, value) for term, value in rows if value]


def blocks(facts: Facts, place: Path) -> Iterator[Block]:
    """All packed parts."""
    yield _json("about", {"perPage": PER_PAGE, "texts": TEXTS, "count": len(facts.ids_N), **source(facts, place),
                          "queries": [_query(query) for query in facts.queries]})  # fmt: skip
    yield _array("ids", facts.ids_N.astype("<i4") if abs(facts.ids_N).max() < 2**31 else facts.ids_N.astype("<f8"))
    yield _array("stands", facts.stands_N.astype("<i4"))
    for number, query in enumerate(facts.queries):
        yield _array(f"scores-{number}", facts.scores_Q_N[number].astype("<f4"))
        yield _json(f"tokens-{number}", _tokens(query))
    for start in range(0, len(facts.texts), TEXTS):
        yield _json(f"texts-{start // TEXTS}", [visible(text) for text in facts.texts[start : start + TEXTS]])


def source(facts: Facts, place: Path) -> dict[str, Any]:
    """The file of the rows as a link from the page; empty where it is no one local file."""
    data = facts.record.get("data")
    name = data.get("source", "") if isinstance(data, dict) else ""
    files = files_of(name) if isinstance(name, str) and name else []
    if len(files) != 1 or not files[0].is_file():
        return {"source": "", "href": ""}
    here = os.path.relpath(files[0].resolve(), place.resolve().parent)
    link = "/".join(map(quote, Path(here).parts))
    return {"source": files[0].name, "href": link}


def _query(query: Query) -> dict[str, Any]:
    shown = {"name": visible(query.name), "before": query.before, "after": query.after}
    return {**shown, "validation": query.validation}


def _tokens(query: Query) -> dict[str, Any]:
    return {
        str(row): [[visible(text), float(f"{score:.3g}"), shade] for text, score, shade in pieces]
        for row, pieces in query.tokens.items()
    }


def _json(name: str, value: Any) -> Block:
    return _packed(name, json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())


def _array(name: str, values: np.ndarray) -> Block:
    return _packed(name, np.ascontiguousarray(values).tobytes())


def _packed(name: str, data: bytes) -> Block:
    packed = gzip.compress(data, compresslevel=6, mtime=0)
    return Block(name, Markup(base64.b64encode(packed).decode("ascii")))
