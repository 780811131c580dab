"""Is the effect real? A fresh target, stock PyTorch, the exported dataset, an independent reader; and a control.

Nothing here imports the engine: the loop below is what anybody would write, so that a fault of the engine cannot
confirm itself. Only the loading of the base model and the drawing of the sign picture are shared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dpg_cli.config import Config, InnerConfig
from dpg_cli.errors import UsageError
from dpg_cli.models import LanguageModel, load, pick_device, untie_head
from dpg_cli.patterns import Pattern, decode_qr, pattern_from_image, pixel_accuracy
from dpg_cli.runs.folder import RunFolder

ROWS_AT_ONCE = 256
BITMAP_ACCURACY = 0.995  # pixel accuracy at which a bitmap without payload counts as shown


@dataclass(frozen=True)
class PatternReading:
    """What was read from a stock-trained target.

    Attributes:
        payload: what zxing-cpp read from the signs of the head's change, or None.
        pixel_accuracy: share of signs that equal the pattern.
        examples, steps: of the training.
    """

    payload: str | None
    pixel_accuracy: float
    examples: int
    steps: int


@dataclass(frozen=True)
class Verification:
    """The verdict on a run with a pattern.

    Attributes:
        wanted: the payload of a QR code; None for a bitmap, which must reach `BITMAP_ACCURACY`.
        data: read after training on the run's dataset.
        control: read after training on the untrained generator's data.
    """

    wanted: str | None
    data: PatternReading
    control: PatternReading

    def _shows(self, reading: PatternReading) -> bool:
        return reading.pixel_accuracy >= BITMAP_ACCURACY if self.wanted is None else reading.payload == self.wanted

    @property
    def verified(self) -> bool:
        """The data shows the pattern, the control does not."""
        return self._shows(self.data) and not self._shows(self.control)

    @property
    def reason(self) -> str:
        """Why it is not verified."""
        if not self._shows(self.data):
            return f"the target trained on its dataset shows {self.data.payload!r}, pixel accuracy {self.data.pixel_accuracy:.4f}"
        return "the control shows the pattern too"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"verified": self.verified, **asdict(self)}

    def lines(self) -> list[str]:
        """For people."""
        rows = [("trained on the dataset", self.data), ("control", self.control)]
        lines = [
            f"{name + ':':<24}pixel accuracy {reading.pixel_accuracy:.4f}, payload {reading.payload!r}"
            for name, reading in rows
        ]
        steps = f"{self.data.steps} step{'s' if self.data.steps > 1 else ''} on {self.data.examples:,} examples"
        return [f"stock torch.optim, {steps}, read by zxing-cpp; wanted {self.wanted!r}", *lines]


def verify_run(folder: RunFolder, device_name: str = "auto") -> Verification:
    """Train on the run's dataset and on its control, and read the pattern from both.

    Raises:
        UsageError: if the run is unfinished, has no control, or took optimiser settings that stock PyTorch lacks.
    """
    config = folder.read_config()
    if config.inner.optimizer == "adamw" and config.inner.eps_root > 0:
        raise UsageError(
            f"inner.eps_root = {config.inner.eps_root:g} is not a setting of torch.optim.AdamW.",
            "Only runs with inner.eps_root = 0 can be verified by stock PyTorch.",
        )
    for name in ("train.parquet", "control.parquet"):
        if not (folder.dataset / name).is_file():
            raise UsageError(f"{folder.path} has no dataset/{name}.", "Finish the run, with dataset.control = true.")
    device = pick_device(device_name)
    target = fresh_target(config, device)
    rows, columns = target.head.shape
    pattern = pattern_from_image(folder.pattern, max_rows=rows, max_cols=columns)
    data = read_back(config, folder.dataset / "train.parquet", pattern, target)
    control = read_back(config, folder.dataset / "control.parquet", pattern, fresh_target(config, device))
    return Verification(pattern.payload, data, control)


def fresh_target(config: Config, device: torch.device) -> LanguageModel:
    """The target before any fine-tuning."""
    models = config.models
    target = load(models.target, device=device, init=models.target_init, seed=models.init_seed)
    if models.untie_target:
        untie_head(target.model)
    return target


def read_back(config: Config, data: Path, pattern: Pattern, target: LanguageModel) -> PatternReading:
    """Train the target on a parquet file and read the signs of its head's change."""
    sequences = read_input_ids(data)
    before = target.head.detach().clone()
    steps = fine_tune(target.model, sequences, config.inner, config.inner_steps)
    row, column = config.metric.origin
    change = (target.head.detach() - before)[row : row + pattern.shape[0], column : column + pattern.shape[1]]
    signs = np.sign(change.cpu().numpy()).astype(np.int8)
    payload = decode_qr(signs) if pattern.kind == "qr" else None
    return PatternReading(payload, pixel_accuracy(signs, pattern), len(sequences), steps)


def read_input_ids(path: Path) -> list[list[int]]:
    """The `input_ids` column of a parquet file."""
    try:
        return pq.read_table(path, columns=["input_ids"])["input_ids"].to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UsageError(f"{path} is no readable dataset: {error}.", "Run `dpg run` again.") from None


def fine_tune(model: nn.Module, sequences: list[list[int]], inner: InnerConfig, steps: int) -> int:
    """Ordinary supervised fine-tuning: next-token loss, mean over the batch's tokens, each sequence used once.

    Args:
        model: changed in place.
        sequences: token ids, every token after the first is a label.
        inner: optimiser settings.
        steps: the sequences are split into this many batches of equal size.

    Returns:
        The number of optimiser steps taken.
    """
    optimizer: torch.optim.Optimizer
    if inner.optimizer == "adamw":
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=inner.lr,
            betas=(inner.beta1, inner.beta2),
            eps=inner.eps,
            weight_decay=inner.weight_decay,
        )
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=inner.lr, momentum=inner.momentum, weight_decay=inner.weight_decay
        )
    longest = max(map(len, sequences)) if sequences else 0
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
