"""Means with intervals, rank correlation, and when a curve reaches a level. No randomness, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t for 1 … 30 degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % interval; the half width of one value is not known (nan)."""

    mean: float
    half: float
    count: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def text(self, form: str = ".3f") -> str:
        """As in tables: mean ± half width."""
        if not math.isfinite(self.half):
            return format(self.mean, form)
        return f"{self.mean:{form}} ± {self.half:{form}}"


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t; past 30 degrees of freedom by its expansion, right to 0.001."""
    if freedom < 1:
        return math.nan
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.960 + 2.372 / freedom + 2.8 / freedom**2


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent values by Student's t."""
    count = len(values)
    if not count:
        return Interval(math.nan, math.nan, 0)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, math.nan, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, t_quantile(count - 1) * deviation / math.sqrt(count), count)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share their mean rank."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and values[order[stop]] == values[order[start]]:
            stop += 1
        for place in order[start:stop]:
            result[place] = (start + 1 + stop) / 2
        start = stop
    return result


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Linear correlation; nan where one of the two is constant."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    a, b = interval(first).mean, interval(second).mean
    cross = math.fsum((x - a) * (y - b) for x, y in zip(first, second, strict=True))
    scale = math.sqrt(math.fsum((x - a) ** 2 for x in first) * math.fsum((y - b) ** 2 for y in second))
    return cross / scale if scale > 0 else math.nan


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation."""
    return pearson(ranks(first), ranks(second))


def trailing(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the `window` - 1 before it (fewer at the start)."""
    return [
        math.fsum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def reach(places: Sequence[float], values: Sequence[float], level: float) -> float:
    """The first place at which a curve is at `level` or above; infinite if it never is."""
    return next((place for place, value in zip(places, values, strict=True) if value >= level), math.inf)


def geometric(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of positive values, the least and the greatest: for errors that spread over orders of magnitude."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values)), min(values), max(values)
