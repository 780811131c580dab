"""Fine-tuning as anybody would write it: stock PyTorch on an exported dataset. Nothing here imports the engine.

A step of any size is taken in micro-batches, whose losses are sums over one normaliser: gradient accumulation, exact but for
rounding. Memory is the model's, the optimiser's, four bytes a token of the dataset and one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.settings.config import Config, InnerConfig

ROWS_AT_ONCE = 256  # most rows of a micro-batch
# Most numbers that its logits may be. On the CPU 16 MB in float32, which the allocator keeps (a third faster than larger ones).
LOGITS_AT_ONCE = {"cpu": 1 << 22}
LOGITS_ELSEWHERE = 1 << 26  # with their gradient and log-softmax about 1 GB in float32

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}

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


def require_stock_optimizer(inner: InnerConfig) -> None:
    """Refuse optimiser settings that stock PyTorch lacks.

    Raises:
        UsageError: for Adam, AdamW and Muon (whose rest goes by AdamW) with ε_root > 0.
    """
    if inner.optimizer != "sgd" and inner.eps_root > 0:
        name = ADAMS.get(inner.optimizer, torch.optim.AdamW).__name__
        raise UsageError(
            f"inner.eps_root = {inner.eps_root:g} is not a setting of torch.optim.{name}.",
            "Only runs with inner.eps_root = 0 can be verified by stock PyTorch.",
        )


class MuonAndAdamW:
    """torch.optim.Muon for the matrices within the model, AdamW for embeddings, head, norms and biases."""

    def __init__(self, model: PreTrainedModel, inner: InnerConfig) -> None:
        outer = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        outer |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in outer]
        rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in outer]
        shared: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
        muon = torch.optim.Muon(
            hidden, momentum=inner.momentum, nesterov=inner.nesterov, adjust_lr_fn=inner.adjust_lr,
            ns_steps=inner.ns_steps, **shared,
        )  # fmt: skip
        self.both = muon, torch.optim.AdamW(rest, betas=(inner.beta1, inner.beta2), eps=inner.eps, **shared)

    def zero_grad(self) -> None:
        """Of both."""
        for one in self.both:
            one.zero_grad()

    def step(self) -> None:
        """Of both."""
        for one in self.both:
            one.step()


def stock_optimizer(model: PreTrainedModel, inner: InnerConfig) -> torch.optim.Optimizer | MuonAndAdamW:
    """The optimiser of these settings as torch has it."""
    if inner.optimizer == "muon":
        return MuonAndAdamW(model, inner)
    shared: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
    if inner.optimizer in ADAMS:
        return ADAMS[inner.optimizer](model.parameters(), betas=(inner.beta1, inner.beta2), eps=inner.eps, **shared)
    return torch.optim.SGD(model.parameters(), momentum=inner.momentum, nesterov=inner.nesterov, **shared)


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
    return target, fine_tune(target.model, sequences, config.inner, config.inner_steps, progress)


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
    steps: int,
    progress: Progress = silent,
) -> int:
    """Ordinary supervised fine-tuning: next-token loss, each sequence used once.

    Args:
        model: changed in place.
        sequences: token ids, every token after the first is a label.
        inner: optimiser settings; the loss is the mean over the batch's tokens, or over all its places ("example").
        steps: the sequences are split into this many batches of equal size.
        progress: called after each micro-batch.

    Returns:
        The number of optimiser steps taken.
    """
    optimizer = stock_optimizer(model, inner)
    longest = inner.max_length or (max(map(len, sequences)) if len(sequences) else 0)
    size = -(-len(sequences) // steps)
    taken = 0
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        tokens = sum(map(len, batch)) - len(batch)
        total = tokens if inner.normalization == "token" else len(batch) * longest
        optimizer.zero_grad()
        for done in accumulate(model, batch, total):
            progress(start + done, len(sequences))
        optimizer.step()
        taken += 1
    return taken


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
