"""What a reader of the data can notice: the judgement on two datasets, for people and for JSON."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpg_cli.evidence.fluency.auc import Auc, Scores, auc, grouped
from dpg_cli.evidence.fluency.classifier import FOLDS, cross_validated
from dpg_cli.evidence.fluency.nats import Comparison, Cost
from dpg_cli.evidence.fluency.rows import Side
from dpg_cli.runs.verdict import Verdict

MANY = 100  # examples of a group
FEWEST = 50  # rows of each dataset that a classifier needs
SHOWN = 5  # examples of each, beside one another
LONGEST = 2000  # characters of a shown text

COUNTS = "token and bigram counts"
RATIO = "the likelihood ratio of the two generators"


@dataclass(frozen=True)
class Telling:
    """How well data and control can be told apart.

    Attributes:
        by: what a reader goes by.
        example: from one example.
        many: from `MANY` examples of one kind.
    """

    by: str
    example: Auc
    many: Auc

    @classmethod
    def of(cls, by: str, folds: Sequence[Scores]) -> Telling:
        """From the scores of both kinds, by each scorer."""
        return cls(by, auc(folds), grouped(folds, MANY))


@dataclass(frozen=True)
class Shown:
    """An example to be looked at.

    Attributes:
        number: of its row.
        prompt, text: what it was written for, and what it says; cut after `LONGEST` characters.
        nats: nats a token by each reader's name; None for a text without tokens.
    """

    number: int
    prompt: str
    text: str
    nats: dict[str, float | None]


@dataclass(frozen=True)
class Fluency:
    """How the data reads beside its control.

    Attributes:
        examples: rows judged of each; evenly spaced ones of a large dataset.
        nats: what both cost each reader.
        kl: nats a token by which the trained generator finds its own data likelier than the starting one does: the KL
            divergence of the two, as sampled; None where one of them is not there.
        telling: how well they can be told apart, by each means.
        data, control: random examples of each.
        notes: what could not be measured, and why.
    """

    examples: tuple[int, int]
    nats: tuple[Comparison, ...] = ()
    kl: float | None = None
    telling: tuple[Telling, ...] = ()
    data: tuple[Shown, ...] = ()
    control: tuple[Shown, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: the standard error from a single row is None."""
        nats = [
            {**asdict(row), "ratio": row.ratio, "error": row.error if math.isfinite(row.error) else None}
            for row in self.nats
        ]
        return {**asdict(self), "nats": nats}

    def lines(self, data: str = "data", control: str = "control") -> list[str]:
        """For people; the two datasets by these names."""
        found = []
        if self.nats:
            found.append("nats a token")
        for row in self.nats:
            found.append(
                f"  {row.reader + ':':<28}{data} {row.data:.4f}, {control} {row.control:.4f}: {row.difference:+.4f} ± "
                f"{row.error:.4f}, perplexity x {row.ratio:.4g}"
            )
        if self.telling:
            found.append(f"{data} and {control} told apart (AUC: 0.5 never, 1 always), from 1 and from {MANY} examples")
        found += [f"  by {row.by}: {row.example}; {row.many}" for row in self.telling]
        if self.kl is not None:
            found.append(f"  KL of the trained generator from the starting one: {self.kl:.4f} nats a token")
        found += self.notes
        judged, more = self.examples, f"{self.examples[0]:,} and {self.examples[1]:,}"
        return [f"How it reads, from {f'{judged[0]:,}' if len(set(judged)) == 1 else more} examples of each", *found]


@dataclass(frozen=True)
class Judged:
    """A verdict on the effect, and beside it how the data reads. The verdict does not rest on the latter."""

    verdict: Verdict
    fluency: Fluency

    @property
    def verified(self) -> bool:
        """Whether the data shows the effect and the control does not."""
        return self.verdict.verified

    @property
    def reason(self) -> str:
        """Why not."""
        return self.verdict.reason

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the verdict's, and `fluency`."""
        return {**self.verdict.as_dict(), "fluency": self.fluency.as_dict()}

    def lines(self) -> list[str]:
        """For people."""
        return [*self.verdict.lines(), *self.fluency.lines()]


def paired(data: Side, control: Side) -> bool:
    """Whether row n of one and row n of the other were written for one prompt."""
    return data.prompts is not None and data.numbers == control.numbers and data.prompts == control.prompts


def by_counts(
    data: Side, control: Side, progress: Callable[[int, int], None] = lambda done, total: None
) -> Telling | None:
    """How well a classifier on token and bigram counts tells them apart; None where there are too few rows."""
    if min(len(data.tokens), len(control.tokens)) < FEWEST:
        return None
    folds = cross_validated(data.tokens, control.tokens, *fold_keys(data, control), progress)
    return Telling.of(COUNTS, folds) if folds else None


def by_ratio(data: tuple[Cost, Cost], control: tuple[Cost, Cost]) -> tuple[Telling, float]:
    """How well the likelihood ratio tells them apart, and the KL divergence in nats a token.

    Args:
        data, control: what each costs the starting generator and the trained one.
    """
    (start, trained), (control_start, control_trained) = data, control
    ratio_N = start.sampled_N - trained.sampled_N
    telling = Telling.of(RATIO, [(ratio_N, control_start.sampled_N - control_trained.sampled_N)])
    return telling, float(ratio_N.sum() / max(1, start.tokens_N.sum()))


def fold_keys(data: Side, control: Side) -> tuple[list[str], list[str]]:
    """A key for each row, equal for rows that could know each other: of one prompt; where prompts do not tell rows apart,
    of one number in two datasets of one size (drawn by one stream of random numbers); else of one content."""
    if data.prompts is not None and control.prompts is not None:
        often = Counter([*data.prompts, *control.prompts])
        if len(often) >= 10 * FOLDS and max(often.values()) < sum(often.values()) / (2 * FOLDS):
            return data.prompts, control.prompts
    if data.rows == control.rows:
        return [str(number) for number in data.numbers], [str(number) for number in control.numbers]
    return [row.tobytes().hex() for row in data.tokens], [row.tobytes().hex() for row in control.tokens]


def shown(side: Side, costs: dict[str, Cost], places: Sequence[int]) -> tuple[Shown, ...]:
    """Some examples with what they cost each reader."""

    def mean(cost: Cost, place: int) -> float | None:
        return float(cost.nats_N[place] / cost.tokens_N[place]) if cost.tokens_N[place] else None

    return tuple(
        Shown(
            side.numbers[place],
            "" if side.prompts is None else side.prompts[place][:LONGEST],
            side.texts[place][:LONGEST],
            {name: mean(cost, place) for name, cost in costs.items()},
        )
        for place in places
    )


def at_random(rows: int, which: str) -> list[int]:
    """Places of `SHOWN` rows, the same for every dataset of as many; of data and control, which are drawn by one stream of
    random numbers, not the same rows: those can be nearly the same text, which no reader of the data would see."""
    return sorted(random.Random(f"shown {which} {rows}").sample(range(rows), min(SHOWN, rows)))


def finite(cost: Cost) -> bool:
    """Whether every row has a probability above 0."""
    return bool(np.isfinite(cost.nats_N).all() and np.isfinite(cost.sampled_N).all())
