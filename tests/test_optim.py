"""The inner optimisers against torch's own, and their adjoints against autograd."""

from __future__ import annotations

import pytest
import torch
from builders import make_examples, make_target
from torch import Tensor

from dpg_cli.engine.inner.optimizers import OptimizerSpec, State, adjoint, initial_state, update
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.params import ParameterSpace

SPECS = [
    OptimizerSpec("adamw", lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1),
    OptimizerSpec("adamw", lr=0.01, beta1=0.0, beta2=0.0, eps=1e-3),
    OptimizerSpec("sgd", lr=0.1, momentum=0.9, weight_decay=0.01),
    OptimizerSpec("sgd", lr=0.1),
]


def stock(spec: OptimizerSpec, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if spec.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, weight_decay=spec.weight_decay
        )
    return torch.optim.SGD(parameters, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("tied", [True, False])
def test_inner_run_equals_torch(spec: OptimizerSpec, tied: bool) -> None:
    examples = make_examples(11)
    model = make_target("gpt2", tied=tied)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    theta = run.space.read(model)
    trace = inner_run(run, theta, examples, spec, torch.ones(11, dtype=torch.float64), 4)
    assert len(trace.steps) == 3

    optimizer = stock(spec, list(model.parameters()))
    for start in (0, 4, 8):
        batch = examples.rows(start, min(start + 4, 11))
        labels = batch.ids_N_S.masked_fill(~batch.label_N_S, -100)
        optimizer.zero_grad()
        model(input_ids=batch.ids_N_S, labels=labels).loss.backward()
        optimizer.step()
    trained = run.space.read(model)
    assert float((trained - theta).abs().max()) > 1e-3
    assert float((trained - trace.theta).abs().max()) < 1e-6
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied


@pytest.mark.parametrize("eps_root", [0.0, 1e-4])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("step", [0, 5])
def test_adjoint_equals_autograd(spec: OptimizerSpec, eps_root: float, step: int) -> None:
    spec = OptimizerSpec(**{**spec.__dict__, "eps_root": eps_root if spec.name == "adamw" else 0.0})
    rng = torch.Generator().manual_seed(step)
    theta, m, grad, *bars = (torch.randn(50, dtype=torch.float64, generator=rng) for _ in range(6))
    v = torch.rand(50, dtype=torch.float64, generator=rng)
    state = State(theta, m, v) if spec.name == "adamw" else State(theta, m, theta.new_empty(0))
    after = State(*bars) if spec.name == "adamw" else State(bars[0], bars[1], theta.new_empty(0))

    leaves = [tensor.clone().requires_grad_() for tensor in (theta, m, v, grad)]

    def differentiable(theta: Tensor, m: Tensor, v: Tensor, grad: Tensor) -> Tensor:
        if spec.name == "sgd":
            buffer = spec.momentum * m + grad + spec.weight_decay * theta
            return (after.theta * (theta - spec.lr * buffer)).sum() + (after.m * buffer).sum()
        m2 = spec.beta1 * m + (1 - spec.beta1) * grad
        v2 = spec.beta2 * v + (1 - spec.beta2) * grad**2
        c1, c2 = 1 - spec.beta1 ** (step + 1), 1 - spec.beta2 ** (step + 1)
        move = (m2 / c1) / ((v2 / c2 + spec.eps_root).sqrt() + spec.eps) + spec.weight_decay * theta
        return (after.theta * (theta - spec.lr * move)).sum() + (after.m * m2).sum() + (after.v * v2).sum()

    expected = torch.autograd.grad(differentiable(*leaves), leaves, allow_unused=True)
    grad_bar, before = adjoint(spec, after, state, grad, step)
    torch.testing.assert_close(grad_bar, expected[3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(before.theta, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(before.m, expected[1], rtol=1e-10, atol=1e-12)
    if spec.name == "adamw":
        torch.testing.assert_close(before.v, expected[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zero_gradient_moves_nothing_and_differentiates_to_zero(eps: float) -> None:
    spec = OptimizerSpec("adamw", lr=0.1, eps=eps, eps_root=0.0)
    state = initial_state(spec, torch.ones(3, dtype=torch.float64))
    grad = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    after = update(spec, state, grad, 0)
    assert after.theta[0] == 1
    assert float(after.theta[1]) == pytest.approx(0.9, abs=1e-8)
    ones = torch.ones(3, dtype=torch.float64)
    grad_bar, before = adjoint(spec, State(ones, 0 * ones, 0 * ones), state, grad, 0)
    assert bool(torch.isfinite(grad_bar).all())
    assert bool(torch.isfinite(before.v).all())
    # At g = 0 the derivative of -lr g / (|g| + ε) is -lr / ε; with ε = 0 there is none, and 0 stands for it.
    assert float(grad_bar[0]) == pytest.approx(-0.1 / eps if eps else 0.0)


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"lr": 0.0}, {"beta1": 1.0}, {"eps": -1e-8}, {"name": "adam"}, {"momentum": -0.1}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "name" not in wrong else "adam"):
            OptimizerSpec(**wrong)
