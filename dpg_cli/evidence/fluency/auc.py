"""How well a score tells two kinds of examples apart: the area under the ROC curve, of one example and of many at once.

    AUC = P(score of the data > score of the control) + ½ P(equal)        0.5: not at all, 1: always

Its standard error is DeLong's: the variance of the *placements*, the share of the other kind that each example beats. A sum
over n independent examples is normal for large n, so the AUC per n examples is

    Φ(√n · z),   z = (mean of the data's scores - mean of the control's) / √(variance of the data's + of the control's)

Source: E. DeLong, D. DeLong, D. Clarke-Pearson, Biometrics 44 (1988), for the error; the central limit theorem for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Scores = tuple[np.ndarray, np.ndarray]  # of the data, (N,), and of the control, (M,), by one scorer; float64


@dataclass(frozen=True)
class Auc:
    """An area under the ROC curve.

    Attributes:
        value: 0.5 where the two cannot be told apart, 1 where they always can.
        error: its standard error.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def auc(folds: Sequence[Scores]) -> Auc:
    """The AUC of single examples; only examples that one scorer has judged are compared with each other.

    Args:
        folds: scores of the data and of the control by each scorer; those without one of the two do not count.
    """
    values, variances, sizes = [], [], []
    for data_N, control_M in _whole(folds):
        data_share_N, control_share_M = placements(data_N, control_M), placements(control_M, data_N)
        values.append(float(data_share_N.mean()))
        variances.append(_variance(data_share_N) / len(data_N) + _variance(control_share_M) / len(control_M))
        sizes.append(len(data_N) + len(control_M))
    share = np.array(sizes) / sum(sizes)
    return Auc(float(share @ values), math.sqrt(float(share**2 @ variances)))


def placements(own_N: np.ndarray, other_M: np.ndarray) -> np.ndarray:
    """The share of the others that each score exceeds, ties counting half; (N,)."""
    ordered = np.sort(other_M)
    return (np.searchsorted(ordered, own_N, "left") + np.searchsorted(ordered, own_N, "right")) / (2 * len(other_M))


def grouped(folds: Sequence[Scores], size: int) -> Auc:
    """The AUC of sums over `size` examples of one kind, by the central limit theorem.

    Args:
        folds: see `auc`.
        size: examples a sum.
    """
    distances, variances, sizes = [], [], []
    for data_N, control_M in _whole(folds):
        data, control = _variance(data_N), _variance(control_M)
        gap, spread = float(data_N.mean() - control_M.mean()), data + control
        if spread == 0:
            return Auc(0.5 if gap == 0 else float(gap > 0), 0.0)
        distance = gap / math.sqrt(spread)
        of_mean = data / len(data_N) + control / len(control_M)
        of_spread = (data**2 / max(1, len(data_N) - 1) + control**2 / max(1, len(control_M) - 1)) / (2 * spread**2)
        distances.append(distance)
        variances.append(of_mean / spread + distance**2 * of_spread)
        sizes.append(len(data_N) + len(control_M))
    share = np.array(sizes) / sum(sizes)
    distance, error = float(share @ distances), math.sqrt(float(share**2 @ variances))
    place = math.sqrt(size) * distance
    density = math.exp(-min(place**2, 1400) / 2) / math.sqrt(2 * math.pi)
    return Auc(0.5 * math.erfc(-place / math.sqrt(2)), density * math.sqrt(size) * error)


def _whole(folds: Sequence[Scores]) -> list[Scores]:
    """The folds that have both kinds.

    Raises:
        ValueError: if there are none.
    """
    found = [fold for fold in folds if len(fold[0]) and len(fold[1])]
    if not found:
        raise ValueError("no scorer has judged both kinds")
    return found


def _variance(values: np.ndarray) -> float:
    """Of a sample; 0 for a single value."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0
