"""The fast metagradient against the slow, readable one, and both against differences of stock runs. All in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from builders import HeldOutLoss, make_examples
from cases import CASES, Case
from optimizers_table import OPTIMIZERS
from torch import Tensor, nn

from dpg_cli.engine import reference_metagradient
from dpg_cli.engine.inner.packing import pack
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import BadValueError

METRIC = HeldOutLoss(make_examples(4, seed=9))
FELT = ("all", "clip", "epochs", "groups", "packed", "lora")  # labels of cases whose run is differenced too


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-4
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_fast_equals_reference(case: Case) -> None:
    slow, fast = case.slow(METRIC, labels=True, visits=True), case.fast(METRIC, labels=True, visits=True)
    assert fast.value == pytest.approx(slow.value, rel=1e-12)
    assert relative(fast.token_N_S, slow.token_N_S) < 1e-9
    assert relative(fast.example_N, slow.example_N) < 1e-9
    assert relative(fast.token_N_S.sum(1), fast.example_N) < 1e-12
    assert fast.label_N_S_V is not None
    assert slow.label_N_S_V is not None
    assert relative(fast.label_N_S_V, slow.label_N_S_V) < 1e-9
    assert fast.visits is not None
    assert slow.visits is not None
    assert relative(fast.visits.credit_M, slow.visits.credit_M) < 1e-9
    assert torch.equal(fast.visits.example_M, slow.visits.example_M)
    assert torch.equal(fast.visits.step_M, slow.visits.step_M)
    by_visit = torch.zeros_like(fast.example_N).index_add_(0, fast.visits.example_M, fast.visits.credit_M)
    assert relative(by_visit, fast.example_N) < 1e-12
    assert bool((fast.token_N_S[~case.examples().label_N_S] == 0).all())
    assert fast.final.keys() == slow.final.keys()
    assert all(relative(fast.final[name], value) < 1e-12 for name, value in slow.final.items())
    assert fast.measures == pytest.approx(slow.measures)
    clipped = fast.stats.get("clipped_share", 0.0)
    assert (clipped > 0) == (0 < case.recipe.max_grad_norm < 1e3)
    if case.packing:
        batches = [case.examples().at(rows) for rows in case.recipe.plan(case.examples()).rows]
        assert any(pack(batch) is not batch for batch in batches)
    # of entries that are not 0: rounding makes some of those that should be, which shifts the median by a rank or two
    assert fast.gradient_median == pytest.approx(slow.gradient_median, rel=1e-2)


def stock_value(case: Case, weights_N: Tensor) -> float:
    """Φ after fine-tuning as anybody would write it: the model's own loss, and torch's optimiser where it has this one.

    Where a recipe has more than an optimiser, the inner run itself: it ends at the weights of the Trainer (`test_fidelity.py`).
    """
    model, examples, row = case.model().eval(), case.examples(), OPTIMIZERS[case.optimizer]
    if row.stock is None or case.elements:
        with case.recipe.prepared(model) as (target, _):
            space, width = case.recipe.space(target), examples.ids_N_S.shape[1]
            run = TargetRun(target, space, case.recipe.normalization, width, packing=case.packing)
            end = inner_run(run, space.read(target), examples, case.recipe, weights_N).theta
            with torch.no_grad():
                return float(METRIC(space.views(end), target))
    batch_size = case.recipe.batches.size
    optimizer = row.stock(list(model.parameters()), row.spec)
    for start in range(0, len(examples), batch_size):
        batch = slice(start, start + batch_size)
        ids, label = examples.ids_N_S[batch], examples.label_N_S[batch]
        logits = model(input_ids=ids, attention_mask=examples.attention_N_S[batch].long(), use_cache=False).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        total = label.sum() if case.normalization == "token" else label.numel()
        optimizer.zero_grad()
        ((losses * label[:, 1:]).sum(1) * weights_N[batch]).sum().div(total).backward()
        optimizer.step()
    with torch.no_grad():
        return float(METRIC(dict(model.named_parameters()), model))


def directions(case: Case, count: int = 2) -> Tensor:
    """Random directions of the data weights, of unit length, (D, N)."""
    drawn = torch.randn(
        count, len(case.weights()), dtype=torch.float64, generator=torch.Generator().manual_seed(case.steps)
    )
    return drawn / drawn.norm(dim=1, keepdim=True)


def finite_differences(case: Case) -> Tensor:
    """∂Φ along the directions, (D,), by the five-point rule: error h⁴ Φ⁗/30 from the rule, about 1e-16 |Φ| / h from rounding."""
    value, weights, h = partial(stock_value, case), case.weights(), OPTIMIZERS[case.optimizer].h
    slopes = []
    for direction in directions(case):
        a, b, c, d = (value(weights + k * h * direction) for k in (-2, -1, 1, 2))
        slopes.append((a - 8 * b + 8 * c - d) / (12 * h))
    return torch.tensor(slopes, dtype=torch.float64)


JUDGED = [
    *(Case(optimizer) for optimizer in OPTIMIZERS),
    Case("adamw", 1, "llama", False),
    Case("adamw", 8, "llama", True, "example"),
    Case("sgd-nesterov", 8, "gpt2", False, "example", "even"),
    *(case for case in CASES if case.name.startswith("llama-untied-adamw-eps_root") and case.label in FELT),
]


@pytest.mark.parametrize("case", JUDGED, ids=[case.name for case in JUDGED])
def test_both_equal_finite_differences_of_stock_runs(case: Case) -> None:
    slow, fast, numeric = case.slow(METRIC), case.fast(METRIC), finite_differences(case)
    assert relative(directions(case) @ slow.example_N, numeric) < 1e-6
    assert relative(directions(case) @ fast.example_N, numeric) < 1e-6
    assert fast.value == pytest.approx(stock_value(case, case.weights()), rel=1e-12)


def test_the_table_has_weights_that_nothing_moves() -> None:
    """Unused positions and token rows have g = 0 throughout, where the root of AdamW with ε_root = 0 has no derivative."""
    case = Case("adamw", tied=False)
    assert OPTIMIZERS[case.optimizer].spec.eps_root == 0
    assert case in CASES
    model, examples = case.model(), case.examples()
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    trace = inner_run(run, run.space.read(model), examples, OPTIMIZERS[case.optimizer].spec, case.weights(), 4)
    assert len(trace.steps) == 3
    still = torch.stack([step.grad == 0 for step in trace.steps]).all(0)
    assert int(still.sum()) > 100


def test_the_reference_takes_the_metrics_that_the_engine_takes() -> None:
    """A plain function, of the weights that it is given or of the model that has them; an error where it cannot be right."""
    case, held_out = Case("adamw", padding=True), make_examples(4, seed=9)

    def by_call(model: nn.Module) -> Tensor:
        logits = model(input_ids=held_out.ids_N_S, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.mT, held_out.ids_N_S[:, 1:], reduction="none")
        return -(losses * held_out.label_N_S[:, 1:]).sum() / held_out.label_N_S.sum()

    slow = case.slow(by_call)
    assert relative(slow.token_N_S, case.slow(METRIC).token_N_S) < 1e-12
    assert relative(slow.token_N_S, case.fast(by_call).token_N_S) < 1e-9
    examples = case.examples()
    with pytest.raises(BadValueError, match="drawn tokens alone"):
        reference_metagradient(case.model(), replace(examples, soft=cast(Any, object())), case.recipe, METRIC)
    with pytest.raises(BadValueError, match="weights_N has the shape"):
        case.slow(METRIC, torch.ones(3))
