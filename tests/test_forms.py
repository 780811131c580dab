"""The dual pass's closed forms, each against PyTorch differentiated twice, in float64. A new form joins with a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from dpg_cli.engine.inner.attention.plain import attention
from dpg_cli.engine.inner.attention.seen import Causal
from dpg_cli.engine.reverse.dual import DualMode
from dpg_cli.engine.reverse.forms import activation
from dpg_cli.engine.reverse.forms.table import FORMS, REPLACED

F = nn.functional


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-6
    return float((value - reference).norm() / reference.norm())


def soft(scores: Tensor, dim: int = -1) -> Tensor:
    weights = torch.exp(scores)
    return weights / weights.sum(dim, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0, scale: float | None = None) -> Tensor:
    repeats = q.shape[-3] // k.shape[-3]
    k, v = k.repeat_interleave(repeats, -3), v.repeat_interleave(repeats, -3)
    return soft(q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + bias) @ v


def norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


def phi(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


LATER = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
SHUT = torch.zeros(2, 1, 5, 5, dtype=torch.bool).index_fill_(0, torch.tensor([1]), True) | (LATER == 0)
IDS = torch.tensor([[0, 3, 3], [5, 1, 0]])
HEADS, FEW = (2, 4, 5, 3), (2, 2, 5, 3)


@dataclass(frozen=True)
class Case:
    """A call that a form replaces, the same in operations that PyTorch differentiates twice, and the shapes of its inputs.

    `tangent` gives ẏ from the inputs' tangents where it is not the derivative of y along them, because the model's gradient is cut.
    """

    form: str
    replaces: Callable[..., Tensor]
    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    tangent: Callable[..., Tensor] | None = None


CASES = {
    "linear": Case("linear", F.linear, F.linear, lambda x, w, b: x @ w.mT + b, ((2, 3, 5), (4, 5), (4,))),
    "linear-no-bias": Case("linear", F.linear, F.linear, lambda x, w: x @ w.mT, ((2, 3, 5), (4, 5))),
    "linear-turned": Case("linear", F.linear, lambda x, w: F.linear(x, w.mT), lambda x, w: x @ w, ((3, 5), (5, 4))),
    "addmm": Case("linear", torch.addmm, torch.addmm, lambda b, x, w: x @ w + b, ((4,), (3, 5), (5, 4))),
    "addmm-scaled": Case(
        "linear", torch.addmm, lambda b, x, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0),
        lambda b, x, w: 2 * x @ w + 0.5 * b, ((4,), (3, 5), (5, 4)),
    ),
    "embedding": Case("embedding", F.embedding, lambda w: F.embedding(IDS, w), lambda w: w[IDS], ((6, 4),)),
    "embedding-padded": Case(
        "embedding", F.embedding, lambda w: F.embedding(IDS, w, padding_idx=-3), lambda w: w[IDS], ((6, 4),),
        tangent=lambda w_t: w_t[IDS] * (IDS != 3)[..., None],
    ),
    "logsumexp": Case(
        "logsumexp", torch.logsumexp, lambda x: torch.logsumexp(x, (1, 2)), lambda x: x.exp().sum((1, 2)).log(),
        ((3, 5, 4),),
    ),
    "logsumexp-method": Case(
        "logsumexp", torch.Tensor.logsumexp, lambda x: x.logsumexp(-1, keepdim=True),
        lambda x: x.exp().sum(-1, keepdim=True).log(), ((3, 4),),
    ),
    "log_softmax": Case(
        "logsumexp", torch.log_softmax, lambda x: torch.log_softmax(x, 1), lambda x: soft(x, 1).log(), ((3, 5, 4),)
    ),
    "log_softmax-method": Case(
        "logsumexp", torch.Tensor.log_softmax, lambda x: x.log_softmax(dim=-1), lambda x: soft(x).log(), ((3, 4),)
    ),
    "log_softmax-functional": Case(
        "logsumexp", F.log_softmax, lambda x: F.log_softmax(x, -1, dtype=torch.float64), lambda x: soft(x).log(),
        ((3, 4),),
    ),
    "softmax": Case("softmax", torch.softmax, lambda s: torch.softmax(s, 1), lambda s: soft(s, 1), ((3, 5, 4),)),
    "softmax-method": Case(
        "softmax", torch.Tensor.softmax, lambda s: s.softmax(dim=-1, dtype=torch.float64), soft, ((3, 4),)
    ),
    "softmax-functional": Case(
        "softmax", F.softmax, lambda s: F.softmax(s, -1, dtype=torch.float64), soft, ((3, 4),)
    ),
    "attention": Case(
        "attention", F.scaled_dot_product_attention, F.scaled_dot_product_attention, attend, (HEADS, HEADS, HEADS)
    ),
    "attention-causal": Case(
        "attention", F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3),
        lambda q, k, v: attend(q, k, v, LATER, 0.3), (HEADS, HEADS, HEADS),
    ),
    "attention-grouped": Case(
        "attention", F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, LATER, enable_gqa=True),
        lambda q, k, v: attend(q, k, v, LATER), (HEADS, FEW, FEW),
    ),
    "attention-masked": Case(
        "attention", F.scaled_dot_product_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, SHUT),
        lambda q, k, v: attend(q, k, v, torch.zeros(SHUT.shape).double().masked_fill(~SHUT, -torch.inf)),
        (HEADS, HEADS, HEADS),
    ),
    "attention-learned-bias": Case(
        "attention", F.scaled_dot_product_attention,
        lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, b + LATER),
        lambda q, k, v, b: attend(q, k, v, b + LATER), (HEADS, HEADS, HEADS, (4, 5, 5)),
    ),
    "attention-slabs": Case(
        "attention", attention, lambda q, k, v: attention(q, k, v, Causal()), lambda q, k, v: attend(q, k, v, LATER),
        (HEADS, FEW, FEW),
    ),
    "layer_norm": Case(
        "layer_norm", F.layer_norm, lambda x, w, b: F.layer_norm(x, (6,), w, b), norm, ((2, 3, 6), (6,), (6,))
    ),
    "layer_norm-plain": Case(
        "layer_norm", torch.layer_norm, lambda x: torch.layer_norm(x, (6,), eps=0.1), lambda x: norm(x, eps=0.1),
        ((4, 6),),
    ),
    "gelu": Case("activation", F.gelu, F.gelu, lambda x: x * phi(x), ((7, 41),)),
    "gelu-tanh": Case(
        "activation", F.gelu, lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2, ((7, 41),),
    ),
    "silu": Case("activation", F.silu, F.silu, lambda x: x / (1 + torch.exp(-x)), ((7, 41),)),
}  # fmt: skip


def test_the_table_of_cases_is_whole() -> None:
    assert {case.form for case in CASES.values()} == set(FORMS)
    assert {case.replaces for case in CASES.values()} == set(REPLACED)
    assert sum(len(form.calls) for form in FORMS.values()) == len(REPLACED)  # none is replaced twice


def tangent_of(plain: Callable[..., Tensor], leaves: list[Tensor], tangents: list[Tensor]) -> Tensor:
    """Σ ∂f/∂x ẋ with its graph: the derivative of a vector-Jacobian product by its vector."""
    value = plain(*leaves)
    vector = torch.ones_like(value, requires_grad=True)
    products = torch.autograd.grad(value, leaves, vector, create_graph=True)
    return torch.autograd.grad(products, vector, tangents, create_graph=True)[0]


@pytest.mark.parametrize("name", CASES)
def test_value_tangent_and_reverse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation, "BLOCK", 50)  # several blocks
    case = CASES[name]
    rng = torch.Generator().manual_seed(1)

    def draw(shape: torch.Size | tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=rng)

    leaves = [(2 * draw(shape)).requires_grad_() for shape in case.shapes]
    tangents = [draw(shape).requires_grad_() for shape in case.shapes]
    with forward_ad.dual_level(), DualMode():
        duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
        value, value_t = forward_ad.unpack_dual(case.call(*duals))
    assert value_t is not None
    reference = case.plain(*leaves)
    reference_t = case.tangent(*tangents) if case.tangent else tangent_of(case.plain, leaves, tangents)
    assert relative(value.detach(), reference.detach()) < 1e-13
    assert relative(value_t.detach(), reference_t.detach()) < 1e-12

    bars = draw(value.shape), draw(value.shape)
    got = torch.autograd.grad((value, value_t), leaves + tangents, bars, allow_unused=True)
    expected = torch.autograd.grad((reference, reference_t), leaves + tangents, bars, materialize_grads=True)
    for mine, theirs in zip(got[: len(leaves)], expected[: len(leaves)], strict=True):
        assert mine is not None
        assert relative(mine, theirs) < 1e-11
    for mine, theirs in zip(got[len(leaves) :], expected[len(leaves) :], strict=True):
        # a parameter's tangent is the given direction, of which no form need make an adjoint
        assert mine is None or relative(mine, theirs) < 1e-11
    assert got[len(leaves) + (1 if case.replaces is torch.addmm else 0)] is not None


@pytest.mark.parametrize("name", activation.ACTIVATIONS)
def test_slopes_far_out(name: str) -> None:
    """f' and f'' where f is nearly 0 or nearly x, against PyTorch's own."""
    value, _, slopes = activation.ACTIVATIONS[name]
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(value(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for mine, theirs in zip(slopes(x.detach()), (first.detach(), second), strict=True):
        assert float((mine - theirs).abs().max()) < 1e-13
        assert relative(mine, theirs) < 1e-13


def test_a_row_that_may_look_nowhere_gives_zeros() -> None:
    """As PyTorch's safe softmax does; with a reverse that is finite."""
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[1, :, 2] = False
    rng = torch.Generator().manual_seed(1)
    parts = [torch.randn(HEADS, dtype=torch.float64, generator=rng).requires_grad_() for _ in range(6)]
    with forward_ad.dual_level(), DualMode():
        duals = [forward_ad.make_dual(parts[i], parts[i + 3]) for i in range(3)]
        value, value_t = forward_ad.unpack_dual(F.scaled_dot_product_attention(*duals, attn_mask=keep))
    assert value_t is not None
    assert bool((value[1, :, 2] == 0).all())
    assert bool((value_t[1, :, 2] == 0).all())
    bars = torch.autograd.grad((value.square() + value_t.square()).sum(), parts)
    assert all(bool(torch.isfinite(bar).all()) for bar in bars)
    assert bool((bars[0][1, :, 2] == 0).all())


def test_what_has_no_form_is_refused() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    with forward_ad.dual_level(), DualMode():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(ValueError, match="dropout"):
            F.scaled_dot_product_attention(dual, dual, dual, dropout_p=0.1)
        with pytest.raises(NotImplementedError, match="2 axes"):
            F.layer_norm(dual, (4, 3))
        with pytest.raises(NotImplementedError, match="1 axes"):
            F.linear(dual, dual[0, 0])
