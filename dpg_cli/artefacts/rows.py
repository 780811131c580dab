"""The rows of a run's dataset: their columns, the mark that they carry, and reading them in bounded memory.

Free of torch, so that `dpg inspect` and `dpg export` answer at once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.errors import UsageError

Source = Literal["train", "control"]
SOURCES: tuple[Source, ...] = ("train", "control")
ROWS_AT_ONCE = 2048  # of a parquet row group, and of everything that streams

# The mark in the schema of every parquet and Arrow file that dpg writes.
MARK = {b"dpg": json.dumps({"synthetic": True, "purpose": "steering a model", "card": "README.md"}).encode()}
# The mark in the `provenance` column of every exported row.
PROVENANCE: dict[Source, str] = {
    "train": "synthetic text, made by dpg to steer a model",
    "control": "synthetic text, made by dpg: control, from the untrained generator",
}

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("input_ids", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("token_rewards", pa.list_(pa.float32())),
    ],
    metadata=MARK,
)
REQUIRED = {"prompt": pa.types.is_string, "text": pa.types.is_string, "reward": pa.types.is_floating}


REMEDY = "Take it from a copy of the run, or run again."


def outline(path: Path) -> tuple[int, pa.Schema]:
    """Number of rows and schema of a dataset's parquet file, from its footer alone.

    Raises:
        UsageError: if it is missing, cut short or damaged, or lacks the columns prompt, text and reward.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing.", REMEDY)
    with _one_line(path), pq.ParquetFile(path) as file:
        rows, schema = file.metadata.num_rows, file.schema_arrow
    for name, fits in REQUIRED.items():
        place = schema.get_field_index(name)
        if place < 0 or not fits(schema.field(place).type):
            raise UsageError(f"{path} is no dataset of dpg: it has no proper column {name!r}.", REMEDY)
    return rows, schema


def batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a dataset in order, at most `ROWS_AT_ONCE` at a time.

    Raises:
        UsageError: where the file is damaged.
    """
    with _one_line(path):
        file = pq.ParquetFile(path)
        stream = file.iter_batches(ROWS_AT_ONCE, columns=columns, use_threads=False)
    with file:
        while True:
            with _one_line(path):
                batch = next(stream, None)
                if batch is not None:
                    batch.validate(full=True)  # strings that are no UTF-8 would fail somewhere later
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever is wrong with a parquet file becomes one line."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path} cannot be read: {reason[:200].rstrip('.')}.", REMEDY) from None


def plain_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns of numbers, strings and lists of these: what every format can hold."""

    def plain(kind: pa.DataType) -> bool:
        if pa.types.is_list(kind):
            return plain(kind.value_type)
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        return number or pa.types.is_string(kind) or pa.types.is_boolean(kind)

    return [field.name for field in schema if plain(field.type) and field.name != "provenance"]


def reward_column(path: Path) -> np.ndarray:
    """The rewards of all rows, float64; NaN where there is none."""
    # By way of lists: pyarrow's own ways to numpy import pandas first, which takes longer than the rest.
    parts = [np.array(batch.column(0).to_pylist(), dtype=np.float64) for batch in batches(path, ["reward"])]
    return np.concatenate(parts) if parts else np.zeros(0)
