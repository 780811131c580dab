"""Can the scores be trusted? Retraining without random parts of the data, beside what the scores predict of it.

    predicted   -Σ_{i left out} τ_i                          to first order
    measured    Φ(θ_T without them) - Φ(θ_T)                 w_i = 0 for them: batches, order and normaliser as they were
    LDS         Spearman correlation of the two over random subsets (linear datamodelling score: Park et al., arXiv 2303.14186)

Every finished retraining is a line of `SCORES.validation.jsonl`: the same command goes on with it after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpg_cli.attribution.attribute import Request, Setup, set_up
from dpg_cli.attribution.key import rows_sum
from dpg_cli.attribution.reading import Table, place_of_validation, read_scores
from dpg_cli.engine.metagrad import outcomes
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import quiet_transformers
from dpg_cli.runs.files import reading, write_json
from dpg_cli.settings.config import Config

TRUSTED = 0.8  # LDS below which a remedy is named
RESAMPLED = 2000  # of the bootstrap


@dataclass(frozen=True)
class Wish:
    """What is retrained.

    Attributes:
        subsets: how many times.
        share: of the examples, left out each time.
    """

    subsets: int
    share: float = 0.1

    def left_out(self, count: int, seed: int) -> torch.Tensor:
        """True for what each retraining leaves out, (subsets, N)."""
        rng = torch.Generator().manual_seed(seed)
        out = torch.zeros(self.subsets, count, dtype=torch.bool)
        for subset in out:
            subset[torch.randperm(count, generator=rng)[: max(1, round(self.share * count))]] = True
        return out


@dataclass(frozen=True)
class Score:
    """How well the scores of one query predict.

    Attributes:
        query: its name.
        lds: the linear datamodelling score, -1 to 1.
        low, high: its 95 % interval, by resampling the subsets.
        slope: of the measured on the predicted change, by least squares through 0; 1 where first order is the whole truth.
        predicted, measured: changes of Φ, one a subset.
    """

    query: str
    lds: float
    low: float
    high: float
    slope: float
    predicted: list[float]
    measured: list[float]


@dataclass(frozen=True)
class Validation:
    """The verdict on some scores.

    Attributes:
        scores: of each query.
        share: of the examples, left out each time.
        examples: N.
        remedy: what to do where an LDS is low; empty where none is.
    """

    scores: list[Score]
    share: float
    examples: int
    remedy: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "scores": [vars(score) for score in self.scores]}

    def lines(self) -> list[str]:
        """For people."""
        found = [
            f"{score.query}: LDS {score.lds:.3f} (95 %: {score.low:.3f} to {score.high:.3f}) over {len(score.predicted)} retrainings "
            f"without a random {self.share:.0%} of the examples; measured / predicted {score.slope:.2f}."
            for score in self.scores
        ]
        return [*found, *([self.remedy] if self.remedy else [])]


def progress_of(scores: Path) -> Path:
    """Where the retrainings are kept until all are done."""
    return scores.with_name(f"{scores.name}.validation.jsonl")


def made_alike(config: Config, request: Request) -> bool:
    """Whether scores of this request are there already, by what their record says of settings and data's place."""
    if not request.out.is_file():
        return False
    record = read_scores(request.out).record
    same = record.get("recipe") == config.inner.model_dump(mode="json") and record.get("seed") == config.seed
    return same and record.get("request") == request.as_dict()


def validate(
    config: Config,
    request: Request,
    wish: Wish,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Validation:
    """Retrain, or go on retraining, and compare.

    Args:
        config, request: those that the scores were made with, which lie at `request.out`.
        wish: what is retrained.
        on_stage, on_note: called with the name of each stage, and with its cost.
        on_progress: called as progress("retraining", done, of how many).

    Raises:
        UsageError: if the scores are not of this data, recipe and target, or the retrainings were begun with another wish.
        DegenerateError: if a retraining diverges.
    """
    table = read_scores(request.out)
    setup = set_up(config, request, on_stage, on_note)
    require_same(table, setup)
    count, place = len(setup.examples), progress_of(request.out)
    out = wish.left_out(count, config.seed)
    header = {"of": _sum_of(table), "subsets": wish.subsets, "share": wish.share, "seed": config.seed}
    done = begun(place, header)
    on_stage(f"retraining {wish.subsets} times without a random {wish.share:.0%} of {count:,} examples")
    on_note(
        f"{len(setup.plan):,} optimiser steps each"
        + (f"; {len(done)} are done" if done else "")
        + f"; kept in {place.name} until all are done, so that the same command goes on."
    )
    base = [query.after for query in table.queries]
    missing = range(len(done), wish.subsets)
    weights = ((~out[number]).to(torch.float32) for number in missing)
    on_progress("retraining", len(done), wish.subsets)
    with place.open("a", encoding="utf-8") as file, quiet_transformers():
        runs = outcomes(
            setup.target.model, setup.examples, setup.recipe, setup.metrics, weights,
            plan=setup.plan, micro_batch=setup.micro_batch, packing=config.inner.packing,
            share_prefixes=config.inner.share_prefixes, start=setup.start, second_order=config.inner.second_order,
        )  # fmt: skip
        for number, values in zip(missing, runs, strict=True):
            file.write(json.dumps({"subset": number, "phi": values}) + "\n")
            file.flush()
            done.append(values)
            on_progress("retraining", number + 1, wish.subsets)
    left = out.double().numpy()
    scores = [
        score_of(
            query.name,
            -(left @ tau_N[setup.found.trained]),
            np.array([values[q] for values in done]) - after,
            config.seed,
        )
        for q, (query, tau_N, after) in enumerate(zip(table.queries, table.scores_Q_N, base, strict=True))
        if after is not None
    ]
    found = Validation(scores, wish.share, count, remedy_of(scores, table, config))
    write_json(place_of_validation(request.out), found.as_dict())
    place.unlink()
    return found


def score_of(query: str, predicted: np.ndarray, measured: np.ndarray, seed: int) -> Score:
    """The score of one query, with its interval."""
    rng, count = np.random.default_rng(seed), len(predicted)
    drawn = rng.integers(0, count, (RESAMPLED, count))
    spread = [value for rows in drawn if not np.isnan(value := spearman(predicted[rows], measured[rows]))]
    low, high = np.quantile(spread, [0.025, 0.975]) if spread else (float("nan"), float("nan"))
    square = float(predicted @ predicted)
    slope = float(predicted @ measured) / square if square else 0.0
    lds = spearman(predicted, measured)
    return Score(
        query, 0.0 if np.isnan(lds) else lds, float(low), float(high), slope, predicted.tolist(), measured.tolist()
    )


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation, equal values sharing their mean rank; NaN where one of the two is constant."""
    ranks = []
    for values in (first, second):
        _, place, many = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(many)
        ranks.append((ends - (many - 1) / 2)[place])
    if min(rank.std() for rank in ranks) == 0:
        return float("nan")
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def remedy_of(scores: Sequence[Score], table: Table, config: Config) -> str:
    """What makes scores predict, where they do not: the facts of metasmoothness (DESIGN §7, docs/check.md)."""
    low = [score for score in scores if score.lds < TRUSTED]
    if not low:
        return ""
    inner, median = config.inner, table.record.get("gradient_median")
    floor = inner.eps + inner.eps_root**0.5
    causes = []
    if inner.optimizer in ("adam", "adamw") and isinstance(median, float) and floor < 0.1 * median:
        causes.append(f"ε = {floor:.0e} is far below the gradients ({median:.0e}), and the optimiser nearly sign(g)")
        causes.append(f"try --set inner.eps={median:.0e}")
    causes.append(f"a lower learning rate than {inner.lr:g}, larger batches, or fewer epochs make the run smoother")
    return (
        f"An LDS below {TRUSTED} ({', '.join(score.query for score in low[:3])}): these scores do not foretell retraining; "
        f"{'; '.join(causes)}."
    )


def require_same(table: Table, setup: Setup) -> None:
    """Refuse scores that are not of this run.

    Raises:
        UsageError: naming what differs.
    """
    record = table.record
    own = [query.name for query in setup.queries]
    known = [query.name for query in table.queries]
    pairs = {
        "data": (record.get("examples_sha256"), rows_sum(setup.found)),
        "target": (record.get("fingerprint"), setup.made_of),
        "questions": (known, own if len(own) > 1 or len(known) > 1 else known),
    }
    differs = [what for what, (one, other) in pairs.items() if one != other]
    if differs:
        raise UsageError(f"{table.path} is of another {' and '.join(differs)}.", "Add --overwrite to score anew.")


def begun(place: Path, header: dict[str, Any]) -> list[list[float]]:
    """Φ of the retrainings that are done; a line that a kill cut short is done again.

    Raises:
        UsageError: if they were begun otherwise.
    """
    if not place.is_file():
        place.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    with reading(place):
        first, *lines = place.read_text(encoding="utf-8").split("\n")
    try:
        same = json.loads(first) == header
    except ValueError:
        same = False
    if not same:
        raise UsageError(
            f"{place} was begun for other scores, or another number or share.", f"Give those, or remove {place}."
        )
    whole = lines[:-1]  # after the last line break stands nothing, or a torn line
    place.write_text("\n".join([first, *whole]) + "\n", encoding="utf-8")
    return [json.loads(line)["phi"] for line in whole]


def _sum_of(table: Table) -> str:
    return hashlib.sha256(np.ascontiguousarray(table.scores_Q_N).tobytes()).hexdigest()
