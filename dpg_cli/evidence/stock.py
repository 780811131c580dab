"""Fine-tuning as anybody would write it: stock PyTorch on an exported dataset. Nothing here imports the engine.

A step of any size is taken in micro-batches, whose losses are sums over one normaliser: gradient accumulation, exact but for
rounding. Memory is the model's, the optimiser's, four bytes a token of the dataset and one micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.errors import UsageError
from dpg_cli.evidence.stock_recipe import stock_optimizers, stock_order, stock_schedule
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.settings.config import Config
from dpg_cli.settings.inner import InnerConfig

ROWS_AT_ONCE = 256  # most rows of a micro-batch
# Most numbers that its logits may be. On the CPU 16 MB in float32, which the allocator keeps (a third faster than larger ones).
LOGITS_AT_ONCE = {"cpu": 1 << 22}
LOGITS_ELSEWHERE = 1 << 26  # with their gradient and log-softmax about 1 GB in float32

Progress = Callable[[int, int], None]  # examples done, of how many


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


@dataclass(frozen=True)
class Watcher:
    """Who is told how far a verification is.

    Attributes:
        stage: called with the name of each stage that begins.
        progress: called within a stage.
    """

    stage: Callable[[str], None] = lambda name: None
    progress: Progress = silent


UNWATCHED = Watcher()


def trained_target(
    config: Config, data: Path, device: torch.device, progress: Progress = silent
) -> tuple[LanguageModel, int, int]:
    """A fresh target after fine-tuning on a parquet file with the run's recipe.

    Returns:
        The target, the number of examples and of optimiser steps.
    """
    sequences = read_input_ids(data)
    target, steps = train_fresh(config, sequences, device, progress)
    return target, len(sequences), steps


def train_fresh(
    config: Config, sequences: Sequence[Sequence[int] | np.ndarray], device: torch.device, progress: Progress = silent
) -> tuple[LanguageModel, int]:
    """A fresh target after fine-tuning on token sequences with the run's recipe, and the optimiser steps it took."""
    target = load_target(config.models, device)
    each = config.inner.steps_of_epoch(config.examples_per_step)
    return target, fine_tune(target.model, sequences, config.inner, each, progress, config.seed)


def read_input_ids(path: Path) -> list[np.ndarray]:
    """The `input_ids` column of a parquet file: an int32 array for each row, views of a few large ones.

    Raises:
        UsageError: if there is none.
    """
    rows: list[np.ndarray] = []
    try:
        with pq.ParquetFile(path) as file:
            if "input_ids" not in file.schema_arrow.names:
                raise KeyError("it has no column input_ids")
            for batch in file.iter_batches(columns=["input_ids"], use_threads=False):
                column = batch.column(0)
                if not pa.types.is_list(column.type) or column.null_count or column.flatten().null_count:
                    raise KeyError("input_ids are no lists of numbers")
                ends = column.value_lengths().to_numpy().cumsum()
                rows += np.split(column.flatten().cast(pa.int32()).to_numpy(), ends[:-1]) if len(ends) else []
    except (OSError, pa.ArrowException, KeyError) as error:
        reason = str(error).strip("'\"").rstrip(".")
        raise UsageError(f"{path} is no readable dataset: {reason}.", "Run `dpg run` again.") from None
    return rows


def fine_tune(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | np.ndarray],
    inner: InnerConfig,
    steps_of_epoch: int,
    progress: Progress = silent,
    seed: int = 0,
) -> int:
    """Ordinary supervised fine-tuning on next-token loss.

    Args:
        model: changed in place.
        sequences: token ids, every token after the first is a label.
        inner: the recipe; the loss is the mean over the batch's tokens, or over all its places ("example").
        steps_of_epoch: the sequences are split into this many batches of equal size.
        progress: called after each micro-batch.
        seed: of a shuffled order.

    Returns:
        The number of optimiser steps taken.
    """
    longest = inner.max_length or (max(map(len, sequences)) if len(sequences) else 0)
    size = -(-len(sequences) // steps_of_epoch)
    starts = range(0, len(sequences), size)
    steps = inner.max_steps or math.ceil(inner.epochs * len(starts))
    optimizers = stock_optimizers(model, inner)
    schedules = [stock_schedule(optimizer, inner, steps) for optimizer in optimizers]
    whole = sum(min(size, len(sequences) - starts[number % len(starts)]) for number in range(steps))
    order: list[int] = []
    passed = 0
    for taken in range(steps):
        epoch, start = taken // len(starts), starts[taken % len(starts)]
        if start == 0:
            order = stock_order(len(sequences), inner, seed, epoch)
        batch = [sequences[row] for row in order[start : start + size]]
        tokens = sum(map(len, batch)) - len(batch)
        total = tokens if inner.normalization == "token" else len(batch) * longest
        model.zero_grad()
        for done in accumulate(model, batch, total):
            progress(passed + done, whole)
        passed += len(batch)
        if inner.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), inner.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            if taken + 1 < steps:  # transformers' polynomial has no value after the last step
                schedule.step()
    return steps


def accumulate(model: PreTrainedModel, batch: Sequence[Sequence[int] | np.ndarray], total: int) -> Iterator[int]:
    """Add the gradient of a batch's summed loss, divided by `total`, to the parameters' `.grad`, by micro-batches.

    Args:
        model: the target.
        batch: token ids of the rows.
        total: the normaliser of the whole batch.

    Yields:
        The number of rows done so far.
    """
    at_once = rows_at_once(model, max(map(len, batch)))
    for row in range(0, len(batch), at_once):
        rows = batch[row : row + at_once]
        (_summed_loss(model, rows) / total).backward()
        yield row + len(rows)


def rows_at_once(model: PreTrainedModel, length: int) -> int:
    """Rows of a micro-batch: at most `ROWS_AT_ONCE`, fewer where rows of this length at the model's vocabulary are large."""
    head = model.get_output_embeddings().weight
    numbers = LOGITS_AT_ONCE.get(head.device.type, LOGITS_ELSEWHERE)
    return max(1, min(ROWS_AT_ONCE, numbers // (length * head.shape[0])))


def _summed_loss(model: PreTrainedModel, rows: Sequence[Sequence[int] | np.ndarray]) -> Tensor:
    """Summed next-token loss of some rows."""
    device = next(model.parameters()).device
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    labels = np.full(ids.shape, -100, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        labels[number, : max(len(row) - 1, 0)] = row[1:]
    logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits[:, :-1]
    targets = torch.from_numpy(labels[:, :-1]).to(device)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
