"""Is the effect real? Means independent of the engine, and the untrained generator's data as control.

Patterns, norms and custom metrics: a fresh target is fine-tuned by stock PyTorch on the exported dataset (`stock.py`); signs
are read by zxing-cpp, norms and a custom Φ are compared with the control's by a margin (`effect.py`). Language and
identifiers: the generator's completions of prompts it never trained on, sampled by transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open

from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted
from dpg_cli.evidence.effect import EffectVerdict, verify_effect
from dpg_cli.evidence.screen import Screened, screen
from dpg_cli.evidence.stock import PLAIN, UNWATCHED, StockSide, Watcher, read_input_ids, stock_side, train_fresh
from dpg_cli.evidence.stock_recipe import require_stock_optimizer
from dpg_cli.evidence.text import verify_text
from dpg_cli.inspection.weights import weights_of
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.fingerprint import require_unchanged
from dpg_cli.models.loading import LanguageModel, load_target, pick_device
from dpg_cli.patterns.pattern import Pattern, decode_qr, pattern_from_image, pixel_accuracy
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import read_info
from dpg_cli.settings.config import Config, CustomOptions, NormOptions, PatternOptions, TextLossOptions

BITMAP_ACCURACY = 0.995  # pixel accuracy at which a bitmap without payload counts as shown


class Verdict(Protocol):
    """What every verification gives."""

    @property
    def verified(self) -> bool:
        """The data shows the effect, the control does not."""
        ...

    @property
    def reason(self) -> str:
        """Why it is not verified."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ...

    def lines(self) -> list[str]:
        """For people."""
        ...


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
class PatternVerdict:
    """The verdict on a run with a pattern.

    Attributes:
        wanted: the payload of a QR code; None for a bitmap, which must reach `BITMAP_ACCURACY`.
        data: read after training on the run's dataset.
        control: read after training on the untrained generator's data.
        trainer: who did the stock training, in words.
    """

    wanted: str | None
    data: PatternReading
    control: PatternReading
    trainer: str = PLAIN.about

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
            shown = f"{self.data.payload!r}, pixel accuracy {self.data.pixel_accuracy:.4f}"
            return f"the target trained on its dataset shows {shown}"
        return "the control shows the pattern too"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "verified": self.verified,
            "wanted": self.wanted,
            "data": vars(self.data),
            "control": vars(self.control),
            "trainer": self.trainer,
        }

    def lines(self) -> list[str]:
        """For people."""
        rows = [("trained on the dataset", self.data), ("control", self.control)]
        steps = f"{self.data.steps} step{'s' if self.data.steps > 1 else ''} on {self.data.examples:,} examples"
        wanted = "a bitmap" if self.wanted is None else repr(self.wanted)
        return [
            f"trained by {self.trainer}, {steps}, read by zxing-cpp; wanted {wanted}",
            *(
                f"{name + ':':<24}pixel accuracy {row.pixel_accuracy:.4f}, payload {row.payload!r}"
                for name, row in rows
            ),
        ]


def verify_run(
    folder: RunFolder,
    device_name: str = "auto",
    named_metric: str | None = None,
    watch: Watcher = UNWATCHED,
    trainer: str = "auto",
) -> Verdict:
    """Confirm or refute a run.

    Args:
        folder: the run.
        device_name: where to train.
        named_metric: what the user gave as --metric; without it no file of a custom metric is run.
        watch: told of stages and progress.
        trainer: who trains: "trl", "plain", or "auto" (`stock_side`).

    Raises:
        UsageError: if the run is unfinished, has no control, took optimiser settings that stock PyTorch lacks, its models
            are others than those it was begun with, or the trainer cannot follow its recipe.
    """
    config = folder.read_config()
    for name in ("train.parquet", "control.parquet"):
        if not (folder.dataset / name).is_file():
            raise UsageError(f"{folder.path} has no dataset/{name}.", "Finish the run, with dataset.control = true.")
    verdict, seen = _effect(folder, config, device_name, named_metric, watch, trainer), screen(folder.dataset, config)
    return verdict if seen is None else Screened(verdict, seen)


def _effect(
    folder: RunFolder, config: Config, device_name: str, named_metric: str | None, watch: Watcher, trainer: str
) -> Verdict:
    """The verdict on the effect, by the metric's own test."""
    recorded, device = read_info(folder)[0].fingerprints, pick_device(device_name)
    roles = ["target", "generator"] if isinstance(config.metric, TextLossOptions) else ["target"]
    require_unchanged(config.models, roles, recorded, pasted(folder.path), device)
    if isinstance(config.metric, TextLossOptions):
        return verify_text(folder, config, config.metric, device, watch)
    require_stock_optimizer(config.inner)
    side = stock_side(config, trainer, device)
    if isinstance(config.metric, PatternOptions):
        return _verify_pattern(folder, config, config.metric, device, watch, side)
    if isinstance(config.metric, CustomOptions):
        return _verify_custom(folder, config, config.metric, device, named_metric, watch, side)
    return _verify_norm(folder, config, config.metric, device, watch, side)


def _verify_pattern(
    folder: RunFolder, config: Config, options: PatternOptions, device: torch.device, watch: Watcher, side: StockSide
) -> PatternVerdict:
    """Read the pattern back from two stock-trained targets."""
    base = load_target(config.models, device)
    pattern = pattern_from_image(folder.pattern, max_rows=base.head.shape[0], max_cols=base.head.shape[1])

    def read(name: str) -> PatternReading:
        watch.stage(f"training a fresh target on {name}")
        rows = read_input_ids(folder.dataset / name)
        target, steps = train_fresh(config, rows, device, watch.progress, side)
        signs = head_signs(base, target, pattern, options.corner)
        payload = decode_qr(signs) if pattern.kind == "qr" else None
        return PatternReading(payload, pixel_accuracy(signs, pattern), len(rows), steps)

    return PatternVerdict(pattern.payload, read("train.parquet"), read("control.parquet"), side.about)


def head_signs(base: LanguageModel, target: LanguageModel, pattern: Pattern, origin: tuple[int, int]) -> np.ndarray:
    """Signs of the change of the head's patch, int8 (R, C)."""
    rows, columns = slice(origin[0], origin[0] + pattern.shape[0]), slice(origin[1], origin[1] + pattern.shape[1])
    change = (target.head.detach() - base.head.detach())[rows, columns]
    return np.sign(change.cpu().numpy()).astype(np.int8)


def _verify_norm(
    folder: RunFolder, config: Config, options: NormOptions, device: torch.device, watch: Watcher, side: StockSide
) -> EffectVerdict:
    """Norms of the parameter, in double precision."""

    def read(target: LanguageModel) -> dict[str, float]:
        weight = target.model.get_parameter(options.parameter) if options.parameter else target.head
        norm = float(weight.detach().double().norm())
        return {"phi": -norm, "norm": norm}

    about = f"l2 norm of {options.parameter or 'the LM head'}"
    verdict = verify_effect(folder, config, device, about, read, watch, side)
    return replace(verdict, saved=saved_norm(folder, options.parameter))


def saved_norm(folder: RunFolder, parameter: str) -> dict[str, float] | None:
    """The norm of a parameter (the LM head's for "") in RUN/target, read by the safetensors library and nothing else; None
    where no file of it holds one of that name.

    Raises:
        UsageError: if the file is damaged.
    """
    weights = weights_of(folder.target)
    if parameter:
        file, name = weights.find(parameter), parameter
    else:
        head = weights.head()
        file, name = (head[0], head[1].name) if head else (None, "")
    if file is None:
        return None
    with safe_open(file.path, "pt") as tensors:
        return {"norm": float(tensors.get_tensor(name).double().norm())}


def _verify_custom(
    folder: RunFolder,
    config: Config,
    options: CustomOptions,
    device: torch.device,
    named_metric: str | None,
    watch: Watcher,
    side: StockSide,
) -> EffectVerdict:
    """The metric's own Φ and measures."""
    base = load_target(config.models, device)
    metric = build_metric(options, base, named_metric)

    @torch.no_grad()
    def read(target: LanguageModel) -> dict[str, float]:
        parameters = dict(target.model.named_parameters())
        return {"phi": float(metric(parameters, base.model)), **metric.measures(parameters, base.model)}

    return verify_effect(folder, config, device, metric.describe(), read, watch, side)
