"""What people fine-tune with, element by element: against the unrolled twin and finite differences, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn
from transformers import Trainer
from unrolled import stock_rates, stock_steps, twin

from dpg_cli.engine import Batches, Group, Groups, OptimizerSpec, Plan, Recipe, Schedule, metagradient
from dpg_cli.engine.inner.recipe.groups import undecayed
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.metagrad import metric_gradient
from dpg_cli.engine.params import ParameterSpace
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
        groups=Groups((Group(("*mlp*",), lr=0.005), Group(("*.1.*",), lr=0.03, weight_decay=0.2)), TRAINER),
        batches=Batches(3),
    ),
    "frozen": Recipe(ADAMW, groups=Groups((Group(("*attn*", "*.0.*"), frozen=True),)), batches=Batches(3)),
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


BITTEN = ("clip-bites", "clip-sgd", "clip-one-step", "all")
COUNT = 8
TIED = ("clip-bites", "epochs", "all")


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


def weights_of(count: int) -> Tensor:
    return 1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("name", RECIPES)
def test_equals_the_unrolled_run(name: str, architecture: str) -> None:
    recipe, examples, weights = RECIPES[name], make_examples(COUNT), weights_of(COUNT)
    model = make_target(architecture, tied=name in TIED)
    result = metagradient(model, examples, recipe, METRIC, weights_N=weights, visits=True)
    value, token_N_S = twin(model, examples, recipe, METRIC, weights)
    assert abs(result.value - value) < 1e-12
    assert token_N_S.norm() > 1e-3
    assert relative(result.token_N_S, token_N_S) < 1e-9
    assert (result.stats.get("clipped_share", 0.0) > 0) == (name in BITTEN)

    assert result.visits is not None
    assert result.visits.example_M.tolist() == [row for step in stock_steps(recipe, COUNT) for row in step]
    visited = torch.zeros_like(weights).index_add_(0, result.visits.example_M, result.visits.credit_M)
    assert relative(visited, result.example_N) < 1e-12


@pytest.mark.parametrize(
    ("name", "architecture"), [("all", "llama"), ("clip-bites", "gpt2"), ("epochs", "llama"), ("own-rate", "gpt2")]
)
def test_equals_finite_differences(name: str, architecture: str) -> None:
    recipe, weights = RECIPES[name], weights_of(COUNT)
    model = make_target(architecture, tied=name in TIED)
    result = metagradient(model, make_examples(COUNT), recipe, METRIC, weights_N=weights)
    most = int(result.example_N.abs().argmax())
    step = torch.zeros_like(weights)
    step[most] = h = 1e-4
    a, b, c, d = (phi(model, recipe, COUNT, weights + k * step) for k in (-2, -1, 1, 2))
    slope = (a - 8 * b + 8 * c - d) / (12 * h)
    assert abs(slope / float(result.example_N[most]) - 1) < 1e-6


@pytest.mark.parametrize("memory", ["sqrt", "offload"])
@pytest.mark.parametrize("name", ["all", "clip-sgd"])
def test_choices_of_memory_change_nothing(name: str, memory: Memory) -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(COUNT)
    kept = metagradient(model, examples, RECIPES[name], METRIC)
    other = metagradient(model, examples, RECIPES[name], METRIC, memory=memory)
    assert relative(other.token_N_S, kept.token_N_S) < 1e-11
    assert other.stats["clipped_share"] == kept.stats["clipped_share"] > 0


def test_a_plan_by_hand_and_labels_add_up_over_visits() -> None:
    model, examples = make_target("gpt2", tied=False), make_examples(COUNT)
    plan = Plan.of([[3, 1], [1, 0, 3], [7, 3]], COUNT)
    result = metagradient(model, examples, ADAMW, METRIC, plan=plan, labels=True, visits=True)
    assert result.label_N_S_V is not None and result.visits is not None
    sampled = result.label_N_S_V.gather(-1, examples.ids_N_S[..., None])[..., 0]
    assert relative(sampled, result.token_N_S) < 1e-12
    assert result.visits.step_M.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert bool((result.example_N[[2, 4, 5, 6]] == 0).all())
    assert float(result.visits.credit_M[[0, 4, 6]].sum()) == pytest.approx(float(result.example_N[3]), rel=1e-12)
    for wrong in ([], [[0], []], [[COUNT]]):
        with pytest.raises(ValueError, match="plan"):
            Plan.of(wrong, COUNT)


def test_parameters_without_decay_are_those_of_the_trainer() -> None:
    for architecture in ("gpt2", "llama"):
        model = make_target(architecture, tied=False)
        stock = set(Trainer.get_decay_parameter_names(None, model))
        assert undecayed(model, TRAINER) == {name for name, _ in model.named_parameters()} - stock
        assert len(stock) > 5
        words = undecayed(model, ("embeddings", "lm_head.*"))
        assert len(words) == (3 if architecture == "gpt2" else 2)
    tied = make_target("gpt2", tied=True)
    assert undecayed(tied, ("embeddings",)) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_frozen_parameters_stay_and_are_given_back() -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(COUNT)
    recipe = Recipe(ADAMW, groups=Groups((Group(("*wte*", "*wpe*"), frozen=True),)), batches=Batches(3))
    result = metagradient(model, examples, recipe, METRIC)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(result.final) == len(dict(model.named_parameters())) - 2
    assert relative(result.token_N_S, twin(model, examples, recipe, METRIC, torch.ones(COUNT).double())[1]) < 1e-9


def test_one_group_is_one_range_of_the_flat_vector() -> None:
    model = make_target("llama", tied=False)
    recipe = RECIPES["all"]
    with recipe.prepared(model):
        run = TargetRun(model, recipe.space(model))
        stepper = Stepper(run, recipe, 9)
    assert [(rate.lr, rate.weight_decay) for rate in stepper.peaks] == [(0.01, 0.1), (0.02, 0.0), (0.02, 0.1)]
    assert stepper.peaks[-1].stop == run.space.size == sum(parameter.numel() for parameter in model.parameters())
    assert len(Stepper(TargetRun(model, ParameterSpace(model)), recipe, 9).peaks) > 3


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (Groups(no_decay=("biases", "lm_heat.*")), "lm_head.weight"),
        (Groups((Group(("*attn*", "nothing.*"), lr=0.1),)), "nothing"),
        (Groups((Group(("*",), frozen=True),)), "Every parameter"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused(groups: Groups, words: str) -> None:
    model = make_target("gpt2", tied=False)
    with pytest.raises(UsageError, match=re.escape(words)):
        metagradient(model, make_examples(3), Recipe(ADAMW, groups=groups), METRIC)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Schedule("cosinus"), "cosinus"),
        (lambda: Schedule("linear", warmup=2.5), "whole number"),
        (lambda: Schedule("stable-decay"), "decay_steps"),
        (lambda: Schedule(floor=2.0), "floor"),
        (lambda: Schedule("polynomial", end=1.0).factors(3, 1e-3), "goes down"),
        (lambda: Recipe(max_grad_norm=-1.0), "max_grad_norm"),
        (lambda: Recipe(precision="fp8"), "fp8"),
        (lambda: Recipe(normalization="word"), "word"),
        (lambda: Group(()), "glob"),
        (lambda: Group(("*",), lr=0.0), "frozen"),
        (lambda: Group(("*",), lr=1.0, frozen=True), "neither"),
        (lambda: Batches(epochs=0.0), "epochs"),
        (lambda: Batches(accumulation=0), "accumulation"),
        (lambda: Batches(order="sorted"), "sorted"),
    ],
)
def test_impossible_recipes_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_batches_that_cannot_be_filled_are_refused_and_scaled_ones_keep_their_steps() -> None:
    with pytest.raises(UsageError, match="fill no batch of 9"):
        Batches(9, drop_last=True).plan(8)
    batches = Batches(4, accumulation=2, epochs=3.0)
    for count in (1, 7, 20, 333):
        steps = batches.rescaled(40, count).steps(count)
        assert steps == 3 * min(count, batches.steps_of_epoch(40)) or count == 7
        assert len(batches.rescaled(40, count).plan(count)) == steps
