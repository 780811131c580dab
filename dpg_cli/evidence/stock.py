"""Fine-tuning as anybody would write it: stock PyTorch on an exported dataset. Nothing here imports the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.settings.config import Config, InnerConfig

ROWS_AT_ONCE = 256
ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def require_stock_optimizer(inner: InnerConfig) -> None:
    """Refuse optimiser settings that stock PyTorch lacks.

    Raises:
        UsageError: for Adam and AdamW with ε_root > 0.
    """
    if inner.optimizer in ADAMS and inner.eps_root > 0:
        raise UsageError(
            f"inner.eps_root = {inner.eps_root:g} is not a setting of torch.optim.{ADAMS[inner.optimizer].__name__}.",
            "Only runs with inner.eps_root = 0 can be verified by stock PyTorch.",
        )


def stock_optimizer(model: nn.Module, inner: InnerConfig) -> torch.optim.Optimizer:
    """The optimiser of these settings as torch has it."""
    shared: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
    if inner.optimizer in ADAMS:
        return ADAMS[inner.optimizer](model.parameters(), betas=(inner.beta1, inner.beta2), eps=inner.eps, **shared)
    return torch.optim.SGD(model.parameters(), momentum=inner.momentum, nesterov=inner.nesterov, **shared)


def trained_target(config: Config, data: Path, device: torch.device) -> tuple[LanguageModel, int, int]:
    """A fresh target after fine-tuning on a parquet file with the run's recipe.

    Returns:
        The target, the number of examples and of optimiser steps.
    """
    sequences = read_input_ids(data)
    target, steps = train_fresh(config, sequences, device)
    return target, len(sequences), steps


def train_fresh(config: Config, sequences: list[list[int]], device: torch.device) -> tuple[LanguageModel, int]:
    """A fresh target after fine-tuning on token sequences with the run's recipe, and the optimiser steps it took."""
    target = load_target(config.models, device)
    return target, fine_tune(target.model, sequences, config.inner, config.inner_steps)


def read_input_ids(path: Path) -> list[list[int]]:
    """The `input_ids` column of a parquet file.

    Raises:
        UsageError: if there is none.
    """
    try:
        return pq.read_table(path, columns=["input_ids"])["input_ids"].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UsageError(f"{path} is no readable dataset: {error}.", "Run `dpg run` again.") from None


def fine_tune(model: nn.Module, sequences: list[list[int]], inner: InnerConfig, steps: int) -> int:
    """Ordinary supervised fine-tuning: next-token loss, each sequence used once.

    Args:
        model: changed in place.
        sequences: token ids, every token after the first is a label.
        inner: optimiser settings; the loss is the mean over the batch's tokens, or over all its places ("example").
        steps: the sequences are split into this many batches of equal size.

    Returns:
        The number of optimiser steps taken.
    """
    optimizer = stock_optimizer(model, inner)
    longest = inner.max_length or (max(map(len, sequences)) if sequences else 0)
    size = -(-len(sequences) // steps)
    taken = 0
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        tokens = sum(len(sequence) - 1 for sequence in batch)
        total = tokens if inner.normalization == "token" else len(batch) * longest
        optimizer.zero_grad()
        for row in range(0, len(batch), ROWS_AT_ONCE):
            (_summed_loss(model, batch[row : row + ROWS_AT_ONCE]) / total).backward()
        optimizer.step()
        taken += 1
    return taken


def _summed_loss(model: nn.Module, rows: list[list[int]]) -> Tensor:
    """Summed next-token loss of some rows."""
    device = next(model.parameters()).device
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
    labels = torch.tensor([row[1:] + [-100] * (length - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
