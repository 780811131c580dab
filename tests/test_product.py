"""Who multiplies, and in which precision: the products against PyTorch's own, bf16 against float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn

from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.engine.inner import product, target
from dpg_cli.engine.inner.product import PlainLinear, plus_times, times
from dpg_cli.errors import DegenerateError

ADAMW = OptimizerSpec("adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-1, weight_decay=0.1)
METRIC = HeldOutLoss(make_examples(4, seed=9))


def relative(value: Tensor, reference: Tensor) -> float:
    return float(((value - reference).norm() / reference.norm()).detach())


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_plain_linear_equals_autograd(with_bias: bool, turned: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, bar = torch.randn(3, 5, 7, generator=rng).double(), torch.randn(3, 5, 4, generator=rng).double()
    weight = torch.randn(7, 4, generator=rng).double().mT if turned else torch.randn(4, 7, generator=rng).double()
    bias = torch.randn(4, generator=rng).double() if with_bias else None
    leaves = [part.requires_grad_() for part in (x, weight, bias) if part is not None]
    expected, got = nn.functional.linear(x, weight, bias), PlainLinear.apply(x, weight, bias, "float32")
    assert relative(got, expected) < 1e-14
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, bar), torch.autograd.grad(expected, leaves, bar), strict=True
    ):
        assert relative(mine, theirs) < 1e-13


@pytest.mark.parametrize("shape", [(300, 128, 96), (64, 1000, 70)])
@pytest.mark.parametrize("turned", [True, False])
def test_either_library_multiplies_right(
    shape: tuple[int, int, int], turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, inner, columns = shape
    rng = torch.Generator().manual_seed(1)
    left = torch.randn(rows, inner, generator=rng)
    right = torch.randn(columns, inner, generator=rng).mT if turned else torch.randn(inner, columns, generator=rng)
    exact = left.double() @ right.double()
    for choice in (True, False):
        if choice and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            continue
        monkeypatch.setattr(product, "prefer_onednn", lambda choice=choice: choice)
        assert relative(times(left, right).double(), exact) < 1e-6
        total = torch.ones(rows, columns)
        assert plus_times(total, left, right) is total
        assert relative(total.double() - 1, exact) < 1e-6
    assert 1e-4 < relative(times(left, right, "bf16").double(), exact) < 1e-2
    assert times(left, right, "bf16").dtype == torch.float32


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_metagradient_is_the_same_with_and_without_the_mode(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    def no_mode(*_: Any) -> AbstractContextManager[Any]:
        entered.append(1)
        return nullcontext()

    model, examples = make_target(architecture, tied=True), make_examples(9)
    other = metagradient(model, examples, ADAMW, METRIC, batch_size=3)
    monkeypatch.setattr(target, "PlainMode", no_mode)
    plain = metagradient(model, examples, ADAMW, METRIC, batch_size=3)
    assert entered
    assert relative(other.token_N_S, plain.token_N_S) < 1e-9


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_bf16_is_near_float32_and_says_how_near(architecture: str) -> None:
    model, examples = make_target(architecture, tied=True, dtype=torch.float32), make_examples(12)
    exact = metagradient(model, examples, ADAMW, METRIC, batch_size=4)
    rounded = metagradient(model, examples, ADAMW, METRIC, batch_size=4, precision="bf16")
    assert "precision_error" not in exact.stats
    assert 1e-4 < rounded.stats["precision_error"] < 0.1
    assert 1e-4 < relative(rounded.example_N, exact.example_N) < 0.1
    assert all(value.dtype == torch.float32 for value in rounded.final.values())


def test_bf16_is_refused_where_the_optimiser_is_a_sign_function() -> None:
    """Rounding moves g by a percent, and the derivative of sign(g) at small g by all of it."""
    model = make_target("gpt2", tied=True, dtype=torch.float32)
    sharp = OptimizerSpec("adamw", lr=1e-3, eps=1e-7)
    with pytest.raises(DegenerateError, match=r"bf16.*float32"):
        metagradient(model, make_examples(6), sharp, METRIC, batch_size=3, precision="bf16")
