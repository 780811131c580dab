"""What a generator's head can do to a patch of the target's: in float64 against dense matrices, the metagradient and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from builders import VOCAB, make_examples, make_target
from test_natural import WIDTH, K, N, make_labels, relative
from torch import Tensor, nn

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.natural import reach as reach_module
from dpg_cli.engine.natural.head_policy import LabelGradient
from dpg_cli.engine.natural.reach import Reach
from dpg_cli.engine.noise import Moments, head_moments, patch_noise
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.metrics.moments import moments_pull

R, C, M = 4, 3, 60
WINDOW = (slice(3, 9), slice(2, 6))
SGD = OptimizerSpec("sgd", lr=0.3)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_reach(width: int = 6, temperature: float = 1.0, *, same: bool = False, likely: float = 0.0) -> Reach:
    """Tokens of two models with other features, or of one; `likely` raises q of the rows."""
    hidden = normal(M, width, seed=1) @ normal(width, width, seed=2)
    read = hidden[:, 1 : 1 + C].clone() if same else (hidden @ normal(width, C, seed=3)).tanh()
    logits = torch.cat([normal(M, R, seed=4) + likely, normal(M, 5, seed=5)], 1)
    return Reach(hidden, read, torch.softmax(logits, -1)[:, :R], 1, temperature)


def dense(reach: Reach) -> tuple[Tensor, Tensor]:
    """F with its ridge, and R, as matrices over (row, column) pairs."""
    spread = torch.diag_embed(reach.likely_M_R) - reach.likely_M_R[:, :, None] * reach.likely_M_R[:, None, :]
    own = torch.einsum("mrs,mc,md->rcsd", spread, reach.hidden_M_D, reach.hidden_M_D)
    cross = torch.einsum("mrs,mc,md->rcsd", spread, reach.read_M_C, reach.hidden_M_D)
    own = own.flatten(0, 1).flatten(1) / (reach.tokens * reach.temperature**2)
    ridge = reach.blocks.ridge_R.repeat_interleave(reach.hidden_M_D.shape[1])
    return own + torch.diag(ridge), cross.flatten(0, 1).flatten(1) / (reach.tokens * reach.temperature)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
@pytest.mark.parametrize("likely", [0.0, 2.0])
def test_products_and_solves_are_those_of_dense_matrices(
    temperature: float, likely: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a row is likely, and rows do depend on each other."""
    reach = make_reach(temperature=temperature, likely=likely)
    own, cross = dense(reach)
    change, pull = normal(R, 6, seed=6), normal(R, C, seed=7)
    assert relative(reach.cost(change).flatten(), own @ change.flatten()) < 1e-12
    assert relative(reach.done(change).flatten(), cross @ change.flatten()) < 1e-12
    assert relative(reach.pulled(pull).flatten(), cross.mT @ pull.flatten()) < 1e-12
    monkeypatch.setattr(reach_module, "CLOSE", 1e-11)
    monkeypatch.setattr(reach_module, "EXACT", 1e-9)
    tilt = reach.tilt(pull)
    assert relative(tilt.x.flatten(), torch.linalg.solve(own, cross.mT @ pull.flatten())) < 1e-8
    square = torch.einsum("mr,mc->rc", reach.likely_M_R * (1 - reach.likely_M_R), reach.read_M_C.square()) / M
    whole = cross @ torch.linalg.solve(own, cross.mT) + torch.diag(reach_module.DAMPING * square.flatten())
    found = reach.pull(pull)
    assert relative(found.x.flatten(), torch.linalg.solve(whole, pull.flatten())) < 1e-6
    assert found.iterations < R * C + 5


def test_the_change_is_the_cheapest_that_does_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CLOSE": 1e-11, "EXACT": 1e-10, "DAMPING": 0.0, "RIDGE": 1e-12}.items():
        monkeypatch.setattr(reach_module, name, value)
    reach, asked = make_reach(width=8), normal(R, C, seed=8)
    change = reach.tilt(reach.pull(asked).x).x
    assert relative(reach.done(change), asked) < 1e-7
    own, cross = dense(reach)
    other = normal(R * 8, seed=9)
    other -= torch.linalg.pinv(cross) @ (cross @ other)  # does nothing to the rectangle
    assert float((cross @ other).norm()) < 1e-9 * float(other.norm())
    assert abs(float(change.flatten() @ own @ other)) < 1e-6 * float((other @ own @ other) ** 0.5)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_one_model_as_both_needs_one_product_and_the_fisher_of_the_rectangle(temperature: float) -> None:
    reach = make_reach(temperature=temperature, same=True)
    asked = normal(R, C, seed=8)
    spread = torch.diag_embed(reach.likely_M_R) - reach.likely_M_R[:, :, None] * reach.likely_M_R[:, None, :]
    own = torch.einsum("mrs,mc,md->rcsd", spread, reach.read_M_C, reach.read_M_C).flatten(0, 1).flatten(1) / M
    tilt = reach.tilt(asked)
    assert tilt.iterations == 1
    expected = torch.zeros(R, 6, dtype=torch.float64)
    expected[:, 1 : 1 + C] = asked * temperature
    assert relative(tilt.x, expected) < 1e-3
    assert relative(reach.done(tilt.x).flatten(), own @ asked.flatten()) < 1e-3
    # another model's columns are no start to rest on
    assert make_reach().tilt(asked).iterations > 3


def test_what_the_generators_features_say_little_of_costs_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer features of the same tokens the same change of the rectangle is dearer, and never cheaper than with the target's own."""
    for name, value in {"CLOSE": 1e-10, "EXACT": 1e-9, "DAMPING": 0.0, "RIDGE": 1e-12}.items():
        monkeypatch.setattr(reach_module, name, value)
    whole, asked = make_reach(same=True, width=7), normal(R, C, seed=8)
    blurred, costs = whole.hidden_M_D + 0.3 * normal(M, 7, seed=13), []
    for kept in (7, 5, 4):
        part = replace(whole, hidden_M_D=blurred[:, :kept])
        change = part.tilt(part.pull(asked).x).x
        assert relative(part.done(change), asked) < 1e-5
        costs.append(float((change * part.cost(change)).sum()) / 2)
    own = whole.tilt(whole.pull(asked).x).x
    assert float((own * whole.cost(own)).sum()) / 2 < costs[0] < costs[1] < costs[2]


def test_a_row_that_never_occurs_is_no_fault() -> None:
    reach = make_reach()
    reach.likely_M_R[:, 2] = 0
    found = reach.pull(normal(R, C, seed=8)).x
    assert bool(torch.isfinite(reach.tilt(found).x).all())


@dataclass(frozen=True)
class Linear:
    """<pull, patch>."""

    pull: Tensor

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        return (self.pull * parameters["lm_head.weight"][WINDOW]).sum()

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        return {}

    def describe(self) -> str:
        return "a sum"


def two_models(bias: bool) -> tuple[nn.Module, Examples, HeadLabels]:
    """A target of 16 dimensions, and sequences of one length by a generator of 5."""
    model = make_target("gpt2", tied=False)
    examples = make_examples(N, longest=K + 1, seed=7)
    every = torch.ones(N, K + 1, dtype=torch.bool)
    trained = every.index_fill(1, torch.tensor([0]), False)
    labels = replace(make_labels(bias=bias, temperature=1.2, rows=VOCAB), offset=1, width=K + 1)
    return model, Examples(examples.ids_N_S[:, : K + 1], every, trained, soft=labels), labels


def moments_of(model: nn.Module, examples: Examples) -> Moments:
    found = head_moments(model, examples, WINDOW)
    assert found is not None
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_pulled_is_the_metagradient_by_the_generators_head(bias: bool) -> None:
    model, examples, labels = two_models(bias)
    pull = normal(6, 4, seed=10)
    sink = LabelGradient.like(replace(labels, offset=0, width=K), torch.arange(N * K))
    metagradient(model, examples, SGD, Linear(pull), batch_size=N, sink=sink)
    reach = moments_of(model, examples).reach
    assert reach.hidden_M_D.shape == (N * K, WIDTH + bias)
    assert relative(SGD.lr * reach.pulled(pull), sink.total[WINDOW[0]]) < 1e-9


@pytest.mark.parametrize("bias", [False, True])
def test_what_is_done_is_the_change_of_fine_tuning(bias: bool) -> None:
    """The patch after an inner step, by the five-point rule along a change of the generator's head."""
    model, examples, labels = two_models(bias)
    reach = moments_of(model, examples).reach
    way, patches = normal(6, WIDTH + bias, seed=11), []
    for k in (-2, -1, 1, 2):
        weight = labels.weight.clone()
        weight[WINDOW[0]] += k * 1e-3 * way[:, :WIDTH]
        moved = replace(labels, weight=weight)
        if labels.bias is not None:
            offset = labels.bias.clone()
            offset[WINDOW[0]] += k * 1e-3 * way[:, -1]
            moved = replace(moved, bias=offset)
        final = metagradient(
            model, replace(examples, soft=moved), SGD, Linear(normal(6, 4, seed=1)), batch_size=N
        ).final
        patches.append(final["lm_head.weight"][WINDOW])
    slope = (patches[0] - 8 * patches[1] + 8 * patches[2] - patches[3]) / 12e-3
    assert relative(SGD.lr * reach.done(way), slope) < 1e-8


def test_the_pull_at_moments_asks_for_what_is_missing() -> None:
    """A natural step along it changes the patch by what is missing, to the tolerance of the solves."""
    model, examples, _ = two_models(bias=False)
    moments = moments_of(model, examples)
    noise = patch_noise(moments, [SGD], 1000, 10)
    missing = 1e-3 * moments.reach.done(normal(6, WIDTH, seed=12))  # within reach of so few features
    change = noise.reach.tilt(noise.slope_R_C * moments_pull(noise, missing)).x
    assert relative(noise.slope_R_C * noise.reach.done(change), missing) < 0.1
