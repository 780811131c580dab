"""What people fine-tune with, element by element: against the unrolled twin and finite differences, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn
from unrolled import stock_rates, stock_steps, twin

from dpg_cli.engine import Batches, Group, Groups, OptimizerSpec, Plan, Recipe, Schedule, metagradient
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.metagrad import metric_gradient
from dpg_cli.errors import UsageError

ADAMW = OptimizerSpec("adamw", lr=0.02, beta1=0.9, beta2=0.95, eps=1e-8, eps_root=1e-5, weight_decay=0.1)
SGD = OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.05)
METRIC = HeldOutLoss(make_examples(4, seed=9))
TRAINER = ("biases", "norms")

SCHEDULES = {
    "constant": Schedule(),
    "constant-warm": Schedule("constant", warmup=3),
    "linear": Schedule("linear"),
    "linear-warm": Schedule("linear", warmup=0.1),
    "cosine": Schedule("cosine", warmup=0.05),
    "cosine-waves": Schedule("cosine", warmup=2, cycles=1.5),
    "cosine-floor": Schedule("cosine", warmup=0.2, floor=0.1),
    "restarts": Schedule("restarts", warmup=1, cycles=3),
    "restart": Schedule("restarts"),
    "polynomial": Schedule("polynomial", warmup=0.3, power=2.0, end=1e-6),
    "polynomial-1": Schedule("polynomial"),
    "inverse-sqrt": Schedule("inverse-sqrt", warmup=4),
    "inverse-sqrt-scale": Schedule("inverse-sqrt", warmup=1, timescale=7),
    "inverse-sqrt-cold": Schedule("inverse-sqrt"),
    "stable-decay": Schedule("stable-decay", warmup=0.1, decay_steps=5),
    "stable-decay-floor": Schedule("stable-decay", warmup=3, decay_steps=4, decay="1-sqrt", floor=0.2),
    "stable-decay-linear": Schedule("stable-decay", decay_steps=3, decay="linear"),
}

RECIPES = {  # one element each, then together
    "schedule": Recipe(ADAMW, Schedule("cosine", warmup=1), batches=Batches(3)),
    "schedule-sgd": Recipe(SGD, Schedule("linear"), batches=Batches(3)),
    "clip-bites": Recipe(ADAMW, max_grad_norm=0.5, batches=Batches(3)),
    "clip-idle": Recipe(ADAMW, max_grad_norm=1e3, batches=Batches(3)),
    "clip-sgd": Recipe(SGD, max_grad_norm=0.8, batches=Batches(3)),
    "clip-one-step": Recipe(ADAMW, max_grad_norm=0.5),
    "no-decay": Recipe(ADAMW, groups=Groups(no_decay=("biases", "norms", "embeddings")), batches=Batches(3)),
    "own-rate": Recipe(
        ADAMW,
        Schedule("linear"),
        groups=Groups((Group(("*mlp*",), lr=0.005), Group(("*norm*", "*ln_*"), lr=0.03, weight_decay=0.2)), TRAINER),
        batches=Batches(3),
    ),
    "frozen": Recipe(ADAMW, groups=Groups((Group(("*attn*", "*embed*", "*wte*"), frozen=True),)), batches=Batches(3)),
    "epochs": Recipe(ADAMW, batches=Batches(3, epochs=2.0, order="shuffled", seed=5)),
    "accumulation": Recipe(ADAMW, batches=Batches(2, accumulation=2, epochs=1.5, order="shuffled", seed=1)),
    "example": Recipe(ADAMW, batches=Batches(2, max_steps=4, drop_last=True), normalization="example"),
    "all": Recipe(
        ADAMW,
        Schedule("cosine", warmup=0.3),
        max_grad_norm=0.5,
        groups=Groups((Group(("*mlp*",), lr=0.01),), TRAINER),
        batches=Batches(2, accumulation=2, epochs=2.0, order="shuffled", seed=3),
    ),
}


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def phi(model: nn.Module, recipe: Recipe, count: int, weights: Tensor) -> float:
    """Φ after an inner run with these data weights."""
    examples = make_examples(count)
    with recipe.prepared(model):
        run = TargetRun(model, recipe.space(model), recipe.normalization, examples.ids_N_S.shape[1])
        trace = inner_run(run, run.space.read(model), examples, recipe, weights)
        return metric_gradient(run, trace.theta, METRIC)[0]


@pytest.mark.parametrize("total", [1, 2, 7, 23])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers_to_the_last_digit(name: str, total: int) -> None:
    recipe = Recipe(replace(ADAMW, lr=3e-4), SCHEDULES[name])
    assert recipe.schedule.rates(total, 3e-4) == stock_rates(recipe, total)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_unrolled_run_and_finite_differences(name: str, architecture: str) -> None:
    recipe, count = RECIPES[name], 8
    model = make_target(architecture, tied=name in ("clip-bites", "epochs", "all"))
    examples = make_examples(count)
    weights = 1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = metagradient(model, examples, recipe, METRIC, weights_N=weights, visits=True)
    assert bool((result.stats.get("clipped_share", 0.0) > 0) == (name in ("all", *(f"clip-{w}" for w in ("bites", "sgd", "one-step")))))

    value, token_N_S = twin(make_target(architecture, tied=name in ("clip-bites", "epochs", "all")), examples, recipe, METRIC, weights)
    assert abs(result.value - value) < 1e-12
    assert token_N_S.norm() > 1e-3
    assert relative(result.token_N_S, token_N_S) < 1e-9

    assert result.visits is not None
    assert result.visits.example_M.tolist() == sum(stock_steps(recipe, count), [])
    visited = torch.zeros_like(weights).index_add_(0, result.visits.example_M, result.visits.credit_M)
    assert relative(visited, result.example_N) < 1e-12

    some = result.example_N.abs().argsort(descending=True)[:2].tolist()
    slopes, h = [], 1e-4
    for i in some:
        step = torch.zeros_like(weights)
        step[i] = h
        a, b, c, d = (phi(model, recipe, count, weights + k * step) for k in (-2, -1, 1, 2))
        slopes.append((a - 8 * b + 8 * c - d) / (12 * h))
    assert relative(torch.tensor(slopes, dtype=torch.float64), result.example_N[some]) < 1e-6
