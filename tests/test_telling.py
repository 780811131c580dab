"""How well two kinds of examples can be told apart: against closed forms, enumeration and simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np
import pytest

from dpg_cli.evidence.fluency import classifier
from dpg_cli.evidence.fluency.auc import Auc, auc, grouped, placements
from dpg_cli.evidence.fluency.classifier import Events, cross_validated, events_of, objective
from dpg_cli.evidence.fluency.judge import MANY, Telling, by_counts, fold_keys
from dpg_cli.evidence.fluency.rows import Side

LENGTH = 3


def side(rows: Sequence[np.ndarray], prompts: list[str] | None = None) -> Side:
    return Side(list(rows), [""] * len(rows), prompts, list(range(len(rows))), len(rows))


def drawn(p: Sequence[float], count: int, seed: int, length: int = LENGTH) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).choice(len(p), size=(count, length), p=p))


def chains(first: Sequence[float], steps: np.ndarray, count: int, seed: int, length: int = LENGTH) -> list[np.ndarray]:
    """Rows of a Markov chain."""
    random = np.random.default_rng(seed)
    rows = [random.choice(len(first), size=count, p=first)]
    for _ in range(length - 1):
        rows.append((random.random(count)[:, None] > steps.cumsum(1)[rows[-1]]).sum(1))
    return list(np.stack(rows, 1))


def exact(first: dict[tuple[int, ...], float], second: dict[tuple[int, ...], float]) -> float:
    """The AUC of the likelihood ratio of two distributions over few outcomes."""
    ratio = {row: math.log(first[row] / second[row]) for row in first}
    return sum(
        first[one] * second[other] * (0.5 if math.isclose(ratio[one], ratio[other], abs_tol=1e-12) else ratio[one] > ratio[other])
        for one, other in product(first, second)
    )  # fmt: skip


def table(first: Sequence[float], steps: np.ndarray, length: int = LENGTH) -> dict[tuple[int, ...], float]:
    """The probability of every row of a chain."""
    return {
        row: float(first[row[0]] * np.prod([steps[a, b] for a, b in pairwise(row)]))
        for row in product(range(len(first)), repeat=length)
    }


def test_the_auc_counts_pairs() -> None:
    data, control = np.array([3.0, 1.0, 2.0, 2.0]), np.array([2.0, 0.0, 5.0])
    pairs = [(x > y) + 0.5 * (x == y) for x in data for y in control]
    assert auc([(data, control)]).value == pytest.approx(np.mean(pairs))
    assert placements(data, control).tolist() == pytest.approx([2 / 3, 1 / 3, 0.5, 0.5])
    assert auc([(data, control), (np.zeros(0), control)]).value == pytest.approx(np.mean(pairs))
    with pytest.raises(ValueError, match="both kinds"):
        auc([(data, np.zeros(0))])


@pytest.mark.parametrize("size", [1, 9])
def test_errors_are_those_of_repeated_draws(size: int) -> None:
    """The mean standard error against the spread over 400 datasets, and the value against the closed form."""
    random = np.random.default_rng(0)

    def once() -> Auc:
        folds = [(random.normal(0.4, 1.0, 40), random.normal(0.0, 1.5, 60)) for _ in range(3)]
        return auc(folds) if size == 1 else grouped(folds, size)

    found = [once() for _ in range(400)]
    truth = 0.5 * math.erfc(-math.sqrt(size) * 0.4 / math.sqrt(1 + 1.5**2) / math.sqrt(2))
    spread = np.std([one.value for one in found])
    assert np.mean([one.value for one in found]) == pytest.approx(truth, abs=0.01)
    assert np.mean([one.error for one in found]) == pytest.approx(spread, rel=0.12)


def test_many_examples_against_the_binomial() -> None:
    """A biased coin against a fair one: the likelihood ratio of 100 tosses counts heads, so its AUC is a sum over binomials."""
    p, q, count = 0.53, 0.5, 40_000
    pmf = {
        chance: np.array([math.comb(MANY, k) * chance**k * (1 - chance) ** (MANY - k) for k in range(MANY + 1)])
        for chance in (p, q)
    }
    below = pmf[q].cumsum() - pmf[q]
    truth = float((pmf[p] * (below + 0.5 * pmf[q])).sum())
    random = np.random.default_rng(1)
    data, control = ((random.random(count) < chance) * math.log(p * (1 - q) / (q * (1 - p))) for chance in (p, q))
    found = Telling.of("", [(data, control)])
    assert truth == pytest.approx(0.664, abs=0.001)
    assert abs(found.many.value - truth) < 3 * found.many.error < 0.06
    assert found.example.value == pytest.approx(0.5 + (p - q) / 2, abs=4 * found.example.error)


def test_two_multinomials_of_known_ratio() -> None:
    p, q = (0.5, 0.3, 0.2), (0.35, 0.35, 0.3)
    truth = exact(table(p, np.array([p] * 3)), table(q, np.array([q] * 3)))
    data, control = drawn(p, 4000, 0), drawn(q, 4000, 1)
    ratio = np.log(np.array(p) / np.array(q))
    known = auc([(np.array([ratio[row].sum() for row in data]), np.array([ratio[row].sum() for row in control]))])
    assert truth == pytest.approx(0.6522, abs=1e-4)
    assert abs(known.value - truth) < 4 * known.error
    learnt = by_counts(side(data), side(control))
    assert learnt is not None
    assert truth - 0.02 < learnt.example.value < truth + 3 * learnt.example.error
    assert learnt.many.value > 0.999


def test_order_is_seen_though_counts_are_equal() -> None:
    """Two chains whose tokens are as frequent at every place: only bigrams tell them apart."""
    first = (1 / 3, 1 / 3, 1 / 3)
    turn, back = (np.array([[a, b, c], [c, a, b], [b, c, a]]) for a, b, c in ((0.2, 0.5, 0.3), (0.2, 0.3, 0.5)))
    truth = exact(table(first, turn), table(first, back))
    data, control = chains(first, turn, 4000, 2), chains(first, back, 4000, 3)
    assert np.bincount(np.concatenate(data)) == pytest.approx(np.bincount(np.concatenate(control)), rel=0.05)
    found = by_counts(side(data), side(control))
    assert found is not None
    assert truth == pytest.approx(0.6728, abs=1e-4)
    assert truth - 0.02 < found.example.value < truth + 3 * found.example.error


def test_equal_distributions_are_not_told_apart() -> None:
    p = tuple(np.full(50, 1 / 50))
    for seed in (0, 2, 4):
        found = by_counts(side(drawn(p, 1500, seed, 12)), side(drawn(p, 1500, seed + 1, 12)))
        assert found is not None
        assert abs(found.example.value - 0.5) < 3 * found.example.error < 0.04
        assert abs(found.many.value - 0.5) < 3 * found.many.error


def test_separable_data_is_always_told() -> None:
    found = by_counts(side(drawn((0.5, 0.5, 0, 0), 200, 0)), side(drawn((0, 0, 0.5, 0.5), 200, 1)))
    assert found is not None
    assert (found.example.value, found.many.value) == (1, 1)
    assert found.example.error == 0


def test_twins_are_not_taken_for_each_other() -> None:
    """Rows that share their beginning with one row of the other kind, as drawn by one stream of random numbers. By content
    alone a twin that was learnt with the other label misleads; by number it is in the same fold."""
    random = np.random.default_rng(0)
    beginnings = random.integers(500, size=(600, 10))
    data, control = (list(np.concatenate([beginnings, random.integers(500, size=(600, 2))], 1)) for _ in range(2))
    found = by_counts(side(data), side(control))
    assert found is not None
    assert abs(found.example.value - 0.5) < 3 * found.example.error
    naive = auc(cross_validated(data, control, *([row.tobytes().hex() for row in rows] for rows in (data, control))))
    assert naive.value < 0.5 - 5 * naive.error


def test_the_order_of_rows_changes_nothing() -> None:
    p, q = (0.5, 0.3, 0.2), (0.4, 0.35, 0.25)
    data, control = side(drawn(p, 300, 0)), side(drawn(q, 300, 1))
    order = np.random.default_rng(2).permutation(300).tolist()
    again = by_counts(data.take(order), control.take(order[::-1]))
    assert again == by_counts(data, control)
    assert again != by_counts(side(drawn(p, 300, 5)), control)


def test_keys_of_folds() -> None:
    rows = [np.array([number]) for number in range(120)]
    prompts = [f"p{number // 2}" for number in range(120)]
    assert fold_keys(side(rows, prompts), side(rows, prompts)) == (prompts, prompts)
    few = ["one"] * 120
    numbers = list(map(str, range(120)))
    assert fold_keys(side(rows, few), side(rows, few)) == (numbers, numbers)
    assert fold_keys(side(rows), side(rows)) == (numbers, numbers)
    keys = fold_keys(side(rows), side(rows[:100]))
    assert len({*keys[0]}) == 120
    assert keys[1] == keys[0][:100]
    assert by_counts(side(rows), side(rows[:49])) is None


def test_events_by_hand() -> None:
    events = events_of([np.array([7, 9, 7]), np.array([], dtype=np.int64), np.array([9, 7])])
    assert events.length_N.tolist() == [7, 1, 5]
    # of 3 rows: intercept; tokens 7 and 9; bigrams start-7, 7-9, 9-7, start-9
    assert events.features == 7
    rows = np.split(events.feature_E, events.start_N[1:])
    assert [np.bincount(row, minlength=7)[:3].tolist() for row in rows] == [[1, 2, 1], [1, 0, 0], [1, 1, 1]]
    shared = set(rows[0][3:6].tolist()) & set(rows[2][2:4].tolist())
    assert len(shared) == 1  # 9-7
    again = events.take(np.array([2, 0]))
    assert again.length_N.tolist() == [5, 7]
    assert again.feature_E.tolist() == [*rows[2], *rows[0]]
    weight, value = np.arange(7.0), np.array([2.0, -1.0, 0.5])
    assert float(value @ events.sums(weight)) == pytest.approx(float(events.spread(value) @ weight))


def test_large_ids_and_bigrams_share_their_buckets() -> None:
    huge = [np.array([2**31 - 1, 2**31 - 2, 5]) for _ in range(4)]
    assert events_of(huge).features == 7
    many = [np.random.default_rng(0).integers(2**31, size=20_000)]
    assert events_of(many).features <= 2 * classifier.BUCKETS + 1
    assert events_of(many).features > 35_000  # few collisions


def test_the_gradient_of_the_objective() -> None:
    random = np.random.default_rng(0)
    events = events_of([random.integers(6, size=size) for size in (3, 5, 2, 4)])
    sign, weight = np.array([1.0, -1, 1, -1]), random.normal(size=events.features)
    value, gradient = objective(events, sign, weight, 0.7)
    assert value == pytest.approx(
        np.log1p(np.exp(-sign * events.sums(weight))).sum() + 0.35 * float(weight[1:] @ weight[1:])
    )
    for place in range(events.features):
        step = np.zeros_like(weight)
        step[place] = 1e-6
        up, down = objective(events, sign, weight + step, 0.7)[0], objective(events, sign, weight - step, 0.7)[0]
        assert (up - down) / 2e-6 == pytest.approx(gradient[place], abs=1e-7)
    assert isinstance(events, Events)
