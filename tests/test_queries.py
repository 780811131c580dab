"""Several metrics in one run and one walk back: the numbers of as many single runs. float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from cases import ELEMENTS, Case
from torch import Tensor, nn
from toys import ToyLM

from dpg_cli.engine import Batches, OptimizerSpec, Recipe, metagradient, metagradients
from dpg_cli.engine.inner import remembered as remembered_module
from dpg_cli.engine.inner.product import times
from dpg_cli.engine.reverse.forms import linear
from dpg_cli.errors import BadValueError


def weight_norm(parameters: dict[str, Tensor], model: nn.Module) -> Tensor:
    return -sum(value.square().sum() for value in parameters.values())  # type: ignore[return-value]


METRICS = [HeldOutLoss(make_examples(4, seed=9)), weight_norm, HeldOutLoss(make_examples(3, seed=12))]


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def agree(model: nn.Module, examples: Any, recipe: Recipe, **options: Any) -> None:
    """All metrics at once, against one by one."""
    options["visits"] = True
    together = metagradients(model, examples, recipe, METRICS, **options)
    assert len(together) == 3
    assert together.token_Q_N_S.shape == (3, *examples.ids_N_S.shape)
    for query, metric in enumerate(METRICS):
        alone = metagradient(model, examples, recipe, metric, **options)
        assert alone.token_N_S.norm() > 1e-6
        assert abs(float(together.value_Q[query]) - alone.value) < 1e-12
        assert relative(together.token_Q_N_S[query], alone.token_N_S) < 1e-10
        assert relative(together.example_Q_N[query], alone.example_N) < 1e-10
        assert together.visits is not None and alone.visits is not None
        assert relative(together.visits[query].credit_M, alone.visits.credit_M) < 1e-10
        assert torch.equal(together.visits[query].example_M, alone.visits.example_M)
        assert together[query].measures == alone.measures
    assert relative(together.example_Q_N[0], together.example_Q_N[2]) > 1e-3  # they ask different things


@pytest.mark.parametrize(
    "case",
    [
        Case("adamw-eps_root", 1),
        Case("adamw-eps_root", 8, "llama", False),
        *(Case(name, 3, label="all", elements=ELEMENTS["all"]) for name in ("adamw-eps_root", "sgd-nesterov", "muon")),
        Case("adamw-eps_root", 3, "llama", True, label="all", elements=ELEMENTS["all"]),
    ],
    ids=lambda case: case.name,
)
def test_equals_single_runs(case: Case) -> None:
    agree(case.model(), case.examples(), case.recipe, weights_N=case.weights())


RECIPE = Recipe(OptimizerSpec("adamw", lr=0.02, eps_root=1e-5), max_grad_norm=0.3, batches=Batches(3, epochs=2))


@pytest.mark.parametrize("options", [{"memory": "sqrt"}, {"memory": "offload"}, {"packing": True}, {"micro_batch": 2}],
                         ids=str)  # fmt: skip
def test_whatever_the_states_and_the_rows(options: dict[str, Any]) -> None:
    agree(make_target("gpt2", tied=False), make_examples(8), RECIPE, **options)


def test_adapters() -> None:
    pytest.importorskip("peft")
    from dpg_cli.models.lora import Lora, adapt

    model = adapt(make_target("llama", tied=True), Lora(2, 4.0), 1).eval()
    agree(model, make_examples(8), RECIPE, packing=True, memory="sqrt")


@pytest.mark.parametrize("limit", [1 << 29, 3000, 0])
@pytest.mark.parametrize("memory", ["keep", "sqrt"])
def test_products_are_shared_as_far_as_there_is_room(memory: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every linear map's six products in a dual pass and its reverse, two are made once for all queries."""
    count = 0

    def counting(*given: Any) -> Tensor:
        nonlocal count
        count += 1
        return times(*given)

    monkeypatch.setattr(linear, "times", counting)  # of the products, what can be remembered alone
    monkeypatch.setattr(remembered_module, "LIMIT", limit)
    monkeypatch.setattr(remembered_module.Remembered.__init__, "__defaults__", (limit,))
    model, examples = make_target("gpt2", tied=True), make_examples(6)
    metagradient(model, examples, RECIPE, METRICS[0], memory=memory)
    one, count = count, 0
    found = metagradients(model, examples, RECIPE, METRICS, memory=memory)
    assert relative(found.token_Q_N_S[2], metagradient(model, examples, RECIPE, METRICS[2]).token_N_S) < 1e-10
    three = count
    if limit == 1 << 29:
        assert three < 1.3 * one if memory == "sqrt" else three <= one + 40
    if limit == 0:
        assert three > 2.5 * one


class Cube(torch.autograd.Function):
    """x³, which has a backward of its own and no tangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * bar


class Cubic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + Cube.apply(x)


def test_double_backward_and_bf16() -> None:
    """Models without a forward derivative; and the error of bf16 is the worst of all queries."""
    model = ToyLM(Cubic())
    agree(model, make_examples(6), RECIPE, memory="sqrt")
    assert "double backward" in metagradients(model, make_examples(6), RECIPE, METRICS).notes[0]
    small = make_target("gpt2", tied=True, dtype=torch.float32)
    recipe = Recipe(OptimizerSpec("adamw", lr=1e-3, eps=0.1), batches=Batches(3), precision="bf16")
    found = metagradients(small, make_examples(6), recipe, METRICS)
    each = [metagradient(small, make_examples(6), recipe, metric).stats["precision_error"] for metric in METRICS]
    assert found.stats["precision_error"] == pytest.approx(max(each), rel=1e-3)
    assert max(each) > 1e-4


def test_no_metric_is_refused() -> None:
    with pytest.raises(BadValueError, match="no metric"):
        metagradients(make_target("gpt2", tied=True), make_examples(4), RECIPE, [])
