"""Fine-tuning as anybody would write it: stock PyTorch on an exported dataset. Nothing here imports the engine.

A step of any size is taken in micro-batches, whose losses are sums over one normaliser: gradient accumulation, exact but for
rounding. Memory is the model's, the optimiser's, four bytes a token of the dataset and one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from dpg_cli.data.replay import own_rows
from dpg_cli.errors import UsageError
from dpg_cli.evidence.stock_plan import Row, StockPlan, stock_plan
from dpg_cli.evidence.stock_recipe import Average, stock_optimizers, stock_schedule
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.models.lora import Lora, adapt
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


@dataclass(frozen=True)
class StockSide:
    """Who does the stock training.

    Attributes:
        trl: TRL's SFTTrainer; else the plain loop of this module.
        about: it in words.
    """

    trl: bool = False
    about: str = "a plain loop of torch.optim"


PLAIN = StockSide()


def stock_side(config: Config, asked: str, device: torch.device) -> StockSide:
    """Who trains for a run.

    Args:
        config: its settings.
        asked: "trl", "plain", or "auto" for TRL's SFTTrainer where it is installed and can follow the recipe.
        device: where it will train.

    Raises:
        UsageError: if TRL is asked for and is not installed, or cannot follow the recipe.
    """
    if asked not in ("auto", "trl", "plain"):
        raise UsageError(f"There is no trainer {asked!r}.", "Give auto, trl or plain.")
    plain = replace(PLAIN, about=f"{PLAIN.about}{' and PEFT' if config.lora.rank else ''}")
    if asked == "plain":
        return plain
    if find_spec("trl") is None or find_spec("datasets") is None:
        if asked == "trl":
            raise UsageError("--trainer trl needs TRL, which is not installed.", "pip install 'dpg-cli[trl]'")
        return replace(plain, about=f"{plain.about} (TRL is not installed)")
    from dpg_cli.evidence.stock_trl import named, unfit, unusable

    reason = unusable() or unfit(config, device)
    if reason and asked == "trl":
        raise UsageError(f"TRL's SFTTrainer cannot follow this run: {reason}.", "--trainer plain")
    return replace(plain, about=f"{plain.about} ({reason})") if reason else StockSide(True, named())


def train_fresh(
    config: Config,
    sequences: Sequence[Sequence[int] | np.ndarray],
    device: torch.device,
    progress: Progress = silent,
    side: StockSide = PLAIN,
) -> tuple[LanguageModel, int]:
    """A fresh target after fine-tuning on token sequences with the run's recipe, and the optimiser steps it took.

    Adapters are PEFT's, made from the run's seed, and merged by PEFT afterwards.

    Args:
        config: the run's settings.
        sequences: every token after the first is a label.
        device: where to train.
        progress: of the rows.
        side: who trains.
    """
    target, inner = load_target(config.models, device), config.inner
    each = inner.steps_of_epoch(config.examples_per_step)
    replay: list[Row] = []
    if inner.replay:
        own = own_rows(inner.replay, target, inner.max_length, config.seed, config.replay_rows).rows
        replay = [Row(row.ids, row.label) for row in own]
    plan = stock_plan(sequences, inner, each, config.seed, config.examples_per_step, replay)
    model: Any = adapt(target.model, Lora.of(config.lora), config.seed) if config.lora.rank else target.model
    if side.trl:
        from dpg_cli.evidence.stock_trl import train_by_trl

        at_once = rows_at_once(model, inner.packed_rows or max((len(row.ids) for row in plan.rows), default=1))
        model = train_by_trl(model, target.tokenizer, plan, inner, config.seed, at_once, progress)
    else:
        train(model.eval(), plan, inner, progress)
    return (replace(target, model=model.merge_and_unload()) if config.lora.rank else target), len(plan.steps)


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
    plan = stock_plan(sequences, inner, steps_of_epoch, seed)
    train(model, plan, inner, progress)
    return len(plan.steps)


def train(model: PreTrainedModel, plan: StockPlan, inner: InnerConfig, progress: Progress = silent) -> None:
    """The plain loop: forward, backward, clip, step. A packed row's members are trained as the rows that they are.

    Args:
        model: changed in place.
        plan: the rows of each step.
        inner: the recipe.
        progress: called after each micro-batch.
    """
    longest = inner.max_length or max((len(row.ids) for row in plan.rows), default=0)
    optimizers = stock_optimizers(model, inner)
    schedules = [stock_schedule(optimizer, inner, len(plan.steps)) for optimizer in optimizers]
    average = Average(model, inner)
    whole, passed = sum(map(len, plan.steps)), 0
    for taken, numbers in enumerate(plan.steps):
        batch = [plan.rows[number] for number in numbers]
        total = sum(row.tokens for row in batch) if inner.normalization == "token" else len(batch) * longest
        model.zero_grad()
        for done in accumulate(model, batch, total):
            progress(passed + done, whole)
        passed += len(batch)
        if inner.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), inner.max_grad_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            if taken + 1 < len(plan.steps):  # transformers' polynomial has no value after the last step
                schedule.step()
        average.stepped()
    average.finish()


def accumulate(model: PreTrainedModel, batch: Sequence[Row], total: int) -> Iterator[int]:
    """Add the gradient of a batch's summed loss, divided by `total`, to the parameters' `.grad`, by micro-batches.

    Args:
        model: the target.
        batch: its rows.
        total: the normaliser of the whole batch.

    Yields:
        The number of rows done so far.
    """
    at_once = rows_at_once(model, max(len(row.ids) for row in batch))
    for row in range(0, len(batch), at_once):
        rows = batch[row : row + at_once]
        (_summed_loss(model, rows) / total).backward()
        yield row + len(rows)


def rows_at_once(model: PreTrainedModel, length: int) -> int:
    """Rows of a micro-batch: at most `ROWS_AT_ONCE`, fewer where rows of this length at the model's vocabulary are large."""
    head = model.get_output_embeddings().weight
    numbers = LOGITS_AT_ONCE.get(head.device.type, LOGITS_ELSEWHERE)
    return max(1, min(ROWS_AT_ONCE, numbers // (length * head.shape[0])))


def _summed_loss(model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    """Summed next-token loss of some rows."""
    device = next(model.parameters()).device
    ids = np.zeros((len(rows), max(len(row.ids) for row in rows)), dtype=np.int64)
    labels = np.full(ids.shape, -100, dtype=np.int64)
    for number, row in enumerate(rows):
        size = len(row.ids)
        ids[number, :size] = row.ids
        if size:
            labels[number, : size - 1] = row.ids[1:]
        if row.trained is not None:
            labels[number, : size - 1][~np.array(row.trained[1:], dtype=bool)] = -100
    logits = model(input_ids=torch.from_numpy(ids).to(device), use_cache=False).logits[:, :-1]
    targets = torch.from_numpy(labels[:, :-1]).to(device)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
