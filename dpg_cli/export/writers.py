"""The formats of an exported dataset. Each writer takes record batches as they come and keeps none of them."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.artefacts.rows import MARK
from dpg_cli.errors import UsageError

SUFFIXES = {"jsonl": (".jsonl",), "chat": (".jsonl",), "parquet": (".parquet",), "datasets": ()}
FORMATS = tuple(SUFFIXES)


class Writer(Protocol):
    """Writes the rows of one split."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class JsonLines:
    """A JSON object a line, with all columns.

    Args:
        path: the file.
        schema: of the batches.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.file = path.open("w", encoding="utf-8", newline="\n")

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        for row in batch.to_pylist():
            self.file.write(json.dumps(self.row(row), ensure_ascii=False, allow_nan=False) + "\n")

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a line holds; JSON knows no NaN and no infinity."""
        return {key: _finite(value) for key, value in row.items()}


class Chat(JsonLines):
    """Conversations: `messages` of a user (the prompt) and an assistant (the completion), a JSON object a line.

    What TRL's `SFTTrainer` and `apply_chat_template` of transformers read as it is.
    """

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The conversation, with what remains of the row's own columns."""
        messages = [
            {"role": role, "content": row[name] or ""} for role, name in (("user", "prompt"), ("assistant", "text"))
        ]
        rest: dict[str, Any] = {key: _finite(row[key]) for key in ("example_id", "reward", "provenance") if key in row}
        return {"messages": messages, **rest}


class Parquet:
    """Parquet with all columns; the schema's metadata carry the mark.

    Args:
        path: the file.
        schema: of the batches.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.file = pq.ParquetWriter(path, schema, compression="zstd")

    def __enter__(self) -> Parquet:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        if batch.num_rows:
            self.file.write_batch(batch)


class ArrowStream:
    """An Arrow stream on the disk, from which `save_datasets` makes a `datasets` folder.

    Args:
        path: the file.
        schema: of the batches.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.sink = pa.OSFile(str(path), "wb")
        self.file = pa.ipc.new_stream(self.sink, schema)

    def __enter__(self) -> ArrowStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sink.close()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add rows."""
        if batch.num_rows:
            self.file.write_batch(batch)


WRITERS: dict[str, type[Any]] = {"jsonl": JsonLines, "chat": Chat, "parquet": Parquet, "datasets": ArrowStream}


def require_datasets() -> Any:
    """The `datasets` library.

    Raises:
        UsageError: if it is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "--format datasets needs the library `datasets`.", "Install it: pip install 'dpg-cli[datasets]'"
        ) from None
    return datasets


def save_datasets(streams: dict[str, Path], folder: Path, words: str) -> None:
    """Make what `datasets.load_from_disk` loads: a Dataset, or a DatasetDict where there are several splits.

    The streams are memory-mapped, not read; equal rows give equal files.

    Args:
        streams: Arrow streams by split.
        folder: where to.
        words: description that the dataset carries.
    """
    datasets = require_datasets()
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        parts = {}
        for split, path in streams.items():
            table = datasets.table.MemoryMappedTable.from_file(str(path))
            features = datasets.Features.from_arrow_schema(table.schema)
            info = datasets.DatasetInfo(description=words, features=features)
            named = datasets.NamedSplit(split)
            with path.open("rb") as file:  # `datasets` finds cached results of `map` by it
                fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            parts[split] = datasets.Dataset(table, info=info, split=named, fingerprint=fingerprint)
        if len(parts) == 1:
            next(iter(parts.values())).save_to_disk(str(folder))
        else:
            datasets.DatasetDict(parts).save_to_disk(str(folder))
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def exported_schema(schema: pa.Schema, columns: list[str]) -> pa.Schema:
    """The columns of an export: those of the run's file, and `provenance`; the mark in its metadata."""
    fields = [schema.field(name) for name in columns]
    return pa.schema([*fields, pa.field("provenance", pa.string())], metadata=MARK)


def _finite(value: Any) -> Any:
    """None in the place of numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [_finite(item) for item in value] if isinstance(value, list) else value
