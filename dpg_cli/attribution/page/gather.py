"""From a scores file to the facts that its page shows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpg_cli.attribution.page.fold import folded
from dpg_cli.attribution.reading import place_of_validation, read_scores
from dpg_cli.report.samples import extreme, shade

SHOWN = 4000  # rows with their tokens, of all queries together
LEAST, MOST = 25, 200  # of each end of a query's ranking
CHARACTERS = 4000  # of a text; the rest is cut


@dataclass(frozen=True)
class Query:
    """One question that was put to the fine-tuning.

    Attributes:
        name: in words.
        before, after: Φ before and after fine-tuning; None where the record does not say.
        tokens: of the rows at both ends of its ranking: pieces of text with their scores and shades.
        validation: what retraining said of its scores, see `attribution/validation.py`; None where it was not asked.
    """

    name: str
    before: float | None
    after: float | None
    tokens: dict[int, list[tuple[str, float, int]]]
    validation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Facts:
    """What the page of a scores file shows.

    Attributes:
        path: the scores.
        record: how they were made; empty where that is lost.
        queries: what was asked.
        ids_N: the number of each row in its source.
        scores_Q_N: ∂Φ/∂w of each row.
        texts: what is trained on.
        stands_N: the row that stands for each, see `folded`.
        remedy: what a validation that found the scores wanting says to do; else empty.
        selections: data that was made by these scores: name, rows, what was predicted of it and what came.
    """

    path: Path
    record: dict[str, Any]
    queries: list[Query]
    ids_N: np.ndarray
    scores_Q_N: np.ndarray
    texts: list[str]
    stands_N: np.ndarray
    selections: list[dict[str, Any]]
    remedy: str


def gather(path: Path) -> Facts:
    """Read a scores file.

    Raises:
        UsageError: if it is none.
    """
    table = read_scores(path)
    each = max(LEAST, min(MOST, SHOWN // (2 * len(table.queries))))
    orders = [np.argsort(scores_N, kind="stable") for scores_N in table.scores_Q_N]
    ends = [{*order[:each].tolist(), *order[-each:].tolist()} for order in orders]
    pieces = [dict[int, list[tuple[str, float]]]() for _ in ends]
    words: dict[int, list[str]] = {}
    for row, said, scores in table.tokens(sorted({row for rows in ends for row in rows})):
        words[row] = said or words.get(row, [])
        for query, scores_S in scores.items():
            if row in ends[query]:
                pieces[query][row] = list(zip(words[row], scores_S, strict=False))
    texts = [cut(text) for text in table.texts]
    stands_N = folded(texts, {row for rows in ends for row in rows})
    judged, remedy = validation(path)
    queries = [
        Query(query.name, query.before, query.after, shaded(own), judged.get(query.name))
        for query, own in zip(table.queries, pieces, strict=True)
    ]
    return Facts(path, table.record, queries, table.ids_N, table.scores_Q_N, texts, stands_N, selections(path), remedy)


def validation(scores: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """What retraining said of each query's scores, and the remedy; nothing where it was not asked, or of older scores."""
    place = place_of_validation(scores)
    try:
        if place.stat().st_mtime < scores.stat().st_mtime:
            return {}, ""
        found = json.loads(place.read_text(encoding="utf-8"))
        known = {
            score["query"]: {
                **{key: float(score[key]) for key in ("lds", "low", "high", "slope")},
                "share": float(found["share"]),
                "points": [[float(x), float(y)] for x, y in zip(score["predicted"], score["measured"], strict=True)],
            }
            for score in found["scores"]
        }
        return known, str(found["remedy"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}, ""


def selections(scores: Path) -> list[dict[str, Any]]:
    """What `dpg select` made by these scores, of the records that lie beside them or in the working folder."""
    found = []
    for place in sorted({path.resolve() for at in (scores.parent, Path()) for path in at.glob("*.selection.json")}):
        try:
            made = json.loads(place.read_text(encoding="utf-8"))
            if Path(made["scores"]).resolve() != scores.resolve():
                continue
            came = {query["name"]: query["measured"] for query in made.get("verdict", {}).get("queries", [])}
            changes = [(name, float(change), came.get(name)) for name, change in made["predicted"].items()]
            name = place.name.removesuffix(".selection.json")
            found.append({"name": name, "kept": int(made["kept"]), "rows": int(made["rows"]), "changes": changes})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # no record of ours
    return found


def cut(text: str) -> str:
    """A text of a length that a page can show."""
    return text if len(text) <= CHARACTERS else text[:CHARACTERS] + " … (cut here)"


def shaded(rows: dict[int, list[tuple[str, float]]]) -> dict[int, list[tuple[str, float, int]]]:
    """Pieces with their shades, on one scale for all rows of a query."""
    scale = extreme([score for row in rows.values() for _, score in row])
    return {number: [(text, score, shade(score, scale)) for text, score in row] for number, row in sorted(rows.items())}
