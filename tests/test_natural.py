"""The natural step on the generator's head: in float64 against explicit matrices, autograd, finite differences and measured KL."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from builders import VOCAB, HeldOutLoss, make_examples, make_target
from torch import Tensor, nn

from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.engine.inner import head as head_module
from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.natural.fisher import TokenFisher, conjugate_gradients
from dpg_cli.engine.natural.head_policy import (
    DrawnCredit,
    HeadChange,
    LabelGradient,
    add_advantages,
    divergence,
    divergence_gradient,
    step_divergence,
    with_bias,
    with_ones,
)
from dpg_cli.engine.natural.step import NaturalPolicy, NaturalSpec, direction, spread
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.errors import DegenerateError

ROWS, WIDTH, N, K = 11, 5, 6, 7


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 40)
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 4)


def make_labels(
    *, bias: bool, temperature: float = 1.0, rows: int = ROWS, seed: int = 0, barred: int = 2
) -> HeadLabels:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    hidden = normal(N, K, WIDTH) @ normal(WIDTH, WIDTH)  # correlated dimensions
    return HeadLabels(
        hidden, torch.arange(N), 0.5 * normal(rows, WIDTH), normal(rows) if bias else None, temperature,
        width=K, ends=torch.tensor([3]), barred=barred,
    )  # fmt: skip


def fisher_of(labels: HeadLabels, places: Tensor) -> TokenFisher:
    hidden = with_ones(labels.hidden(places), labels.bias)
    return TokenFisher.of(hidden, lambda part: labels.at(places[part]), len(labels.weight), labels.temperature)


def explicit(fisher: TokenFisher) -> Tensor:
    """F as a matrix over (row, column) pairs."""
    q = fisher.q(slice(None))
    spread_of = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    both = torch.einsum("mrs,mc,md->rcsd", spread_of, fisher.hidden_M_D, fisher.hidden_M_D)
    return both.flatten(0, 1).flatten(1) / (fisher.tokens * fisher.temperature**2)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_products_are_those_of_the_explicit_fisher(
    bias: bool, temperature: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr("dpg_cli.engine.natural.fisher.KEPT", 0)
    labels = make_labels(bias=bias, temperature=temperature)
    fisher = fisher_of(labels, torch.arange(N * K))
    matrix = explicit(fisher)
    vector = torch.randn(ROWS, WIDTH + bias, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert relative(fisher.product(vector).flatten(), matrix @ vector.flatten()) < 1e-13
    # of some rows of the head alone: the block of the matrix
    q = fisher.q(slice(None))
    some = TokenFisher(fisher.hidden_M_D, lambda part: q[part, 2:6], 4, temperature)
    block = matrix.view(ROWS, WIDTH + bias, ROWS, WIDTH + bias)[2:6, :, 2:6].flatten(0, 1).flatten(1)
    assert relative(some.product(vector[2:6]).flatten(), block @ vector[2:6].flatten()) < 1e-13


@pytest.mark.parametrize("bias", [False, True])
def test_the_direction_is_that_of_a_dense_solve(bias: bool) -> None:
    labels = make_labels(bias=bias)
    fisher = fisher_of(labels, torch.arange(N * K))
    kronecker = fisher.kronecker()
    gradient = torch.randn(ROWS, WIDTH + bias, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    damping = 0.03
    dense = torch.block_diag(*(rate * kronecker.moment for rate in kronecker.rows_R))
    vector = torch.randn_like(gradient)
    assert (
        relative(kronecker.add_product(torch.zeros_like(vector), vector, 2.0).flatten(), 2 * dense @ vector.flatten())
        < 1e-13
    )
    assert relative(kronecker.solve(kronecker.add_product(torch.zeros_like(vector), vector, 1.0)), vector) < 1e-9
    exact = torch.linalg.solve(explicit(fisher) + damping * dense, gradient.flatten())
    found = direction(fisher, gradient.clone(), NaturalSpec(damping=damping, iterations=200, tolerance=1e-10))
    assert relative(found.x.flatten(), exact) < 1e-7
    assert found.residual < 1e-10
    assert 5 < found.iterations < 80
    # without damping F is singular, and the pseudo-inverse is found for a gradient in its range
    inside = fisher.product(gradient)
    found = direction(fisher, inside.clone(), NaturalSpec(damping=0.0, iterations=300, tolerance=1e-11))
    assert relative(fisher.product(found.x), inside) < 1e-8


def test_fewer_tokens_than_dimensions_give_a_bounded_step() -> None:
    """In float32, with a hidden state of 64 dimensions and 20 tokens: the step costs what it is to, and little elsewhere."""
    rng = torch.Generator().manual_seed(0)
    hidden, more = torch.randn(20, 64, generator=rng), torch.randn(400, 64, generator=rng)
    weight = 0.2 * torch.randn(30, 64, generator=rng)
    fisher = TokenFisher.of(hidden, lambda part: torch.softmax(hidden[part] @ weight.mT, -1), 30)
    gradient = fisher.product(torch.randn(30, 64, generator=rng))
    d = direction(fisher, gradient, NaturalSpec()).x
    d *= (2e-3 / float((d * fisher.product(d)).sum())) ** 0.5
    here = divergence(hidden, (weight + d, None), (weight, None), 1.0)
    there = divergence(more, (weight + d, None), (weight, None), 1.0)
    assert here == pytest.approx(1e-3, rel=0.05)
    assert there < 3 * here


def test_conjugate_gradients_stop_at_nothing() -> None:
    nothing = torch.zeros(3, 2, dtype=torch.float64)
    found = conjugate_gradients(lambda v, out: v, lambda v, out: out.copy_(v), nothing, iterations=5, tolerance=0.1)
    assert (found.iterations, found.residual, float(found.x.abs().sum())) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bias", [False, True])
def test_half_d_F_d_is_the_kl_of_a_small_step(bias: bool) -> None:
    """The ratio goes to 1 linearly in the length of the step."""
    labels = make_labels(bias=bias, temperature=1.3, barred=0)
    fisher = fisher_of(labels, torch.arange(N * K))
    gradient = torch.randn(ROWS, WIDTH + bias, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    d = direction(fisher, gradient, NaturalSpec()).x
    half = 0.5 * float((d * fisher.product(d)).sum())
    old = (labels.weight, labels.bias)
    ratios = []
    for target in (1e-4, 1e-6, 1e-8):
        scale = (target / half) ** 0.5
        new = (labels.weight + scale * d[:, :WIDTH], None if labels.bias is None else labels.bias + scale * d[:, -1])
        ratios.append(divergence(labels.hidden_N_K_D.flatten(0, 1), new, old, 1.3) / target)
    errors = [abs(ratio - 1) for ratio in ratios]
    assert errors[0] < 0.02
    assert errors[1] < max(1e-3, 0.2 * errors[0])
    assert errors[2] < 0.2 * errors[1]


def test_the_divergence_and_its_gradient_are_those_of_autograd() -> None:
    now, start = make_labels(bias=True), make_labels(bias=True, seed=4)
    hidden = now.hidden_N_K_D.flatten(0, 1)
    weight, offset = now.weight.clone().requires_grad_(), now.bias.clone().requires_grad_()  # type: ignore[union-attr]
    first = torch.log_softmax((hidden @ weight.mT + offset) / 1.2, -1)
    second = torch.log_softmax((hidden @ start.weight.mT + start.bias) / 1.2, -1)
    loss = (first.exp() * (first - second)).sum(-1).mean()
    loss.backward()
    pair = (now.weight, now.bias), (start.weight, start.bias)
    assert divergence(hidden, *pair, 1.2) == pytest.approx(float(loss.detach()), rel=1e-12)
    step = with_bias(now.weight - start.weight, now.bias - start.bias) / 0.7  # type: ignore[operator]
    assert step_divergence(hidden, pair[0], step, 0.7, 1.2) == pytest.approx(divergence(hidden, *pair, 1.2), rel=1e-12)
    assert relative(divergence_gradient(hidden, *pair, 1.2), with_bias(weight.grad, offset.grad)) < 1e-12  # type: ignore[arg-type]
    assert float(loss.detach()) > 0.1


def make_rollout(labels: HeadLabels, seed: int = 5) -> Rollout:
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, K + 1, (N,), generator=rng)
    mask = torch.arange(K) < lengths[:, None]
    ids = torch.randint(0, len(labels.weight), (N, K), generator=rng)
    q = labels.at(torch.arange(N * K)).view(N, K, -1)
    logq = q.log().gather(-1, ids[..., None])[..., 0]
    none = torch.zeros(N, 1, dtype=torch.int64)
    return Rollout(["p"] * N, none, none.bool(), ids, mask, torch.where(mask, logq, 0.0), 2, 1.0)


@pytest.mark.parametrize("bias", [False, True])
def test_advantages_give_the_gradient_of_log_probabilities(bias: bool) -> None:
    labels = make_labels(bias=bias, temperature=1.3, barred=0)
    rollout = make_rollout(labels)
    advantage = torch.randn(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    weight = labels.weight.clone().requires_grad_()
    offset = torch.zeros(ROWS, dtype=torch.float64) if labels.bias is None else labels.bias.clone()
    offset.requires_grad_()
    logits = (labels.hidden_N_K_D @ weight.mT + offset) / 1.3
    chosen = torch.log_softmax(logits, -1).gather(-1, rollout.ids_N_K[..., None])[..., 0]
    (chosen * advantage * rollout.mask_N_K).sum().backward()
    gradient = LabelGradient.like(labels, torch.arange(N * K))
    add_advantages(gradient, labels, rollout, Credit(advantage))
    found = gradient.total
    reference = with_bias(weight.grad, offset.grad if bias else None)  # type: ignore[arg-type]
    assert relative(found, reference) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [6, 2])
def test_the_labels_gradient_is_the_derivative_of_phi_by_the_generators_head(batch: int, bias: bool) -> None:
    """Contexts fixed: Φ of an inner run on soft labels as a function of the head alone, by the five-point rule."""
    model = make_target("gpt2", tied=False)
    examples = make_examples(N, longest=K + 1, seed=7)
    examples = replace(examples, label_N_S=examples.attention_N_S.clone().index_fill_(1, torch.tensor([0]), False))
    labels = make_labels(bias=bias, temperature=1.2, rows=VOCAB)
    labels = replace(labels, offset=1, width=examples.ids_N_S.shape[1])
    spec = OptimizerSpec("adamw", lr=0.05, eps=1e-2, eps_root=1e-5)
    metric = HeldOutLoss(make_examples(4, seed=9))

    def run(at: HeadLabels, **options: object):
        return metagradient(model, replace(examples, soft=at), spec, metric, batch_size=batch, **options)  # type: ignore[arg-type]

    whole = replace(labels, offset=0, width=K)
    sink, drawn = LabelGradient.like(whole, torch.arange(N * K)), DrawnCredit(torch.zeros(N, K, dtype=torch.float64))
    result = run(labels, sink=sink, labels=True)
    run(labels, sink=drawn)
    assert result.label_N_S_V is not None
    sampled = result.label_N_S_V.gather(-1, examples.ids_N_S[..., None])[..., 0]
    assert relative(drawn.token_N_K[:, : sampled.shape[1] - 1], sampled[:, 1:]) < 1e-12
    rng = torch.Generator().manual_seed(8)
    for _ in range(2):
        way = torch.randn(sink.total.shape, dtype=torch.float64, generator=rng)
        values = []
        for k in (-2, -1, 1, 2):
            moved = replace(labels, weight=labels.weight + k * 1e-4 * way[:, :WIDTH])
            if labels.bias is not None:
                moved = replace(moved, bias=labels.bias + k * 1e-4 * way[:, -1])
            values.append(run(moved).value)
        slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / 12e-4
        assert abs(slope / float((way * sink.total).sum()) - 1) < 1e-6


def make_policy(labels: HeadLabels, spec: NaturalSpec) -> tuple[NaturalPolicy, HeadLabels]:
    """A policy around a linear layer with the labels' weights, and the labels as it sees them."""
    layer = nn.Linear(WIDTH, len(labels.weight), bias=labels.bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(labels.weight)
        if labels.bias is not None:
            layer.bias.copy_(labels.bias)
    head = Head(nn.Identity(), "", "weight", "bias" if labels.bias is not None else None, layer)
    bias = None if labels.bias is None else layer.bias.detach()
    return NaturalPolicy(spec, HeadChange(head)), replace(labels, weight=layer.weight.detach(), bias=bias)


@pytest.mark.parametrize("bias", [False, True])
def test_steps_cost_what_they_are_to_and_the_whole_keeps_to_the_budget(bias: bool) -> None:
    spec = NaturalSpec(trust=1e-4, kl_budget=1.5e-3, damping=1e-3)
    policy, labels = make_policy(make_labels(bias=bias, barred=0), spec)
    every = torch.arange(N * K)
    gradient = torch.randn(ROWS, WIDTH + bias, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    total = []
    for step in range(6):
        numbers = policy.step(labels, every, gradient.clone(), phi=-1.0 + 0.1 * step)
        total.append(numbers["kl"])
        if step < 2:
            assert numbers["step_kl"] == pytest.approx(numbers["trust"], rel=0.05)
        assert numbers["trust"] == pytest.approx(1e-4 * 1.1**step)
    assert total[0] == pytest.approx(1e-4, rel=0.05)
    assert total[1] == pytest.approx(1e-4 * (1 + 1.1**0.5) ** 2, rel=0.1)  # in one direction lengths add up
    assert max(total) <= 1.5e-3
    assert total[-1] > 0.95 * 1.5e-3
    policy.step(labels, every, gradient.clone(), phi=-3.0)  # Φ fell
    assert policy.trust == pytest.approx(1e-4 * 1.1**5 / 2)


def test_a_step_that_is_no_longer_small_is_shortened() -> None:
    policy, labels = make_policy(make_labels(bias=False, barred=0), NaturalSpec(trust=0.5, kl_budget=100.0))
    rare = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    rare[0] = labels.hidden_N_K_D.flatten(0, 1).mean(0)
    fisher = fisher_of(labels, torch.arange(N * K))
    numbers = policy.step(labels, torch.arange(N * K), fisher.product(rare), phi=0.0)
    assert numbers["step_kl"] < 0.75
    assert numbers["kl"] == pytest.approx(numbers["step_kl"])


def test_a_kl_coefficient_pulls_back_to_the_start() -> None:
    policy, labels = make_policy(
        make_labels(bias=True, barred=0), NaturalSpec(trust=1e-3, kl=5.0, damping=0.0, tolerance=1e-9)
    )
    every = torch.arange(N * K)
    policy.change.add(
        0.05 * torch.randn(ROWS, WIDTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    before = with_bias(*policy.change.now).clone()
    tiny = 1e-9 * torch.randn(ROWS, WIDTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fisher = fisher_of(labels, torch.arange(N * K))
    numbers = policy.step(labels, every, tiny, phi=0.0)
    moved, back = with_bias(*policy.change.now) - before, with_bias(*policy.change.start) - before

    def inner(a: Tensor, b: Tensor) -> float:
        return float((a * fisher.product(b)).sum())

    assert inner(moved, back) / (inner(moved, moved) * inner(back, back)) ** 0.5 > 0.98  # to first order the way back
    assert numbers["kl"] < 0.5 * inner(back, back)


def test_a_gradient_that_is_not_finite_leaves_the_head_alone() -> None:
    policy, labels = make_policy(make_labels(bias=False), NaturalSpec())
    before = labels.weight.clone()
    gradient = torch.full((ROWS, WIDTH), math.nan, dtype=torch.float64)
    with pytest.raises(DegenerateError, match="not finite"):
        policy.step(labels, torch.arange(N * K), gradient, phi=0.0)
    assert torch.equal(labels.weight, before)
    numbers = policy.step(labels, torch.arange(N * K), torch.zeros(ROWS, WIDTH, dtype=torch.float64), phi=0.0)
    assert numbers["step_kl"] == 0
    assert torch.equal(labels.weight, before)


def test_tokens_are_spread_evenly() -> None:
    assert spread(torch.arange(10) * 3, 20).tolist() == [3 * n for n in range(10)]
    assert spread(torch.arange(10), 4).tolist() == [0, 2, 5, 7]
