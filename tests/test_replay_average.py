"""Replay of own data, and a running average of the weights: exact in float64, and as stock PyTorch has them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor

from dpg_cli.engine import Batches, Examples, OptimizerSpec, Plan, Recipe, Replay, Schedule, Start, metagradient
from dpg_cli.engine import reference_metagradient as reference
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.inner.recipe.average import averaged, shares
from dpg_cli.engine.soft import TableLabels
from dpg_cli.errors import BadValueError

COUNT = 7
METRIC = HeldOutLoss(make_examples(4, seed=9))
OWN = make_examples(5, longest=9, seed=21)
RECIPE = Recipe(
    OptimizerSpec("adamw", lr=0.02, beta2=0.95, eps_root=1e-5, weight_decay=0.1),
    Schedule("cosine", warmup=1),
    0.5,
    batches=Batches(3, epochs=2, order="shuffled", seed=3),
)
REPLAY = Replay(OWN, 0.4)


def relative(value: Tensor, judge: Tensor) -> float:
    return float((value - judge).norm() / judge.norm())


def by_hand() -> tuple[Examples, Plan]:
    """The same run written out: 2 of 5 rows a step of 3 are own ones (1 beside a step of 1), in their order, again and again."""
    rows = make_examples(COUNT)
    sequences = [
        ids[real].tolist() for part in (rows, OWN) for ids, real in zip(part.ids_N_S, part.attention_N_S, strict=True)
    ]
    orders = [torch.randperm(COUNT, generator=torch.Generator().manual_seed(3 + epoch)).tolist() for epoch in (0, 1)]
    own = [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]
    steps = [order[start : start + 3] for order in orders for start in (0, 3, 6)]
    assert [len(step) for step in steps] == [3, 3, 1] * 2
    return Examples.from_sequences(sequences), Plan.of(
        [[*step, *(COUNT + n for n in more)] for step, more in zip(steps, own, strict=True)], COUNT + 5
    )


@pytest.mark.parametrize("changes", [{}, {"ema": 0.6}, {"normalization": "example"}], ids=["plain", "ema", "example"])
def test_replay_equals_the_run_written_out(changes: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **changes)
    weights = 1 + 0.3 * torch.rand(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = metagradient(
        make_target("gpt2", tied=True),
        make_examples(COUNT),
        recipe,
        METRIC,
        weights_N=weights,
        replay=REPLAY,
        visits=True,
    )
    whole, plan = by_hand()
    every = torch.cat([weights, torch.ones(5, dtype=torch.float64)])
    judge = reference(make_target("gpt2", tied=True), whole, recipe, METRIC, weights_N=every, plan=plan)
    assert abs(found.value - judge.value) < 1e-12
    width = found.token_N_S.shape[1]
    assert relative(found.token_N_S, judge.token_N_S[:COUNT, :width]) < 1e-9
    assert float(judge.example_N[COUNT:].abs().max()) > 1e-4  # own rows act, and are not asked
    assert found.visits is not None and sorted(found.visits.example_M.tolist()) == sorted([*range(COUNT)] * 2)
    alone = metagradient(make_target("gpt2", tied=True), make_examples(COUNT), recipe, METRIC, weights_N=weights)
    assert relative(alone.example_N, found.example_N) > 1e-2


@pytest.mark.parametrize(
    ("batches", "ema"),
    [(Batches(0), 0.0), (Batches(3), 0.0), (Batches(3), 0.7), (Batches(2, accumulation=2, epochs=2), 0.7)],
    ids=["T1", "T3", "T3-ema", "T4-ema"],
)
def test_credits_are_finite_differences(batches: Batches, ema: float) -> None:
    recipe = replace(RECIPE, schedule=Schedule("linear"), batches=batches, ema=ema)
    examples, h = make_examples(COUNT), 1e-4

    def run(weights_N: Tensor) -> Any:
        model = make_target("llama", tied=False)
        return metagradient(model, examples, recipe, METRIC, weights_N=weights_N, replay=REPLAY, memory="sqrt")

    ones = torch.ones(COUNT, dtype=torch.float64)
    found = run(ones).example_N
    most = int(found.abs().argmax())
    step = h * torch.eye(COUNT, dtype=torch.float64)[most]
    a, b, c, d = (run(ones + k * step).value for k in (-2, -1, 1, 2))
    assert abs((a - 8 * b + 8 * c - d) / (12 * h) / float(found[most]) - 1) < 1e-6


def test_the_average_is_that_of_torch() -> None:
    model = torch.nn.Linear(3, 2).double()
    kept = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    ours, path = None, []
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        kept.update_parameters(model)
        path.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
        ours = averaged(ours, path[-1], 0.8)
    theirs = torch.nn.utils.parameters_to_vector(kept.module.parameters())
    assert ours is not None and torch.equal(ours, theirs)
    weighted = sum(share * theta for share, theta in zip(shares(0.8, 5), path, strict=True))
    assert relative(torch.as_tensor(weighted), ours) < 1e-14
    assert sum(shares(0.8, 5)) == pytest.approx(1, abs=1e-15) and shares(0.0, 3) == [0.0, 0.0, 1.0]
    assert torch.equal(path[0], averaged(None, path[0], 0.8))


def test_an_effect_without_rewards_is_that_of_the_metagradient() -> None:
    model, recipe = make_target("gpt2", tied=True), replace(RECIPE, ema=0.5)
    start = copy.deepcopy(model.state_dict())
    found = effect(model, make_examples(COUNT), METRIC, InnerSettings(recipe, replay=REPLAY))
    assert found.value == pytest.approx(
        metagradient(model, make_examples(COUNT), recipe, METRIC, replay=REPLAY).value, abs=1e-13
    )
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("own", "share", "more"), [(3, 0.4, 2), (256, 0.25, 85), (1, 0.1, 1), (10, 0.5, 10), (4, 0.9, 36)]
)
def test_how_many_join(own: int, share: float, more: int) -> None:
    assert Replay(OWN, share).count(own) == more


def test_what_replay_cannot_be() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(BadValueError, match="between 0 and 1"):
            Replay(OWN, share)
    with pytest.raises(BadValueError, match="no example"):
        Replay(OWN.rows(0, 0), 0.5)
    examples = make_examples(COUNT)
    soft = TableLabels(torch.ones(*examples.ids_N_S.shape, 32, dtype=torch.float64) / 32)
    with pytest.raises(BadValueError, match="distributions"):
        metagradient(make_target("gpt2", tied=True), replace(examples, soft=soft), RECIPE, METRIC, replay=REPLAY)
    with pytest.raises(ValueError, match="ema"):
        Recipe(ema=1.0)
    with pytest.raises(BadValueError, match="at a checkpoint is not known"):
        metagradient(make_target("gpt2", tied=True), examples, replace(RECIPE, ema=0.5), METRIC, start=Start(1))
