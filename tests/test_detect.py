"""The watch over a run's figures, and the measures that it and `dpg check` share."""

from __future__ import annotations

import math

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from hypothesis import given
from hypothesis import strategies as st

from dpg_cli.engine import OptimizerSpec, detect, metagradient
from dpg_cli.engine.detect import (
    PATIENCE,
    Watch,
    metric_before,
    observed,
    refuse_dead_reward,
    regime,
    rounding,
    weights_changed,
)
from dpg_cli.engine.inner.optimizers import elasticity, initial_state, update
from dpg_cli.errors import DegenerateError

SPEC = OptimizerSpec("adamw", lr=1e-3, eps=1e-3)
ROW = {
    "step": 0, "phi": -0.9, "reward_std": 1.0, "reward_mean": 0.1, "dead_groups": 0.0, "same_completions": 0.0,
    "policy_grad_norm": 1.0, "entropy": 2.0, "gradient_median": 1e-4, "sign_share": 0.0,
}  # fmt: skip
DEAD = {"dead_groups": 1.0}


def watch(**settings: object) -> Watch:
    return Watch(start=-1.0, dtype=torch.float32, optimizer=SPEC, **settings)  # type: ignore[arg-type]


def follow(watching: Watch, rows: list[dict]) -> tuple[list[str], DegenerateError | None, int]:
    """Warnings, the error if one came, and after how many rows."""
    warnings = []
    for number, row in enumerate(rows):
        warning, fault = watching.see({**ROW, "step": number, **row})
        warnings += [warning] if warning else []
        if fault is not None:
            return warnings, fault, number + 1
    return warnings, None, len(rows)


@given(st.floats(1e-9, 1e3), st.floats(1e-12, 1e2), st.floats(0, 1e2), st.sampled_from([1.0, -1.0]))
def test_elasticity_is_the_log_slope_of_the_first_update(size: float, eps: float, root: float, sign: float) -> None:
    spec = OptimizerSpec("adamw", lr=1.0, eps=eps, eps_root=root)
    h = 1e-4
    grads = sign * size * torch.tensor([math.exp(-h), 1.0, math.exp(h)], dtype=torch.float64)
    u = update(spec, initial_state(spec, torch.zeros(3, dtype=torch.float64)), grads, 0).theta.abs()
    slope = float((u[2].log() - u[0].log()) / (2 * h))
    assert float(elasticity(spec, grads)[1]) == pytest.approx(slope, abs=1e-6)


def test_elasticity_does_not_cancel_and_regime_counts() -> None:
    grad = torch.tensor([1e-3, 1e-3, 1e-7, 5.0, 0.0])
    assert elasticity(OptimizerSpec(eps=1e-12), grad)[0] == pytest.approx(1e-9, rel=1e-3)  # ε / (|g| + ε)
    read = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    assert observed(grad, read).tolist() == pytest.approx([1e-3, 1e-3, 1e-7])
    numbers = regime(OptimizerSpec(eps=1e-5), grad, read)
    assert numbers["sign_share"] == pytest.approx(2 / 3)  # ε/(g+ε) = 0.0099, 0.0099, 0.99
    assert numbers["elasticity"] == pytest.approx(1e-5 / (1e-3 + 1e-5))
    assert regime(OptimizerSpec("sgd"), grad, read) == {"sign_share": 0.0, "elasticity": 1.0}


def test_a_healthy_run_says_nothing() -> None:
    assert follow(watch(), [{"phi": -0.9 + 0.01 * step} for step in range(20)]) == ([], None, 20)


def test_a_dead_reward_is_refused_after_patience_and_passing_ones_are_not() -> None:
    _, fault, after = follow(watch(), [DEAD] * 20)
    assert after == PATIENCE
    assert "The reward is dead" in str(fault)
    assert "rollout.temperature" in str(fault)
    assert fault is not None
    assert fault.exit_code == 3
    transient = ([DEAD] * (PATIENCE - 1) + [{}]) * 5
    assert follow(watch(), transient)[1] is None
    assert follow(watch(), [{"same_completions": 1.0}] * 20)[2] == PATIENCE
    assert follow(watch(), [{"policy_grad_norm": 0.0}] * 20)[2] == PATIENCE


def test_expected_credit_lives_on_labels_and_naive_on_the_batch() -> None:
    assert follow(watch(labels=True), [DEAD] * 20)[1] is None
    assert follow(watch(labels=True), [{**DEAD, "entropy": 1e-5}] * 20)[2] == PATIENCE
    assert follow(watch(across="batch"), [DEAD] * 20)[1] is None
    alike = {"reward_std": 1e-8, "reward_mean": -0.9}  # below the rounding of Φ
    assert follow(watch(across="batch"), [alike] * 20)[2] == PATIENCE


def test_a_generator_that_converged_is_told_once_and_goes_on() -> None:
    rising = [{"phi": -0.9 + 0.1 * step} for step in range(6)]
    warnings, fault, _ = follow(watch(), rising + [{**DEAD, "phi": -0.3}] * 20)
    assert fault is None
    assert len(warnings) == 1
    assert "converged" in warnings[0]
    _, fault, _ = follow(
        watch(), rising + [{**DEAD, "phi": -0.95}] * 20
    )  # alike, and worse than at the start: collapse
    assert "The reward is dead" in str(fault)


def test_a_resumed_run_remembers_its_earlier_rows() -> None:
    rising = [{**ROW, "phi": -0.9 + 0.1 * step} for step in range(6)]
    watching = watch()
    watching.replay(rising)
    assert follow(watching, [{**DEAD, "phi": -0.3}] * 20)[1] is None
    watching = watch()
    watching.replay([{**ROW, **DEAD}] * 3 + [{}, {"phi": "x"}, {**ROW, "entropy": None}])  # those say nothing
    assert follow(watching, [DEAD] * 20)[2] == PATIENCE - 3


@pytest.mark.parametrize("name", ["phi", "reward_std", "policy_grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_stop_at_once(name: str, value: float) -> None:
    _, fault, after = follow(watch(), [{}, {name: value}])
    assert after == 2
    assert f"{name} is not finite at outer step 1" in str(fault)


def test_nothing_moved() -> None:
    still = {"phi": -1.0 + 1e-7}  # within four units of float32
    assert rounding(-1.0, torch.float32) == pytest.approx(4 * 2**-23)
    _, fault, after = follow(watch(), [still] * 20)
    assert after == PATIENCE
    assert "Nothing moved" in str(fault)
    assert "inner.lr" in str(fault)
    _, fault = watch().see({**ROW, **still}, lambda: 0.0)  # no weight changed: certain at once
    assert "left the target's weights" in str(fault)
    assert follow(watch(), [*[still] * (PATIENCE - 1), {}] * 5)[1] is None


def test_sign_regime_warns_at_the_first_step_only() -> None:
    warnings, fault, _ = follow(watch(), [{"sign_share": 0.9}] * 3)
    assert fault is None
    assert len(warnings) == 1
    assert "sign(g) on 90%" in warnings[0]
    assert "inner.eps" in warnings[0]


def test_measures_on_a_real_inner_run() -> None:
    model, metric = make_target("gpt2", tied=True), HeldOutLoss(make_examples(4, seed=9))
    examples = make_examples(5)
    parameters = dict(model.named_parameters())
    assert metric_before(metric, model) == pytest.approx(float(metric(parameters, model).detach()), rel=1e-12)
    moved = metagradient(model, examples, SPEC, metric)
    assert weights_changed(moved.final, model) > 0.5
    assert (
        moved.stats["sign_share"] < 0.5 < regime(OptimizerSpec(eps=1e-12), torch.ones(3), torch.ones(3))["sign_share"]
    )
    frozen = metagradient(model, examples, OptimizerSpec(lr=1e-30, eps=1e-3), metric)
    assert weights_changed(frozen.final, model) == 0
    assert frozen.value == metric_before(metric, model)


def test_zero_rewards_are_refused_unless_rewards_are_of_examples() -> None:
    model, metric = make_target("gpt2", tied=True), HeldOutLoss(make_examples(4, seed=9))
    result = metagradient(model, make_examples(5), SPEC, metric)
    refuse_dead_reward(result)
    from dataclasses import replace

    zero = replace(result, token_N_S=torch.zeros_like(result.token_N_S))
    with pytest.raises(DegenerateError, match="Every reward is zero"):
        refuse_dead_reward(zero)
    refuse_dead_reward(zero, per_example=True)


@pytest.mark.parametrize("read", [3, 5000])
def test_a_sample_of_many_coordinates_finds_the_few(monkeypatch: pytest.MonkeyPatch, read: int) -> None:
    """A metric that reads three coordinates of many has them all; one that reads all has a regular sample."""
    monkeypatch.setattr(detect, "SAMPLE", 100)
    grad, theta_bar = torch.arange(1.0, 5001), torch.zeros(5000)
    theta_bar[torch.arange(read) * (5000 // read)] = 1.0
    found = observed(grad, theta_bar)
    if read == 3:
        assert found.tolist() == [1, 1667, 3333]
    else:
        assert 100 <= len(found) <= 400
        assert float(found.median()) == pytest.approx(2500, rel=0.05)
