"""The recipe in a run's settings: checked, understood by the engine, and repeated by stock PyTorch."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import torch
from builders import make_examples, make_target

from dpg_cli.driver.recipe import inner_recipe
from dpg_cli.engine import Batches, Recipe
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.errors import ConfigError
from dpg_cli.evidence.stock import fine_tune
from dpg_cli.settings.config import to_toml, validate
from dpg_cli.settings.inner import InnerConfig
from dpg_cli.settings.presets import resolve

EVERYTHING: dict[str, Any] = {
    "lr": 0.01,
    "weight_decay": 0.2,
    "schedule": "cosine",
    "warmup": 0.2,
    "lr_floor": 0.1,
    "max_grad_norm": 0.5,
    "no_decay": ["biases", "norms"],
    "groups": [{"names": ["*mlp*"], "lr": 0.004}, {"names": ["*.0.*"], "frozen": True}],
    "batch_size": 2,
    "accumulation": 2,
    "epochs": 2.5,
    "order": "shuffled",
}
RUNS: dict[str, dict[str, Any]] = {
    "everything": EVERYTHING,
    "restarts": {"lr": 0.01, "schedule": "restarts", "cycles": 2.0, "max_steps": 5, "batch_size": 4},
    "polynomial": {
        "optimizer": "sgd",
        "lr": 0.3,
        "momentum": 0.5,
        "schedule": "polynomial",
        "lr_end": 0.01,
        "batch_size": 3,
    },
    "embeddings": {"lr": 0.01, "weight_decay": 0.3, "no_decay": ["embeddings", "*ln*"], "batch_size": 4},
    "stable-decay": {"lr": 0.01, "schedule": "stable-decay", "decay_steps": 2, "epochs": 2.0, "batch_size": 4},
    "inverse-sqrt": {"lr": 0.01, "schedule": "inverse-sqrt", "warmup": 2.0, "epochs": 2.0, "batch_size": 4},
}


@pytest.mark.parametrize("name", RUNS)
def test_stock_torch_trains_to_the_same_weights(name: str) -> None:
    inner = validate({"inner": {"eps": 1e-5, **RUNS[name]}}).inner
    model, examples, seed = make_target("gpt2", tied=True), make_examples(11), 4
    recipe = inner_recipe(inner, seed)
    assert recipe.batches.steps(11) == inner.steps(11)
    with recipe.prepared(model):
        run = TargetRun(model, recipe.space(model))
        theta = run.space.read(model)
        # the stock loop splits an epoch evenly
        even = Recipe(**{**recipe.__dict__, "batches": recipe.batches.rescaled(11, 11)})
        trace = inner_run(run, theta, examples, even, theta.new_ones(11))
    rows = zip(examples.ids_N_S, examples.attention_N_S, strict=True)
    taken = fine_tune(model, [ids[real].tolist() for ids, real in rows], inner, inner.steps_of_epoch(11), seed=seed)
    assert taken == len(trace.losses) == inner.steps(11)
    after = run.space.read(model)
    assert float((after - theta).norm()) > 0.01
    # stock cross-entropy and torch's fused scalars round elsewhere
    assert float((after - trace.theta).norm() / (after - theta).norm()) < 1e-10


def test_settings_go_through_toml() -> None:
    config = validate({"inner": EVERYTHING})
    assert validate(tomllib.loads(to_toml(config))) == config
    changed = resolve({}, ['inner.no_decay=["biases"]', "inner.warmup=10", 'inner.groups=[{names=["a*"], lr=0.1}]'])
    assert changed.inner.no_decay == ("biases",)
    assert changed.inner.groups[0].lr == 0.1
    assert changed.inner.warmup == 10


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("size", "accumulation", "epochs", "most"), [(3, 1, 1.0, 0), (2, 4, 2.5, 0), (50, 1, 1.0, 7)])
def test_steps_are_those_of_the_engine(size: int, accumulation: int, epochs: float, most: int, drop_last: bool) -> None:
    inner = InnerConfig(batch_size=size, accumulation=accumulation, epochs=epochs, max_steps=most, drop_last=drop_last)
    batches = Batches(size, accumulation, epochs, most, drop_last=drop_last)
    for count in (50, 64, 77):
        assert inner.steps(count) == batches.steps(count) == len(batches.plan(count))
    assert validate({"inner": {"batch_size": 100, "epochs": 2.0}, "prompts": {"per_step": 50}}).inner_steps == 4


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ({"schedule": "cosinus"}, "inner.schedule"),
        ({"warmup": 1.5}, "neither a whole number"),
        ({"schedule": "stable-decay"}, "decay_steps"),
        ({"schedule": "polynomial", "lr": 1e-8}, "lr_end"),
        ({"lr_floor": 2.0}, "lr_floor"),
        ({"groups": [{"lr": 0.1}]}, "at least one glob"),
        ({"groups": [{"names": ["a"]}]}, "frozen, or has"),
        ({"groups": [{"names": ["a"], "frozen": True, "lr": 0.1}]}, "frozen, or has"),
        ({"groups": [{"names": ["a"], "learning_rate": 0.1}]}, "unknown setting"),
        ({"epochs": 0.0}, "inner.epochs"),
        ({"max_grad_norm": -1.0}, "inner.max_grad_norm"),
    ],
)
def test_faults_are_named(inner: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate({"inner": inner})


def test_nothing_changes_where_nothing_is_set() -> None:
    assert inner_recipe(InnerConfig(batch_size=8), 3) == Recipe(
        inner_recipe(InnerConfig(), 3).optimizer, batches=Batches(8, seed=3)
    )
    assert torch.equal(torch.tensor(inner_recipe(InnerConfig(), 0).schedule.factors(5, 1.0)), torch.ones(5))
