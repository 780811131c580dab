"""Reading scores back: what `dpg attribute` wrote, of one query or of several, from any of its formats of rows."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.attribution.scores import record_of
from dpg_cli.errors import UsageError

Row = dict[str, Any]
LISTS = ("token_ids", "tokens", "token_scores")
AT_ONCE = 1000
MANY = "query"  # the column that scores of several queries have


@dataclass(frozen=True)
class Asked:
    """A query of some scores.

    Attributes:
        name: in words.
        before, after: Φ before and after the fine-tuning; None where the record is lost.
    """

    name: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Table:
    """Scores of N rows by Q queries.

    Attributes:
        path: of the file.
        record: how they were made; empty where that is lost.
        queries: Q of them.
        ids_N: the number of each row in its source.
        scores_Q_N: ∂Φ/∂w, float64.
        texts: what is trained on; empty texts where the file has none.
    """

    path: Path
    record: dict[str, Any]
    queries: list[Asked]
    ids_N: np.ndarray
    scores_Q_N: np.ndarray
    texts: list[str]

    def tokens(self, rows: Sequence[int]) -> Iterator[tuple[int, list[str], dict[int, list[float]]]]:
        """Tokens of some rows.

        Args:
            rows: their places, sorted.

        Yields:
            Place, texts of its tokens (empty where the file has none), and for each query that the file holds here the
            scores of them. A row comes once for each of the file's rows that tells of it.
        """
        wanted, count = set(rows), len(self.ids_N)
        names = {query.name: number for number, query in enumerate(self.queries)}
        for number, row in enumerate(_rows(self.path, ("query", "tokens", "token_scores"))):
            place = number % count
            if place in wanted:
                query = names.get(row.get(MANY) or "", 0)
                yield place, row.get("tokens") or [], {query: row.get("token_scores") or []}


def place_of_validation(scores: Path) -> Path:
    """Where the verdict of retraining on some scores lies."""
    return scores.with_name(f"{scores.name}.validation.json")


def read_scores(path: Path) -> Table:
    """Read a scores file, all but its tokens.

    Raises:
        UsageError: if it is none, or a damaged one.
    """
    if not path.is_file():
        raise UsageError(f"There are no scores {path}.", "Name a file that `dpg attribute` wrote.")
    if path.suffix.lower() == ".safetensors":
        raise UsageError(f"{path} holds tensors without texts.", "Let --out of the attribution end in .parquet.")
    names: list[str] = []
    ids: list[int] = []
    scores: list[float] = []
    texts: list[str] = []
    for row in _rows(path, ("query", "example_id", "score", "text")):
        number, score, text = row.get("example_id"), row.get("score"), row.get("text")
        name = row.get(MANY) or ""
        if not isinstance(number, int) or not isinstance(score, float) or not np.isfinite(score):
            raise UsageError(f"{path} is no scores file: a row has no example_id and score.", "Name another.")
        if not names or name != names[-1]:
            names.append(name)
        ids.append(number)
        scores.append(score)
        texts.append(text if isinstance(text, str) else "")
    count = len(ids) // max(1, len(names))
    whole = np.array(ids, dtype=np.int64)
    if not ids or len(ids) != count * len(names) or (whole.reshape(len(names), -1) != whole[:count]).any():
        raise UsageError(f"{path} is no whole scores file.", "Run `dpg attribute` again.")
    record = _record(path)
    scores_Q_N = np.array(scores).reshape(len(names), count)
    return Table(path, record, _queries(names, record), whole[:count], scores_Q_N, texts[:count])


def _queries(names: list[str], record: dict[str, Any]) -> list[Asked]:
    """The queries with what the record says of them."""
    if len(names) == 1 and not isinstance(record.get("queries"), list):
        said = record.get("about") or names[0] or "the metric"
        return [Asked(str(said), _number(record.get("phi_before")), _number(record.get("phi")))]
    known = {entry.get("name"): entry for entry in record.get("queries") or [] if isinstance(entry, dict)}
    return [
        Asked(name, _number(known.get(name, {}).get("phi_before")), _number(known.get(name, {}).get("phi")))
        for name in names
    ]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _record(path: Path) -> dict[str, Any]:
    """The record beside the scores, or in them; empty where neither is there."""
    place = record_of(path)
    try:
        if place.is_file():
            found = json.loads(place.read_text(encoding="utf-8"))
        else:
            held = pq.read_schema(path).metadata if path.suffix.lower() == ".parquet" else None
            found = json.loads((held or {}).get(b"dpg", b"{}"))
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file with these columns, where it has them.

    Raises:
        UsageError: if it cannot be read.
    """
    kinds = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}
    read = kinds.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"{path} ends in none of {', '.join(kinds)}.", "Name a file that `dpg attribute` wrote.")
    try:
        yield from read(path, columns)
    except (OSError, ValueError, KeyError, RecursionError, csv.Error, pa.ArrowException) as error:
        reason = str(error).strip("'\"").rstrip(".").partition("\n")[0]
        raise UsageError(f"{path} cannot be read as scores: {reason}.", "Run `dpg attribute` again.") from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(AT_ONCE, columns=there, use_threads=False):
            yield from batch.to_pylist()


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("a line is no object")
            yield {name: row.get(name) for name in columns}


def _csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {name: _cell(name, row[name]) for name in columns if row.get(name) is not None}


def _cell(name: str, text: str) -> Any:
    if name in LISTS:
        return json.loads(text)
    return int(text) if name == "example_id" else float(text) if name == "score" else text
