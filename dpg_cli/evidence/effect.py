"""Is Φ higher after the dataset than after the control, by more than chance? For metrics without a reader of their own.

Any two datasets differ a little. So both are also cut into quarters, and a fresh target is trained on each quarter by stock
PyTorch with the run's recipe: how far the quarters of one dataset lie apart is what chance does to a quarter. Three demands:

    apart    the lowest quarter of the dataset lies above every quarter of the control and above Φ before fine-tuning;
             for two datasets of equal origin that happens once in 70 times
    margin   Φ(dataset) exceeds the better of Φ(control) and Φ(before) by more than the wider spread of quarters
    effect   Φ(dataset) - Φ(control) > |Φ(control) - Φ(before)|: the generator's training does more than fine-tuning on any
             of its texts does; without it a real but tiny gain (one outer step) would pass
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpg_cli.errors import UsageError
from dpg_cli.evidence.stock import PLAIN, UNWATCHED, StockSide, Watcher, read_input_ids, train_fresh
from dpg_cli.evidence.stock_recipe import require_stock_optimizer
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config

FOLDS = 4

Reader = Callable[[LanguageModel], dict[str, float]]  # Φ under "phi", then readable measures


@dataclass(frozen=True)
class Reading:
    """What stock trainings on one dataset give.

    Attributes:
        measures: after training on all of it: Φ as "phi", then the metric's own.
        folds: Φ after training on each quarter alone.
        examples, steps, tokens: of the training on all of it.
    """

    measures: dict[str, float]
    folds: tuple[float, ...]
    examples: int
    steps: int
    tokens: int = 0

    @property
    def phi(self) -> float:
        """Φ after training on all of it."""
        return self.measures["phi"]

    @property
    def spread(self) -> float:
        """How far the quarters lie apart."""
        return max(self.folds) - min(self.folds)


@dataclass(frozen=True)
class Noise:
    """What the run itself measured of Φ's noise, and what its data cost.

    Attributes:
        error: standard error of Φ by which examples the untrained generator wrote, at the dataset's size.
        kl: of the trained generator to the untrained one, nats a token; nan where it was not measured.
        tokens: trained tokens of the dataset.
    """

    error: float
    kl: float
    tokens: int

    @property
    def most(self) -> float:
        """Standard errors that such a KL can move Φ by, to first order: sqrt(2 · KL · tokens) (DESIGN §9)."""
        return (2 * self.kl * self.tokens) ** 0.5

    def line(self, effect: float) -> str:
        """For people."""
        says = f"{effect / self.error:.1f} standard errors as the run measured them ({self.error:.3g})"
        if not self.kl > 0:
            return says
        share = effect / self.error / self.most
        return f"{says}, {share:.2f} of the {self.most:.1f} that its {self.kl:.4f} nats a token can buy"

    def as_dict(self, effect: float) -> dict[str, float | int | None]:
        """For JSON."""
        known = self.kl > 0
        z = effect / self.error
        return {
            "error": self.error,
            "kl": self.kl if known else None,
            "tokens": self.tokens,
            "standard_errors": z,
            "most": self.most if known else None,
            "share_of_most": z / self.most if known else None,
        }


def noise_of(folder: RunFolder, tokens: int) -> Noise | None:
    """What a run's log says of Φ's noise; None where it says nothing.

    Args:
        folder: of the run.
        tokens: of its dataset.
    """
    rows = folder.read_metrics()
    error = rows[0].get("phi_error") if rows else None
    if not isinstance(error, int | float) or not 0 < error < math.inf:
        return None
    kl = next((row["policy_kl"] for row in reversed(rows) if "policy_kl" in row), math.nan)
    return Noise(float(error), float(kl), tokens)


@dataclass(frozen=True)
class EffectVerdict:
    """The verdict on a run by its Φ.

    Attributes:
        about: what is measured, in words.
        before: Φ as "phi" and the measures before fine-tuning.
        data: after the run's dataset.
        control: after the untrained generator's data.
        saved: measures of RUN/target, read from its file; for the eye alone, the verdict does not rest on it.
        trainer: who did the stock training, in words.
        noise: what the run measured of Φ's noise; for the eye alone likewise.
    """

    about: str
    before: dict[str, float]
    data: Reading
    control: Reading
    saved: dict[str, float] | None = None
    trainer: str = PLAIN.about
    noise: Noise | None = None

    @property
    def gap(self) -> float:
        """From the highest of the control's quarters, or Φ before, to the lowest of the dataset's; negative: overlap."""
        return min(self.data.folds) - max(*self.control.folds, self.before["phi"])

    @property
    def margin(self) -> float:
        """Φ after the dataset less the better of Φ after the control and Φ before."""
        return self.data.phi - max(self.control.phi, self.before["phi"])

    @property
    def spread(self) -> float:
        """The wider of the two datasets' spreads of quarters."""
        return max(self.data.spread, self.control.spread)

    @property
    def effect(self) -> float:
        """Φ after the dataset less Φ after the control."""
        return self.data.phi - self.control.phi

    @property
    def ordinary(self) -> float:
        """How far fine-tuning on the control moves Φ, either way."""
        return abs(self.control.phi - self.before["phi"])

    @property
    def percent(self) -> float:
        """The effect as a share of Φ's size before fine-tuning, in per cent."""
        return 100 * self.effect / abs(self.before["phi"]) if self.before["phi"] else math.inf

    @property
    def verified(self) -> bool:
        """The three demands of the module's header."""
        return not self.reason

    @property
    def reason(self) -> str:
        """Why it is not verified; empty if it is."""
        numbers = (*self.data.folds, *self.control.folds, self.before["phi"], self.data.phi, self.control.phi)
        if not all(map(math.isfinite, numbers)):
            return "phi is not finite after one of the trainings"
        if self.margin <= 0:
            rival = "before fine-tuning" if self.before["phi"] >= self.control.phi else "after the control"
            best = max(self.control.phi, self.before["phi"])
            return f"phi is {self.data.phi:.6g} after its dataset, {best:.6g} {rival}"
        if self.gap <= 0 or self.margin <= self.spread:
            return (
                f"phi is higher after its dataset, but no more than chance allows: by {self.margin:.3g}, with quarters that "
                f"spread over {self.spread:.3g}" + (" and overlap" if self.gap <= 0 else "")
            )
        if self.effect <= self.ordinary:
            return (
                f"its dataset exceeds the control by {self.effect:.3g} only; fine-tuning on the control alone moves phi by "
                f"{self.ordinary:.3g}"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = ("verified", "gap", "margin", "spread", "effect", "ordinary", "percent")
        known = {} if self.noise is None else {"noise": self.noise.as_dict(self.effect)}
        return {**{name: getattr(self, name) for name in names}, **asdict(self), **known}

    def lines(self) -> list[str]:
        """For people."""
        steps = f"{self.data.steps} step{'s' if self.data.steps > 1 else ''} on {self.data.examples:,} examples"
        rows = (
            ("before fine-tuning", self.before),
            ("dataset", self.data.measures),
            ("control", self.control.measures),
        )
        quarters = (("dataset's quarters", self.data.folds), ("control's quarters", self.control.folds))
        return [
            f"{self.about}; trained by {self.trainer}, {steps}",
            *(
                f"{name + ':':<20}" + "  ".join(f"{key} {value:.6g}" for key, value in row.items())
                for name, row in rows
            ),
            *(f"{name + ':':<20}phi {min(folds):.6g} to {max(folds):.6g}" for name, folds in quarters),
            *(f"RUN/target, as saved: {name} {value:.6g}" for name, value in (self.saved or {}).items()),
            f"gap between quarters {self.gap:.3g} (must exceed 0), margin {self.margin:.3g} (their spread, {self.spread:.3g}), "
            f"effect {self.effect:.3g} (what the control does, {self.ordinary:.3g})",
            f"effect {self.percent:+.3g} % of phi before"
            + ("" if self.noise is None else f"; {self.noise.line(self.effect)}"),
        ]


def verify_effect(
    folder: RunFolder,
    config: Config,
    device: torch.device,
    about: str,
    read: Reader,
    watch: Watcher = UNWATCHED,
    side: StockSide = PLAIN,
) -> EffectVerdict:
    """Train fresh targets on both datasets and on their quarters, and read each.

    Args:
        folder: of the run.
        config: its settings.
        device: where to train.
        about: what is measured, in words.
        read: Φ and measures of a target.
        watch: told of stages and progress.
        side: who trains.

    Raises:
        UsageError: for optimiser settings that stock PyTorch lacks, or a dataset too small to be cut.
    """
    require_stock_optimizer(config.inner)

    def reading(name: str) -> Reading:
        rows = read_input_ids(folder.dataset / name)
        if len(rows) < 2 * FOLDS:
            raise UsageError(
                f"dataset/{name} has {len(rows)} examples; verification cuts it into {FOLDS} parts.",
                f"Run again with --set dataset.examples={32 * FOLDS} or more.",
            )
        watch.stage(f"training a fresh target on {name}, and one on each quarter")
        target, steps = train_fresh(config, rows, device, watch.progress, side)
        parts = [rows[len(rows) * k // FOLDS : len(rows) * (k + 1) // FOLDS] for k in range(FOLDS)]
        folds = tuple(read(train_fresh(config, part, device, watch.progress, side)[0])["phi"] for part in parts)
        return Reading(read(target), folds, len(rows), steps, sum(map(len, rows)) - len(rows))

    before = read(load_target(config.models, device))
    data, control = reading("train.parquet"), reading("control.parquet")
    return EffectVerdict(about, before, data, control, trainer=side.about, noise=noise_of(folder, data.tokens))
