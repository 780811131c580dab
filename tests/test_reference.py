"""The fast metagradient against the slow, readable one, and both against differences of stock runs. All in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders import HeldOutLoss, make_examples
from cases import CASES, Case
from optimizers_table import OPTIMIZERS
from torch import Tensor, nn

from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.params import ParameterSpace

METRIC = HeldOutLoss(make_examples(4, seed=9))


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-4
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_fast_equals_reference(case: Case) -> None:
    slow, fast = case.slow(METRIC, labels=True), case.fast(METRIC, labels=True)
    assert fast.value == pytest.approx(slow.value, rel=1e-12)
    assert relative(fast.token_N_S, slow.token_N_S) < 1e-9
    assert relative(fast.example_N, slow.example_N) < 1e-9
    assert relative(fast.token_N_S.sum(1), fast.example_N) < 1e-12
    assert fast.label_N_S_V is not None
    assert slow.label_N_S_V is not None
    assert relative(fast.label_N_S_V, slow.label_N_S_V) < 1e-9
    assert bool((fast.token_N_S[~case.examples().label_N_S] == 0).all())
    assert fast.final.keys() == slow.final.keys()
    assert all(relative(fast.final[name], value) < 1e-12 for name, value in slow.final.items())
    assert fast.measures == pytest.approx(slow.measures)
    # of entries that are not 0: rounding makes some of those that should be, which shifts the median by a rank or two
    assert fast.gradient_median == pytest.approx(slow.gradient_median, rel=1e-2)


def stock_value(case: Case, weights_N: Tensor) -> float:
    """Φ after fine-tuning as anybody would write it: the model's own loss, and torch's optimiser where it has this one."""
    model, examples, row = case.model().eval(), case.examples(), OPTIMIZERS[case.optimizer]
    if row.stock is None:
        run = TargetRun(model, ParameterSpace(model), case.normalization, examples.ids_N_S.shape[1])
        end = inner_run(run, run.space.read(model), examples, row.spec, weights_N, case.batch).theta
        with torch.no_grad():
            return float(METRIC(run.space.views(end), model))
    optimizer = row.stock(list(model.parameters()), row.spec)
    for start in range(0, len(examples), case.batch):
        batch = slice(start, start + case.batch)
        ids, label = examples.ids_N_S[batch], examples.label_N_S[batch]
        logits = model(input_ids=ids, attention_mask=examples.attention_N_S[batch].long(), use_cache=False).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        total = label.sum() if case.normalization == "token" else label.numel()
        optimizer.zero_grad()
        ((losses * label[:, 1:]).sum(1) * weights_N[batch]).sum().div(total).backward()
        optimizer.step()
    with torch.no_grad():
        return float(METRIC(dict(model.named_parameters()), model))


def finite_differences(case: Case) -> Tensor:
    """∂Φ/∂w_i by the five-point rule: error h⁴ Φ⁗/30 from the rule, about 1e-16 |Φ| / h from rounding."""
    value, weights, h = partial(stock_value, case), case.weights(), OPTIMIZERS[case.optimizer].h
    slopes = torch.zeros_like(weights)
    for i in range(len(weights)):
        step = torch.zeros_like(weights)
        step[i] = h
        a, b, c, d = (value(weights + k * step) for k in (-2, -1, 1, 2))
        slopes[i] = (a - 8 * b + 8 * c - d) / (12 * h)
    return slopes


JUDGED = [
    *(Case(optimizer) for optimizer in OPTIMIZERS),
    Case("adamw", 1, "llama", False),
    Case("adamw", 8, "llama", True, "example"),
    Case("sgd-nesterov", 8, "gpt2", False, "example", ragged=False),
]


@pytest.mark.parametrize("case", JUDGED, ids=[case.name for case in JUDGED])
def test_both_equal_finite_differences_of_stock_runs(case: Case) -> None:
    slow, fast, numeric = case.slow(METRIC), case.fast(METRIC), finite_differences(case)
    assert relative(slow.example_N, numeric) < 1e-6
    assert relative(fast.example_N, numeric) < 1e-6
    assert fast.value == pytest.approx(stock_value(case, case.weights()), rel=1e-12)


def test_the_table_has_weights_that_nothing_moves() -> None:
    """Unused positions and token rows have g = 0 throughout, where the root of AdamW with ε_root = 0 has no derivative."""
    case = Case("adamw", tied=False)
    assert OPTIMIZERS[case.optimizer].spec.eps_root == 0
    assert case in CASES
    model, examples = case.model(), case.examples()
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    trace = inner_run(run, run.space.read(model), examples, OPTIMIZERS[case.optimizer].spec, case.weights(), case.batch)
    assert len(trace.steps) == 3
    still = torch.stack([step.grad == 0 for step in trace.steps]).all(0)
    assert int(still.sum()) > 100
