"""The scores that an attribution leaves, and the record of how they were made.

One metric: a row an example, in the order of the data. Several: a row a query and example, query after query, with texts in
the rows of the first. As safetensors: tensors of all of them. The format goes by the file's ending. The record lies beside the scores as JSON
(`scores.parquet.json`), and in a parquet or safetensors file's own metadata too (key `dpg`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import Tensor

from dpg_cli.data.tokens import Tokens
from dpg_cli.errors import UsageError
from dpg_cli.runs.files import replacing, write_json

ROWS_AT_ONCE = 1000
SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("trained_tokens", pa.int32()),
        ("cut", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float32())),
    ]
)
MANY = pa.schema(
    [
        ("query", pa.string()),
        ("example_id", pa.int64()),
        ("text", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.list_(pa.string())),
        ("token_scores", pa.list_(pa.float32())),
    ]
)
OF_TOKENS = ("tokens", "token_scores")
FORMATS = (".parquet", ".jsonl", ".csv", ".safetensors")


@dataclass(frozen=True)
class Scored:
    """One example with its metagradients: ∂Φ/∂w of the example, and of each token's loss (0 for context).

    Attributes:
        example_id: the row's number in its source.
        score: ∂Φ/∂w.
        row: its tokens.
        tokens: the text of each token by itself.
        token_scores: as many.
    """

    example_id: int
    score: float
    row: Tokens
    tokens: list[str]
    token_scores: list[float]

    def as_row(self) -> dict[str, Any]:
        """A row of the scores."""
        return {
            "example_id": self.example_id,
            "text": self.row.text,
            "score": self.score,
            "trained_tokens": sum(self.row.label),
            "cut": self.row.cut,
            "token_ids": self.row.ids,
            "tokens": self.tokens,
            "token_scores": self.token_scores,
        }


def record_of(path: Path) -> Path:
    """Where the record of some scores lies."""
    return path.with_name(f"{path.name}.json")


def check_place(path: Path, inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse a place for scores, before anything is computed.

    Args:
        path: where the scores are to go.
        inputs: files and folders that are read.
        overwrite: whether earlier scores may be replaced.

    Raises:
        UsageError: if it ends in no known format, is an input or lies in one, exists, or cannot be written to.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--out {path} ends in none of {', '.join(FORMATS)}.", "The format goes by the ending.")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"The scores cannot be written to {path}: no such file place.", "Name a file with --out.")
    for place in (path, record_of(path)):
        for read in inputs:
            inside = read.is_dir() and place.resolve().is_relative_to(read.resolve())
            if inside or (place.exists() and read.exists() and place.samefile(read)):
                raise UsageError(f"--out {path} would write onto {read}, which is read.", "Name another file.")
        if (place.exists() or place.is_symlink()) and not overwrite:
            raise UsageError(f"{place} exists already.", "Name another file with --out, or add --overwrite.")


def write_scores(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, record: dict[str, Any]) -> None:
    """Write scores and their record, each whole or not at all.

    Args:
        path: `check_place` has passed it; not for `.safetensors`.
        rows: with the columns of the schema; they are written as they come.
        schema: `SCHEMA`, or `MANY`.
        record: how they were made, plain JSON.
    """
    write = {".parquet": _parquet, ".jsonl": _json_lines, ".csv": _csv}[path.suffix.lower()]
    with replacing(path) as temporary:
        write(temporary, rows, schema, record)
    write_json(record_of(path), record)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Write scores as tensors, and their record.

    Args:
        path: `check_place` has passed it.
        tensors: `scores` (Q, N), `token_scores` (Q, N, S) and `token_ids` (N, S), 0 where padded, `example_ids` (N,) and
            `lengths` (N,).
        record: how they were made, plain JSON.
    """
    with replacing(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"dpg": json.dumps(record)}
        )
    write_json(record_of(path), record)


def _parquet(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, record: dict[str, Any]) -> None:
    schema = schema.with_metadata({b"dpg": json.dumps(record).encode()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                batch = []
        writer.write_table(pa.Table.from_pylist(batch, schema=schema))


def _json_lines(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, record: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(path: Path, rows: Iterator[dict[str, Any]], schema: pa.Schema, record: dict[str, Any]) -> None:
    """Lists are JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, schema.names, lineterminator="\n")
        table.writeheader()
        for row in rows:
            values = row.items()
            table.writerow({k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else v for k, v in values})
