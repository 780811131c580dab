"""The study's mathematics, its store, and that its page is what the stored raw results give."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import readme_claims, report  # noqa: E402
from benchmarks.study import credit, lds, metasmoothness, theorem, toy, transfer, world  # noqa: E402
from benchmarks.study.experiments import EXPERIMENTS  # noqa: E402
from benchmarks.study.statistics import (  # noqa: E402
    geometric,
    interval,
    pearson,
    ranks,
    reach,
    spearman,
    t_quantile,
    trailing,
)
from benchmarks.study.store import Store, key_of  # noqa: E402
from dpg_cli.engine import OptimizerSpec  # noqa: E402

PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
ADAMW = OptimizerSpec("adamw", lr=0.3, eps=1.0, beta2=0.95)


def test_spearman_by_hand() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    # d = (1, 1, 0, 1, 1): 1 - 6 * 4 / (5 * 24)
    assert spearman([1, 2, 3, 4, 5], [20, 10, 30, 50, 40]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [1.0, math.e, 100.0]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [0, -5, -6]) == pytest.approx(-1.0)
    assert math.isnan(pearson([1, 1, 1], [1, 2, 3]))


def test_intervals_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([5.0]).half)
    assert t_quantile(40) == pytest.approx(2.021, abs=1e-3)
    assert t_quantile(120) == pytest.approx(1.980, abs=1e-3)


def test_intervals_cover_the_mean_in_95_of_100_draws() -> None:
    rng = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 4, generator=rng).tolist()
    covered = sum(found.low <= 0 <= found.high for found in map(interval, draws)) / len(draws)
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors of 2,000 draws


def test_curves_by_hand() -> None:
    assert trailing([1.0, 2.0, 3.0, 5.0], 2) == [1.0, 1.5, 2.5, 4.0]
    assert reach([10, 20, 30], [0.1, 0.5, 0.4], 0.45) == 20
    assert reach([10, 20], [0.1, 0.2], 0.3) == math.inf
    assert geometric([1.0, 100.0]) == pytest.approx((10.0, 1.0, 100.0))


def test_every_dataset_is_enumerated_once() -> None:
    made = toy.toy(0)
    for n, steps in ((3, 1), (4, 2), (4, 4)):
        found = list(toy.datasets(made, n, steps))
        size = math.comb(n // steps + toy.TOKENS - 1, toy.TOKENS - 1)
        assert len(found) == size**steps
        assert sum(chance for _, chance in found) == pytest.approx(1.0, abs=1e-12)
        assert all(int(counts.sum()) == n for counts, _ in found)
    assert float(made.probability_Y.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(made.probability_Y @ made.score_Y_F, torch.zeros(made.score_Y_F.shape[1]).double())


@pytest.mark.parametrize(("n", "steps", "length"), [(2, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_the_enumerated_true_gradient_is_the_derivative_of_the_enumerated_mean(n: int, steps: int, length: int) -> None:
    """Central differences of E[Φ] by the generator's parameters, in float64, along a random direction."""
    made = toy.toy(0, length)
    found = theorem.gradients(made, ADAMW, n, steps)
    values = [toy.attributed(made, counts, ADAMW)[0] for counts, _ in toy.datasets(made, n, steps)]
    generator = toy.model(0)
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(7)).double() for p in generator.parameters()
    ]

    def mean(h: float) -> float:
        moved = copy.deepcopy(generator)
        with torch.no_grad():
            for parameter, d in zip(moved.parameters(), direction, strict=True):
                parameter.add_(h * d)
            chances = toy.log_probability(moved, made.rows).exp()
        there = toy.Toy(made.target, made.metric, made.rows, chances, made.score_Y_F)
        return sum(v * chance for v, (_, chance) in zip(values, toy.datasets(there, n, steps), strict=True))

    h = 1e-5
    slope = (mean(h) - mean(-h)) / (2 * h)
    flat = torch.cat([d.flatten() for d in direction])
    assert float(found["true"] @ flat) == pytest.approx(slope, rel=1e-6)
    assert float(found["value"]) == pytest.approx(mean(0.0), rel=1e-12)


def test_weights_of_kinds_are_repeated_examples() -> None:
    """Φ and τ of counts (2, 0, 1) are those of a batch that repeats the first completion."""
    from dpg_cli.engine import Examples, metagradient

    made = toy.toy(1)
    value, tau_T_Y, _ = toy.attributed(made, torch.tensor([[2, 0, 1]]), ADAMW)
    ids = made.rows.ids_N_S[[0, 0, 2]]
    plain = metagradient(made.target, Examples.from_sequences(ids.tolist()), ADAMW, made.metric)
    assert value == pytest.approx(plain.value, rel=1e-12)
    torch.testing.assert_close(tau_T_Y[0, [0, 0, 2]], plain.example_N)


def test_the_theorems_error_falls_with_the_examples_and_vanishes_with_sgds_rate() -> None:
    made = toy.toy(0)

    def error(spec: OptimizerSpec, n: int) -> float:
        found = theorem.gradients(made, spec, n)
        return float((found["dpg"] - found["true"]).norm() / found["true"].norm())

    smooth = OptimizerSpec("adamw", lr=0.03, eps=1.0, beta2=0.95)
    assert error(smooth, 8) < 0.35 * error(smooth, 2)  # 1/4 if exactly as 1/n
    assert error(OptimizerSpec("sgd", lr=1e-4), 4) < 1e-3


def test_square_of_a_mean_is_unbiased_and_its_interval_holds() -> None:
    rng = torch.Generator().manual_seed(3)
    wanted, inside, found = 4.0, 0, []
    for _ in range(200):
        draws = torch.randn(40, 30, generator=rng).double()
        draws[:, 0] += math.sqrt(wanted)
        value, low, high = credit.square_of_mean(draws)
        found.append(value)
        inside += low <= wanted <= high
    assert interval(found).low <= wanted <= interval(found).high
    assert inside / 200 > 0.88


@pytest.mark.slow
def test_dropped_weights_are_real_retraining_by_stock_pytorch() -> None:
    """Kept rows in their batches, the loss a sum over the full batch's tokens: torch.optim.AdamW gives the same Φ."""
    case = lds.Case(0, "smooth")
    keep_N = torch.ones(lds.EXAMPLES, dtype=torch.bool)
    keep_N[torch.randperm(lds.EXAMPLES, generator=torch.Generator().manual_seed(1))[:13]] = False
    model = copy.deepcopy(case.target.model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=case.optimizer.lr,
        betas=(0.9, case.optimizer.beta2),
        eps=case.optimizer.eps,
        weight_decay=0.0,
    )
    size = lds.EXAMPLES // case.steps
    for start in range(0, lds.EXAMPLES, size):
        total = sum(len(row) - 1 for row in case.sequences[start : start + size])
        optimizer.zero_grad()
        for i in range(start, start + size):
            if keep_N[i]:
                ids = torch.tensor([case.sequences[i]])
                (cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum") / total).backward()
        optimizer.step()
    with torch.no_grad():
        phi = float(case.metric({n: p.detach() for n, p in model.named_parameters()}, case.target.model))
    full, tau_N = case.tau()
    assert case.by_weights(keep_N) == pytest.approx(phi, abs=3e-7)  # float32
    assert full - phi == pytest.approx(float(tau_N[~keep_N].sum()), rel=0.35)


def test_the_store_keeps_replaces_and_orders(tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    store.add("thing", {"seed": 1}, [{"value": 0.5}, {"value": None, "more": "x"}])
    store.add("thing", {"seed": 0}, [{"value": 0.25}])
    store.add("thing", {"seed": 1}, [{"value": 1.5}])
    assert store.rows("thing") == [
        {"seed": 0, "value": 0.25, "more": None},
        {"seed": 1, "value": 1.5, "more": None},
    ]
    assert store.done("thing") == {key_of({"seed": 0}), key_of({"seed": 1})}
    with pytest.raises(ValueError, match="both settings and results"):
        store.add("thing", {"seed": 2}, [{"seed": 3}])
    with pytest.raises(ValueError, match="without rows"):
        store.add("thing", {"seed": 2}, [])


def test_cells_have_names_of_their_own_and_the_quick_ones_are_fewer() -> None:
    for name, module in EXPERIMENTS.items():
        full, quick = module.cells(False), module.cells(True)
        assert len({key_of(cell) for cell in full}) == len(full), name
        assert 0 < len(quick) < len(full), name


@pytest.mark.slow
def test_small_cells_measure_what_their_sections_read(tmp_path: Path) -> None:
    """A cell of the cheap kind from measurement to page and figure."""
    store = Store(tmp_path)
    for module, settings in (
        (theorem, theorem.cell(0, 2, 1, lr=theorem.SMALL_RATE)),
        (theorem, theorem.cell(0, 4, 1, lr=theorem.SMALL_RATE)),
        (theorem, theorem.cell(0, 2, 1)),
        (theorem, theorem.cell(0, 4, 1)),
        (theorem, theorem.cell(0, 4, 1, lr=0.1, optimizer="sign")),
        (credit, {"part": "learning", "seed": 0, "credit": "sequence", "steps": 3}),
        (credit, {"part": "learning", "seed": 0, "credit": "expected", "steps": 3}),
        (credit, {"part": "variance", "seed": 0, "sharpness": 20.0, "prompts": 4, "resampled": 6}),
        (metasmoothness, {**metasmoothness.cells(True)[0], "steps": 3}),
        (transfer, {"task": "pattern-67", "seed": 0, "steps": 2}),
    ):
        store.add(module.NAME, settings, module.measure(settings))
    from benchmarks.study.experiments import draw, sections

    page = "\n".join(sections(store, "figures"))
    assert page.count("**Expected**") >= 4
    assert page.count("**Came**") >= 4
    draw(store, tmp_path / "figures")
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "theorem",
        "credit",
        "metasmoothness",
        "transfer",
    }
    rows = store.rows("transfer")
    same = next(row for row in rows if row["target"] == "the same")
    assert len(rows) == 5 + len(transfer.OTHERS) - 1
    assert same["phi"] != same["control_phi"]


def test_the_small_world_is_blank_and_equal_under_a_seed() -> None:
    config = world.resolve(world.settings("pattern-67", 3, steps=1), [])
    first, second = world.build(config), world.build(config)
    torch.testing.assert_close(first.players.target.head, second.players.generator.head)
    assert first.players.target.head.shape == (world.VOCABULARY, 32)


def test_the_page_regenerates_identically_from_the_stored_raw_results() -> None:
    assert report.page(Store(ROOT / "benchmarks" / "results" / "study")) == PAGE


def test_each_claim_of_the_readme_exists_and_has_its_row() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for claim in readme_claims.CLAIMS:
        assert claim.excerpt in readme, claim.excerpt
        assert f"| {claim.excerpt} |" in PAGE
        if claim.place.startswith("# "):
            assert f"\n#{claim.place}\n" in PAGE, claim.place
        elif claim.place.startswith("tests/"):
            path, _, name = claim.place.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8")
        elif claim.place.startswith("make "):
            assert f"\n{claim.place[5:]}: " in (ROOT / "Makefile").read_text(encoding="utf-8")
        else:
            assert (ROOT / claim.place).is_file()


def test_what_the_study_had_to_show_is_in_its_raw_results() -> None:
    """The demands on the full study, from its stored rows."""
    store = Store(ROOT / "benchmarks" / "results" / "study")
    smooth = [row for row in store.rows("lds") if row["setting"] == "smooth"]
    assert min(lds.scores(smooth, round(lds.FRACTIONS[0] * lds.EXAMPLES), "weights")) >= lds.REQUIRED
    learning = [row for row in store.rows("credit") if row["part"] == "learning"]
    assert max(credit.shares(learning, "expected, γ = 0.5", "phi")) <= 0.1
    one = [r for r in store.rows("theorem") if (r["length"], r["steps"], r["optimizer"]) == (1, 1, "adamw")]
    assert -1.2 < theorem.slope([row for row in one if row["lr"] == theorem.SMALL_RATE]) < -0.8
