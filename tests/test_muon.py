"""Muon against torch's own, with its rounding and without, and which parameters it takes. The rest: `test_optim.py`."""

from __future__ import annotations

import pytest
import torch
from builders import make_target
from optimizers_table import SIZE, ranges
from torch import Tensor, nn

from dpg_cli.engine import OptimizerSpec
from dpg_cli.engine.inner.optimizers import (
    Rate,
    Rates,
    State,
    adjoint,
    hidden_matrices,
    initial_state,
    ranges_of,
    update,
)
from dpg_cli.engine.inner.optimizers.muon import orthogonal
from dpg_cli.engine.params import ParameterSpace

SETTINGS = {
    "nesterov": OptimizerSpec("muon", lr=0.02, momentum=0.95, nesterov=True, weight_decay=0.1, ns_bf16=True),
    "plain": OptimizerSpec("muon", lr=0.02, momentum=0.8, adjust_lr="match_rms_adamw", ns_steps=3, ns_bf16=True),
}


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-4
    return float((value - reference).norm() / reference.norm())


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def both(spec: OptimizerSpec, dtype: torch.dtype = torch.float64, steps: int = 5) -> tuple[Tensor, Tensor]:
    """How far the weights move by ours and by torch: Muon on the matrices, AdamW on the rest."""
    theta, rates = draw(0, dtype), ranges(spec)
    assert rates is not None
    starts = [0, *(rate.stop for rate in rates)]
    parts = [
        nn.Parameter(theta[a : rate.stop].clone().view(rate.matrix or (-1,)))
        for a, rate in zip(starts, rates, strict=False)
    ]
    shared = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    muon = torch.optim.Muon(
        parts[:-1], momentum=spec.momentum, nesterov=spec.nesterov, ns_steps=spec.ns_steps,
        adjust_lr_fn=spec.adjust_lr, **shared,
    )  # fmt: skip
    rest = torch.optim.AdamW(parts[-1:], betas=(spec.beta1, spec.beta2), eps=spec.eps, **shared)
    state = initial_state(spec, theta)
    for step in range(steps):
        grad = draw(10 + step, dtype)
        for a, part in zip(starts, parts, strict=False):
            part.grad = grad[a : a + part.numel()].clone().view(part.shape)
        muon.step()
        rest.step()
        state = update(spec, state, grad, step, rates=rates, last=step == steps - 1)
    return state.theta - theta, torch.cat([part.detach().reshape(-1) for part in parts]) - theta


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_with_its_rounding_it_is_torch(name: str, dtype: torch.dtype) -> None:
    ours, theirs = both(SETTINGS[name], dtype)
    assert relative(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_rounding_it_is_torch_without_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OptimizerSpec(**{**SETTINGS[name].__dict__, "ns_bf16": False})
    assert 1e-4 < relative(*both(spec)) < 3e-2  # what the rounding does
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    assert relative(*both(spec)) < 1e-13


def test_the_derivative_is_that_of_the_steps_without_rounding() -> None:
    spec = SETTINGS["nesterov"]
    exact = OptimizerSpec(**{**spec.__dict__, "ns_bf16": False})
    state, bar = State(draw(1), draw(2), draw(3).abs()), State(draw(5), draw(6), draw(7))
    rounded, other = (adjoint(s, bar, state, draw(4), 3, rates=ranges(s)) for s in (spec, exact))
    assert torch.equal(rounded[0], other[0])


def test_singular_values_go_near_one() -> None:
    update = torch.randn(8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(update, 5)[-1])
    assert 0.6 < float(values.min()) < float(values.max()) < 1.25


def test_it_refuses_to_run_without_matrices() -> None:
    spec = SETTINGS["nesterov"]
    with pytest.raises(ValueError, match="which ranges are matrices"):
        update(spec, initial_state(spec, draw(0)), draw(1), 0)


def test_embeddings_and_heads_are_not_its_matrices() -> None:
    for tied in (True, False):
        names = hidden_matrices(make_target("gpt2", tied=tied))
        assert {name.split("h.0.")[1] for name in names if "h.0." in name} == {
            "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
        }  # fmt: skip
        assert len(names) == 8
        names = hidden_matrices(make_target("llama", tied=tied))
        assert len(names) == 14
        assert not any("embed" in name or "head" in name or "norm" in name for name in names)
    frozen = make_target("llama", tied=False)
    frozen.model.layers[0].requires_grad_(False)
    assert len(hidden_matrices(frozen)) == 7


def test_ranges_are_as_few_as_there_can_be() -> None:
    model = make_target("gpt2", tied=False)
    space, spec = ParameterSpace(model), OptimizerSpec(lr=0.1, weight_decay=0.2)
    assert ranges_of(spec, space, model) == (Rate(space.size, 0.1, 0.2),)
    own = {name: (0.1, 0.0) for name in space.names if name.endswith("bias")}
    some = ranges_of(spec, space, model, own)
    assert len(some) < len(space.names)
    by_name = dict(zip(space.names, spread(some, space), strict=True))
    assert all((rate.weight_decay == 0) == name.endswith("bias") for name, rate in by_name.items())

    muon = ranges_of(SETTINGS["plain"], space, model)
    by_name = dict(zip(space.names, spread(muon, space), strict=True))
    assert {name for name, rate in by_name.items() if rate.matrix} == hidden_matrices(model)
    assert by_name["transformer.h.0.mlp.c_fc.weight"].matrix == (16, 64)
    assert muon[-1].stop == space.size


def spread(rates: Rates, space: ParameterSpace) -> list[Rate]:
    """The rate of each parameter."""
    ends = torch.tensor([rate.stop for rate in rates])
    return [rates[int(place)] for place in torch.searchsorted(ends, torch.tensor(space.sizes).cumsum(0))]
