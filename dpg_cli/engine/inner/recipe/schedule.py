"""Learning-rate schedules: a factor of the optimiser's rate for each step, known before the run begins.

With T steps, W of them warm-up, p = (t - W) / (T - W) and a learning rate lr:

    warm-up        t / W                                                       (stable-decay: from its floor)
    constant       1
    linear         (T - t) / (T - W)
    cosine         floor + (1 - floor) (1 + cos 2π c p) / 2                    c = 1/2: down once
    restarts       (1 + cos π (c p mod 1)) / 2                                 c whole cosines, each from the top
    polynomial     ((lr - end) (1 - p)^power + end) / lr
    inverse-sqrt   1 / √((t + s - W) / s)                                      s = timescale, W by default
    stable-decay   1, then over the last D steps floor + (1 - floor) f(q), q from 0 to 1

Each gives the numbers of `transformers.get_scheduler` to the last digit, so the order of the operations matters.
Source: DESIGN §7.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda q: 1.0 - q,
    "cosine": lambda q: 0.5 * (1.0 + math.cos(math.pi * 0.5 * 2.0 * q)),
    "1-sqrt": lambda q: 1.0 - math.sqrt(q),
}


@dataclass(frozen=True)
class Schedule:
    """How the learning rate goes over a run.

    Attributes:
        name: one of `SCHEDULES`.
        warmup: steps over which the rate rises from 0, or below 1, their share of all steps, rounded up.
        cycles: `cosine`: waves, 0.5 goes down once; `restarts`: whole ones. 0 takes 0.5 and 1.
        power, end: of `polynomial`; `end` is a learning rate.
        floor: the lowest factor of `cosine` and `stable-decay`.
        timescale: of `inverse-sqrt`; 0 takes the warm-up steps, or 10,000 without any.
        decay_steps: D of `stable-decay`.
        decay: its form: "cosine", "linear" or "1-sqrt".
    """

    name: str = "constant"
    warmup: float = 0.0
    cycles: float = 0.0
    power: float = 1.0
    end: float = 1e-7
    floor: float = 0.0
    timescale: int = 0
    decay_steps: int = 0
    decay: str = "cosine"

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.name!r}; there are {', '.join(SCHEDULES)}")
        if self.decay not in DECAYS:
            raise ValueError(f"unknown decay {self.decay!r}; there are {', '.join(DECAYS)}")
        for key in ("warmup", "cycles", "power", "end", "timescale", "decay_steps"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"{key} must not be negative, got {getattr(self, key)}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {self.floor}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup is a whole number of steps, or a share below 1, got {self.warmup}")
        if self.name == "stable-decay" and not self.decay_steps:
            raise ValueError("stable-decay needs decay_steps")

    def warmup_steps(self, total: int) -> int:
        """W of a run of `total` steps."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(total * self.warmup)

    def factors(self, total: int, lr: float) -> list[float]:
        """The factors of all T steps.

        Args:
            total: T.
            lr: the optimiser's rate, that `polynomial` compares its end with.

        Raises:
            ValueError: if `polynomial` does not go down.
        """
        if self.name == "polynomial" and not lr > self.end:
            raise ValueError(f"a polynomial schedule goes down: lr {lr:g} must be more than its end, {self.end:g}")
        rise = self.warmup_steps(total)
        after = SCHEDULES[self.name]
        return [self._rise(step, rise) if step < rise else after(self, step, total, rise, lr) for step in range(total)]

    def _rise(self, step: int, rise: int) -> float:
        share = float(step) / float(max(1, rise))
        return share * (1.0 - self.floor) + self.floor if self.name == "stable-decay" else share

    def rates(self, total: int, lr: float) -> list[float]:
        """The learning rates of all T steps; see `factors`."""
        return [lr * factor for factor in self.factors(total, lr)]


def _progress(step: int, total: int, rise: int) -> float:
    return float(step - rise) / float(max(1, total - rise))


def _constant(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    return 1.0


def _linear(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    return max(0.0, float(total - step) / float(max(1, total - rise)))


def _cosine(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    wave = 0.5 * (1.0 + math.cos(math.pi * (schedule.cycles or 0.5) * 2.0 * _progress(step, total, rise)))
    return max(0.0, wave * (1 - schedule.floor) + schedule.floor)


def _restarts(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    place = ((schedule.cycles or 1.0) * _progress(step, total, rise)) % 1.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * place)))


def _polynomial(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    left = 1 - (step - rise) / (total - rise)
    return ((lr - schedule.end) * left**schedule.power + schedule.end) / lr


def _inverse_sqrt(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    scale = schedule.timescale or rise or 10_000
    return 1.0 / math.sqrt((step + (scale - rise)) / scale)


def _stable_decay(schedule: Schedule, step: int, total: int, rise: int, lr: float) -> float:
    start = total - schedule.decay_steps
    if step < start:
        return 1.0
    shape = DECAYS[schedule.decay](float(step - start) / float(max(1, schedule.decay_steps)))
    return max(0.0, shape * (1.0 - schedule.floor) + schedule.floor)


SCHEDULES: dict[str, Callable[[Schedule, int, int, int, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "restarts": _restarts,
    "polynomial": _polynomial,
    "inverse-sqrt": _inverse_sqrt,
    "stable-decay": _stable_decay,
}
