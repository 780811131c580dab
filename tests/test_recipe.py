"""What people fine-tune with, element by element: schedules, steps and groups as stock libraries have them, and refusals.

Metagradients through all of them are judged in `test_reference.py`, over the table of `cases.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from dpg_cli.engine import (
    Batches,
    Group,
    Groups,
    OptimizerSpec,
    Plan,
    Recipe,
    Schedule,
    metagradient,
    reference_metagradient,
)
from dpg_cli.engine.inner.recipe.groups import undecayed
from dpg_cli.engine.inner.recipe.stepper import Stepper
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.inner.target import TargetRun
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

ALL = Recipe(
    ADAMW,
    Schedule("cosine", warmup=0.3),
    max_grad_norm=0.5,
    groups=Groups((Group(("*mlp*",), lr=0.01),), TRAINER),
    batches=Batches(2, accumulation=2, epochs=2.0, order="shuffled", seed=3),
)
CLIPPED = Recipe(SGD, max_grad_norm=0.8, batches=Batches(3))
COUNT = 8


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


NAMES = {  # ours: transformers'
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine_with_min_lr",
    "restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "inverse-sqrt": "inverse_sqrt",
    "stable-decay": "warmup_stable_decay",
}


def stock_rates(recipe: Recipe, total: int) -> list[float]:
    """The learning rates of a run by `transformers.get_scheduler`."""
    schedule, lr = recipe.schedule, recipe.optimizer.lr
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    warmup = int(schedule.warmup) if schedule.warmup >= 1 else math.ceil(total * schedule.warmup)
    special: dict[str, object] = {
        "cosine": {"num_cycles": schedule.cycles or 0.5, "min_lr_rate": schedule.floor},
        "restarts": {"num_cycles": schedule.cycles or 1},
        "polynomial": {"lr_end": schedule.end, "power": schedule.power},
        "inverse-sqrt": {"timescale": schedule.timescale or None},
        "stable-decay": {
            "num_decay_steps": schedule.decay_steps,
            "decay_type": schedule.decay,
            "min_lr_ratio": schedule.floor,
        },
    }.get(schedule.name, {})
    scheduler = get_scheduler(
        NAMES[schedule.name],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=special,
    )
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(total - 1):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def stock_steps(batches: Batches, count: int) -> list[list[int]]:
    """The examples of each step, by the data loader's own rules."""
    size, steps, epoch = batches.size or count, list[list[int]](), 0
    while True:
        order = list(range(count))
        if batches.order == "shuffled":
            order = torch.randperm(count, generator=torch.Generator().manual_seed(batches.seed + epoch)).tolist()
        loader = [order[at : at + size] for at in range(0, count, size)]
        if batches.drop_last and len(loader[-1]) < size:
            loader.pop()
        groups = [loader[at : at + batches.accumulation] for at in range(0, len(loader), batches.accumulation)]
        made = [[row for batch in group for row in batch] for group in groups]
        total = batches.max_steps or math.ceil(batches.epochs * len(made))
        steps, epoch = steps + made, epoch + 1
        if len(steps) >= total:
            return steps[:total]


@pytest.mark.parametrize("total", [1, 2, 7, 23])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_transformers_to_the_last_digit(name: str, total: int) -> None:
    recipe = Recipe(replace(ADAMW, lr=3e-4), SCHEDULES[name])
    assert recipe.schedule.rates(total, 3e-4) == stock_rates(recipe, total)


@pytest.mark.parametrize("memory", ["sqrt", "offload"])
@pytest.mark.parametrize("recipe", [ALL, CLIPPED], ids=["all", "clipped"])
def test_choices_of_memory_change_nothing(recipe: Recipe, memory: Memory) -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(COUNT)
    kept = metagradient(model, examples, recipe, METRIC)
    other = metagradient(model, examples, recipe, METRIC, memory=memory)
    assert relative(other.token_N_S, kept.token_N_S) < 1e-11
    assert other.stats["clipped_share"] == kept.stats["clipped_share"] > 0


BATCHES = {
    "all": Batches(),
    "last-smaller": Batches(3, epochs=2.0, order="shuffled", seed=5),
    "accumulated": Batches(2, accumulation=3, epochs=1.5, order="shuffled", seed=1),
    "in-order": Batches(3, accumulation=2, epochs=2.0),
    "capped": Batches(2, max_steps=6, drop_last=True),
    "dropped": Batches(3, epochs=3.0, order="shuffled", seed=2, drop_last=True),
}


@pytest.mark.parametrize("count", [4, 8, 11])
@pytest.mark.parametrize("name", BATCHES)
def test_steps_are_those_of_a_data_loader(name: str, count: int) -> None:
    plan = BATCHES[name].plan(count)
    assert [plan.index(number).tolist() for number in range(len(plan))] == stock_steps(BATCHES[name], count)


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


def test_the_first_group_that_matches_decides() -> None:
    groups = Groups((Group(("*mlp*",), lr=0.005), Group(("*.1.*",), lr=0.03, weight_decay=0.2)), TRAINER)
    found = groups.settings(make_target("llama", tied=False), 0.02, 0.1)
    assert {name.removeprefix("model."): found[name] for name in found if "mlp.up" in name or "norm" in name} == {
        "layers.0.mlp.up_proj.weight": (0.005, 0.1),
        "layers.0.input_layernorm.weight": (0.02, 0.0),
        "layers.0.post_attention_layernorm.weight": (0.02, 0.0),
        "layers.1.mlp.up_proj.weight": (0.005, 0.1),
        "layers.1.input_layernorm.weight": (0.03, 0.2),
        "layers.1.post_attention_layernorm.weight": (0.03, 0.2),
        "norm.weight": (0.02, 0.0),
    }
    assert found["lm_head.weight"] == (0.02, 0.1)
    assert found["model.layers.1.self_attn.q_proj.weight"] == (0.03, 0.2)


def test_frozen_parameters_stay_and_are_given_back() -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(COUNT)
    recipe = Recipe(ADAMW, groups=Groups((Group(("*wte*", "*wpe*"), frozen=True),)), batches=Batches(3))
    result = metagradient(model, examples, recipe, METRIC)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert len(result.final) == len(dict(model.named_parameters())) - 2
    slow = reference_metagradient(model, examples, recipe, METRIC)
    assert relative(result.token_N_S, slow.token_N_S) < 1e-9
    assert slow.final.keys() == result.final.keys()


def test_one_group_is_one_range_of_the_flat_vector() -> None:
    model = make_target("llama", tied=False)
    recipe = ALL
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
