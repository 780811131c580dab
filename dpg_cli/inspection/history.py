"""The log of a run's outer steps in a few figures, and as a line of bars."""

from __future__ import annotations

import itertools
import math
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.runs.status import log_lines

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 60  # bars of a chart at most


@dataclass(frozen=True)
class Series:
    """One column of the log.

    Attributes:
        first, last, least, most: over its finite values; NaN where it has none.
        chart: means of at most `WIDTH` stretches of equal length; NaN where nothing in a stretch is finite.
        not_finite: how many values were NaN or infinite.
    """

    first: float
    last: float
    least: float
    most: float
    chart: tuple[float, ...]
    not_finite: int


@dataclass(frozen=True)
class History:
    """The log.

    Attributes:
        steps: outer steps logged.
        columns: by name, in the order of the log, without the step's own number.
    """

    steps: int
    columns: dict[str, Series]

    def shown(self, measures: list[str]) -> list[str]:
        """Names of the columns worth a line: Φ, its measures, then what tells of trouble."""
        if not measures:  # of an unfinished run: what stands between Φ and the rewards
            names = list(self.columns)
            stop = next((place for place, name in enumerate(names) if name.startswith("reward")), 0)
            measures = [name for name in names[:stop] if name != "phi"]
        others = ["reward_std", "reward_within_groups", "entropy", "policy_kl", "completion_tokens", "seconds"]
        wanted = dict.fromkeys(["phi", *measures, *others])
        return [name for name in wanted if name in self.columns]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "columns": {name: vars(series) for name, series in self.columns.items()}}


def read_history(path: Path, width: int = WIDTH, most: int | None = None) -> History:
    """Read a log, or its first `most` outer steps; a column that begins late is NaN before.

    Raises:
        UsageError: where it is damaged.
    """
    columns: dict[str, array[float]] = {}
    steps = 0
    for row in itertools.islice(log_lines(path), most):
        for name, value in row.items():
            column = columns.setdefault(name, array("d"))
            column.extend([math.nan] * (steps - len(column)))
            column.append(value)
        steps += 1
    for column in columns.values():
        column.extend([math.nan] * (steps - len(column)))
    columns.pop("step", None)
    return History(steps, {name: series_of(column.tolist(), width) for name, column in columns.items()})


def series_of(values: list[float], width: int = WIDTH) -> Series:
    """A column in a few figures.

    Args:
        values: one an outer step.
        width: most stretches of the chart.
    """
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [place * len(values) // count for place in range(count + 1)] if count else []
    chart = []
    for start, stop in itertools.pairwise(edges):
        stretch = [value for value in values[start:stop] if math.isfinite(value)]
        chart.append(math.fsum(stretch) / len(stretch) if stretch else math.nan)
    ends = (finite[0], finite[-1], min(finite), max(finite)) if finite else (math.nan,) * 4
    return Series(*ends, tuple(chart), len(values) - len(finite))


def sparkline(chart: tuple[float, ...]) -> str:
    """One bar a value, from the least to the most; × where there is none, a middle bar where all are equal."""
    finite = [value for value in chart if math.isfinite(value)]
    if not finite:
        return "×" * len(chart)
    least, span = min(finite), max(finite) - min(finite)

    def bar(value: float) -> str:
        if not math.isfinite(value):
            return "×"
        share = (value - least) / span if 0 < span < math.inf else 0.5
        return BARS[min(len(BARS) - 1, int(share * len(BARS)))]

    return "".join(bar(value) for value in chart)
