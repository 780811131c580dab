"""A dataset of any size on its way to the disk, row group by row group.

    parts, as they are drawn -> a draft without rewards; what the target reads -> memory -> one fine-tuning run on all of it
    draft + rewards -> the dataset

In memory stays what the fine-tuning run needs: of each token of the dataset its id, two masks, and where its credit goes
(12 bytes), and the credit itself. A draft that a killed run left behind is removed by its next session, which draws anew.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import pad

from dpg_cli.artefacts.dataset import table_of
from dpg_cli.artefacts.rows import ROWS_AT_ONCE, SCHEMA, batches
from dpg_cli.engine.generator.align import Reading, read_completions
from dpg_cli.engine.records import Examples, Metagradient, Rollout
from dpg_cli.models.loading import LanguageModel
from dpg_cli.runs.files import replacing, writing


@contextlib.contextmanager
def drafted(path: Path | None) -> Iterator[Path | None]:
    """A place for the draft of a dataset, beside it; gone afterwards. None where this process writes nothing."""
    if path is None:
        yield None
        return
    draft = path.with_name(f".{path.stem}.draft.{os.getpid()}.tmp")
    try:
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def write_draft(
    draft: Path | None, parts: Iterable[Rollout], generator: LanguageModel, target: LanguageModel, max_length: int
) -> Reading:
    """Write the rows of a dataset as they are drawn.

    Args:
        draft: where; None writes nothing.
        parts: the rollouts, in order.
        generator: its tokeniser decodes them.
        target: its tokeniser gives `input_ids`.
        max_length: longest sequence of the target, 0 for none.

    Returns:
        How the target reads all of it.
    """
    readings: list[Reading] = []
    first = 0
    with contextlib.ExitStack() as stack:
        file = None
        for rollout in parts:
            reading = read_completions(rollout, generator, target, max_length)
            if draft is not None:
                table = table_of(rollout, reading, generator, first)
                with writing(draft):
                    file = file or stack.enter_context(_writer(draft))
                    file.write_table(table, row_group_size=ROWS_AT_ONCE)
            first += len(rollout)
            # places are columns of a rollout
            kind = torch.int16 if reading.width < 2**15 else torch.int32
            readings.append(replace(reading, place_N_S=reading.place_N_S.to(kind)))
    return joined(readings)


def joined(parts: list[Reading]) -> Reading:
    """The readings of parts of a dataset as one, at the width of the widest; the list is emptied on the way."""
    width = max(part.examples.ids_N_S.shape[1] for part in parts)
    first, columns = parts[0], max(part.width for part in parts)
    tensors = [
        [part.examples.ids_N_S, part.examples.attention_N_S, part.examples.label_N_S, part.place_N_S] for part in parts
    ]
    parts.clear()

    def whole(number: int, fill: int) -> Tensor:
        rows = torch.cat([pad(part[number], (0, width - part[number].shape[1]), value=fill) for part in tensors])
        for part in tensors:
            part[number] = rows[:0]
        return rows

    examples = Examples(whole(0, 0), whole(1, 0), whole(2, 0))
    return Reading(examples, whole(3, -1), columns, first.shared, first.offset)


def write_dataset(path: Path, draft: Path, reading: Reading, result: Metagradient | None) -> None:
    """The draft with its rewards, in the place of the dataset.

    Args:
        path: the dataset.
        draft: its rows.
        reading: how the target reads them.
        result: their metagradients; None leaves rewards empty.
    """
    first = 0
    with replacing(path) as temporary, _writer(temporary) as file:
        for batch in batches(draft, SCHEMA.names):
            rows = slice(first, first + batch.num_rows)
            first = rows.stop
            file.write_batch(batch if result is None else _rewarded(batch, rows, reading, result))


def _rewarded(batch: pa.RecordBatch, rows: slice, reading: Reading, result: Metagradient) -> pa.RecordBatch:
    """Some rows with their rewards."""
    part = replace(reading, place_N_S=reading.place_N_S[rows].long())
    token_n_K = part.collect(result.token_N_S[rows]).float().cpu().numpy()
    lengths = np.array(batch.column("token_ids").value_lengths().to_pylist(), dtype=np.int64)
    mask = np.arange(token_n_K.shape[1]) < lengths[:, None]
    ends = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(pa.array(ends), pa.array(token_n_K[mask]))
    rewards = pa.array(result.example_N[rows].double().cpu().numpy())
    columns = {name: batch.column(name) for name in SCHEMA.names} | {"reward": rewards, "token_rewards": tokens}
    return pa.RecordBatch.from_arrays(
        [columns[name].cast(SCHEMA.field(name).type) for name in SCHEMA.names], schema=SCHEMA
    )


def _writer(path: Path) -> pq.ParquetWriter:
    """A parquet file of a dataset's rows."""
    return pq.ParquetWriter(path, SCHEMA, compression="zstd")
