"""The inner optimisers, each of the table: against torch's own, and their adjoints against differences and autograd. float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from builders import make_examples, make_target
from optimizers_table import OPTIMIZERS, SIZE, Row, ranges
from torch import Tensor

from dpg_cli.engine.inner.optimizers import (
    OptimizerSpec,
    Rate,
    State,
    adjoint,
    base,
    by_matrix,
    elasticity,
    initial_state,
    registered,
    update,
)
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.reverse.reference import STEPS, At
from dpg_cli.evidence.stock import fine_tune
from dpg_cli.settings.config import InnerConfig

EVERY = pytest.mark.parametrize("name", OPTIMIZERS)
AT = pytest.mark.parametrize("step", [0, 5])


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BLOCK", 16)


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-4
    return float((value - reference).norm() / reference.norm())


def draw(seed: int) -> Tensor:
    return torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def like_of(spec: OptimizerSpec, theta: Tensor, m: Tensor, v: Tensor) -> State:
    """A state with the vectors that the optimiser has."""
    return State(theta, m, v if len(initial_state(spec, theta).v) else theta.new_empty(0))


def point(spec: OptimizerSpec) -> tuple[State, Tensor, State]:
    """A state in the midst of a run, a gradient, and adjoints of the next state."""
    return like_of(spec, draw(1), draw(2), draw(3).abs()), draw(4), like_of(spec, draw(5), draw(6), draw(7))


def inner(left: State, right: State) -> float:
    return sum(float(a @ b) for a, b in zip(left, right, strict=True))


def test_every_optimizer_has_a_row() -> None:
    assert {row.spec.name for row in OPTIMIZERS.values()} == set(registered())
    assert all(row.plain or row.spec.name in STEPS for row in OPTIMIZERS.values())


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.stock])
def test_steps_equal_torch(name: str) -> None:
    row = OPTIMIZERS[name]
    assert row.stock is not None
    parameter = torch.nn.Parameter(draw(0).clone())
    optimizer = row.stock([parameter], row.spec)
    state = initial_state(row.spec, draw(0))
    for step in range(5):
        grad = draw(10 + step)
        grad[:3] = 0
        parameter.grad = grad.clone()
        optimizer.step()
        before = [vector.clone() for vector in (*state, grad)]
        after = update(row.spec, state, grad, step, last=step == 4)
        assert all(torch.equal(kept, now) for kept, now in zip(before, (*state, grad), strict=True))
        state = after
        assert relative(state.theta, parameter.detach()) < 1e-14
    assert (len(state.m), len(state.v)) == (0, 0)  # no step follows
    assert relative(state.theta, draw(0)) > 1e-2


@EVERY
@AT
def test_adjoint_equals_finite_differences(name: str, step: int) -> None:
    """Along a direction in (state, g): the five-point rule against <adjoint, direction>."""
    spec = OPTIMIZERS[name].spec
    state, grad, after = point(spec)
    way, way_grad = like_of(spec, draw(21), draw(22), draw(23)), draw(24)
    grad_bar, before = adjoint(spec, after, state, grad, step, rates=ranges(spec))

    def value(h: float) -> float:
        moved = State(*(a + h * b for a, b in zip(state, way, strict=True)))
        return inner(after, update(spec, moved, grad + h * way_grad, step, rates=ranges(spec)))

    h = OPTIMIZERS[name].h
    a, b, c, d = (value(k * h) for k in (-2, -1, 1, 2))
    expected = (a - 8 * b + 8 * c - d) / (12 * h)
    assert abs(expected) > 1e-2
    assert inner(before, way) + float(grad_bar @ way_grad) == pytest.approx(expected, rel=1e-7)


def plain_step(row: Row, step: int, state: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """A step as plain PyTorch, matrix by matrix where the optimiser goes by them; what it has no v for keeps a v of 0."""
    spec, take, start = row.spec, row.plain or STEPS[row.spec.name], 0
    at = At(step, spec.lr, spec.weight_decay)
    if not by_matrix(spec):
        theta, moments = take(spec, at, state[0], grad, tuple(state[1:]))
        return theta, *moments
    parts = []
    for rate in ranges(spec) or ():
        form = rate.matrix or (rate.stop - start,)
        theta, m, v, g = (vector[start : rate.stop].view(form) for vector in (*state, grad))
        if rate.matrix:
            theta, (m,) = take(spec, at, theta, g, (m,))
            v = torch.zeros_like(v)
        else:
            theta, (m, v) = STEPS["adamw"](spec, at, theta, g, (m, v))
        parts.append([vector.reshape(-1) for vector in (theta, m, v)])
        start = rate.stop
    return tuple(torch.cat(vectors) for vectors in zip(*parts, strict=True))


@EVERY
@AT
def test_adjoint_equals_autograd(name: str, step: int) -> None:
    row = OPTIMIZERS[name]
    state, grad, after = point(row.spec)
    leaves = [vector.clone().requires_grad_() for vector in (*state, grad) if len(vector)]
    new = plain_step(row, step, leaves[:-1], leaves[-1])
    moved = update(row.spec, state, grad, step, rates=ranges(row.spec))
    for mine, theirs in zip((vector for vector in moved if len(vector)), new, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-12, atol=1e-14)
    bars = [bar for bar in after if len(bar)]
    expected = torch.autograd.grad(new, leaves, bars, materialize_grads=True)
    grad_bar, before = adjoint(row.spec, after, state, grad, step, rates=ranges(row.spec))
    got = [vector for vector in (*before, grad_bar) if len(vector)]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@EVERY
def test_what_the_adjoint_may_write_over(name: str) -> None:
    spec = OPTIMIZERS[name].spec
    state, grad, after = point(spec)
    rates = ranges(spec)
    expected_grad, expected = adjoint(spec, after, state, grad, 3, rates=rates)
    again = point(spec)
    kept = zip((*state, grad, *after), (*again[0], again[1], *again[2]), strict=True)
    assert all(torch.equal(a, b) for a, b in kept)

    into = torch.empty_like(grad)
    for options in ({"consume": True}, {"consume": True, "first": True}, {"consume": True, "grad_into": into}):
        state, grad, after = point(spec)
        if options.get("first"):  # m̄' and v̄' of a last step are one number, expanded
            after = State(after.theta, *(v.new_zeros(1).expand_as(v) for v in after[1:]))
            expected_first = adjoint(spec, after, state, grad, 3, rates=rates, first=True)
            got = adjoint(spec, after, state, grad, 3, rates=rates, **options)
            assert torch.equal(got[0], expected_first[0])
            assert [len(vector) for vector in got[1]] == [0, 0, 0]
            continue
        grad_bar, before = adjoint(spec, after, state, grad, 3, rates=rates, **options)
        assert torch.equal(grad_bar, expected_grad)
        assert all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))
        assert torch.equal(state.theta, draw(1))
        assert (grad_bar is into) == ("grad_into" in options)
        assert torch.equal(grad, draw(4)) == ("grad_into" in options)

    state, grad, after = point(spec)  # ḡ in the place of m
    grad_bar, before = adjoint(spec, after, state, grad, 3, rates=rates, consume=True, grad_into=state.m)
    assert grad_bar is state.m
    assert torch.equal(grad_bar, expected_grad)
    assert all(torch.equal(a, b) for a, b in zip(before, expected, strict=True))


@EVERY
def test_rates_of_ranges(name: str) -> None:
    """Ranges with their own rate and decay step as if each were alone; a rate of 0 moves nothing."""
    spec = OPTIMIZERS[name].spec
    rates = (Rate(20, 0.3, 0.0), Rate(21, 0.0, 0.2), Rate(SIZE, 0.02, 0.05))
    if matrices := ranges(spec):
        own = ((0.3, 0.0), (0.0, 0.2), (0.02, 0.05), (0.1, 0.1))
        rates = tuple(rate._replace(lr=lr, weight_decay=w) for rate, (lr, w) in zip(matrices, own, strict=True))
    state, grad, after = point(spec)
    moved = update(spec, state, grad, 2, rates=rates)
    grad_bar, before = adjoint(spec, after, state, grad, 2, rates=rates)
    start = 0
    for rate in rates:
        span = slice(start, rate.stop)
        own = replace(spec, lr=rate.lr or 1.0, weight_decay=rate.weight_decay)
        mine = [*moved.part(span), grad_bar[span], *before.part(span)]
        if rate.lr and by_matrix(spec) == (rate.matrix is not None):
            only = (rate._replace(stop=rate.stop - start),)
            alone = update(own, state.part(span), grad[span], 2, rates=only)
            alone_bar, alone_before = adjoint(own, after.part(span), state.part(span), grad[span], 2, rates=only)
            for a, b in zip(mine, (*alone, alone_bar, *alone_before), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
        elif not rate.lr:
            assert torch.equal(moved.theta[span], state.theta[span])
        start = rate.stop
    with pytest.raises(ValueError, match=r"end at (21|32), the vectors at 50"):
        update(spec, state, grad, 2, rates=rates[:2])


@EVERY
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradients_move_nothing_and_have_finite_adjoints(name: str, eps: float) -> None:
    spec = replace(OPTIMIZERS[name].spec, eps=eps, eps_root=0.0, weight_decay=0.0)
    state, grad = initial_state(spec, draw(1)), draw(2)
    still = torch.arange(SIZE) % 2 == 0
    if by_matrix(spec):  # whole matrices
        still = torch.arange(SIZE) < 32
    grad[still] = 0
    after = update(spec, state, grad, 0, rates=ranges(spec))
    assert torch.equal(after.theta != state.theta, ~still)
    bar = like_of(spec, draw(5), draw(6), draw(7))
    grad_bar, before = adjoint(spec, bar, state, grad, 0, rates=ranges(spec))
    assert all(bool(torch.isfinite(vector).all()) for vector in (grad_bar, *before))


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_derivative_at_zero(name: str) -> None:
    """At g = 0 that of -lr g / (|g| + ε) is -lr / ε; with ε = 0 there is none, and 0 stands for it."""
    theta, zero = draw(0), torch.zeros(SIZE, dtype=torch.float64)
    for eps, slope in ((1e-3, -100.0), (0.0, 0.0)):
        spec = OptimizerSpec(name, lr=0.1, eps=eps)
        grad_bar, _ = adjoint(spec, State(zero + 1, zero, zero), initial_state(spec, theta), zero, 0)
        torch.testing.assert_close(grad_bar, zero + slope)


@EVERY
def test_elasticity_equals_differences(name: str) -> None:
    """d log|u| / d log|g| of a first step without decay, between 0 (sign) and 1 (linear); 1 at g = 0."""
    spec = replace(OPTIMIZERS[name].spec, weight_decay=0.0)
    grad = torch.logspace(-6, 2, 41, dtype=torch.float64)
    zero = torch.zeros_like(grad)

    def log_step(factor: float) -> Tensor:
        return update(spec, initial_state(spec, zero), grad * factor, 0).theta.abs().log()

    found = elasticity(spec, grad)
    if by_matrix(spec):
        assert bool((found == 1).all())
        return
    h = 1e-4
    expected = (log_step(1 + h) - log_step(1 - h)) / math.log((1 + h) / (1 - h))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert float(elasticity(spec, zero[:1])) == 1.0


RECIPES = {  # settings of `[inner]`, one at least for each name that they offer
    "adamw": {"optimizer": "adamw", "eps": 1e-3, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "eps": 1e-3, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.1},
    "nesterov": {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    "muon": {
        "optimizer": "muon", "lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "ns_bf16": True,
        "adjust_lr": "match_rms_adamw", "ns_steps": 4, "eps": 1e-3,
    },
}  # fmt: skip


def test_settings_offer_what_there_is() -> None:
    offered = set(get_args(InnerConfig.model_fields["optimizer"].annotation))
    assert offered == {recipe["optimizer"] for recipe in RECIPES.values()}
    assert offered <= set(registered())


@pytest.mark.parametrize("name", RECIPES)
def test_the_stock_training_of_verify_equals_the_inner_run(name: str) -> None:
    inner = InnerConfig(**RECIPES[name])
    examples, model = make_examples(11), make_target("gpt2", tied=True)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    theta = run.space.read(model)
    ours = inner_run(run, theta, examples, OptimizerSpec.of(inner), torch.ones(11).double(), 4).theta
    rows = zip(examples.ids_N_S, examples.attention_N_S, strict=True)
    assert fine_tune(model, [ids[real].tolist() for ids, real in rows], inner, 3) == 3
    assert relative(run.space.read(model) - theta, ours - theta) < 1e-12


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"lr": 0.0}, {"beta1": 1.0}, {"eps": -1e-8}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OptimizerSpec(**wrong)
    with pytest.raises(
        ValueError, match=r"unknown inner optimiser 'lion'; there are 'adam', 'adamw', 'muon', 'sgd' and"
    ):
        OptimizerSpec("lion")
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        OptimizerSpec("sgd", nesterov=True)
    for wrong in ({"nesterov": True}, {"adjust_lr": "other"}, {"ns_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OptimizerSpec("muon", **wrong)
    for name in ("adam", "adamw"):
        with pytest.raises(ValueError, match="nesterov is a setting of 'muon' and 'sgd'"):
            OptimizerSpec(name, nesterov=True)
