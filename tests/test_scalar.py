"""The noise of Φ by drawn data, against drawing it; the law with one pixel; and both through runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from short_run import call
from torch import nn

from dpg_cli.driver.build import build
from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine import OptimizerSpec, Recipe
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.inner.optimizers import initial_state, update
from dpg_cli.engine.inner.recipe import Batches
from dpg_cli.engine.loop import outer_step
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.natural.scalar import (
    ScalarProspect,
    above_start,
    dataset_error,
    drawn_error,
    step_of_examples,
)
from dpg_cli.errors import ConfigError, InterruptedRunError
from dpg_cli.evidence.effect import EffectVerdict, Noise, Reading
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

ADAMW = OptimizerSpec("adamw", lr=1e-2, eps=0.5)
NATURAL = [
    "inner.labels=soft", "inner.eps=1.0", "inner.lr=0.1", "prompts.source=empty", "inner.batch_size=100000",
    "credit.discount=0.0", "policy.step=natural",
    "policy.parameters=head", "policy.trust=1e-3", "policy.kl_budget=0.02", "prompts.per_step=48", "rollout.group_size=1",
    "rollout.max_tokens=10", "rollout.min_tokens=1", "steps=3", "dataset.examples=600", "checkpoint.every_steps=1",
]  # fmt: skip


def natural(*more: str) -> Config:
    return resolve(find("l2-shrink.tiny").data(), [*NATURAL, *more])


def gradients(model: nn.Module, examples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Each example's summed gradient, (N, n), and its tokens."""
    rows, parameters = [], list(model.parameters())
    for number in range(len(examples)):
        one = examples.rows(number, number + 1)
        logits = model(input_ids=one.ids_N_S).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), one.ids_N_S[:, 1:].flatten(), reduction="none")
        total = (loss * one.label_N_S[:, 1:].flatten()).sum()
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(total, parameters)]))
    return torch.stack(rows), examples.label_N_S.sum(1).double()


@pytest.mark.parametrize("spec", [ADAMW, OptimizerSpec("sgd", lr=0.02)])
def test_the_error_is_the_spread_over_drawn_datasets(spec: OptimizerSpec) -> None:
    """400 datasets of 300 examples, drawn from a pool of 50 ragged ones: Φ after one step of torch's rules on each."""
    model, pool, metric = (
        make_target("gpt2", tied=False),
        make_examples(50, seed=3),
        HeldOutLoss(make_examples(6, seed=5)),
    )
    result = metagradient(model, pool, spec, metric)
    tokens = pool.label_N_S.sum(1)
    error = drawn_error(result.example_N, tokens, torch.zeros(50, dtype=torch.int64)) * (49 / 300) ** 0.5
    each, count = gradients(model, pool)
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    shapes = {name: p.shape for name, p in model.named_parameters()}
    rng, found = torch.Generator().manual_seed(0), []
    for _ in range(400):
        drawn = torch.bincount(torch.randint(50, (300,), generator=rng), minlength=50).double()
        grad = drawn @ each / (drawn @ count)
        after = update(spec, initial_state(spec, theta), grad, 0, last=True).theta
        parts = after.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        with torch.no_grad():
            found.append(float(metric(named, model)))
    spread = float(torch.tensor(found, dtype=torch.float64).std())
    assert error == pytest.approx(spread, rel=0.1)
    alike = drawn_error(result.example_N, torch.ones(50), torch.zeros(50, dtype=torch.int64)) * (49 / 300) ** 0.5
    assert alike != pytest.approx(error, rel=0.01)  # ragged examples: their lengths count


def test_the_error_holds_for_several_steps() -> None:
    """120 datasets of 60 examples in three steps, against what each one's own credits say."""
    model, pool, metric = (
        make_target("gpt2", tied=False),
        make_examples(80, seed=7),
        HeldOutLoss(make_examples(6, seed=5)),
    )
    recipe = Recipe(ADAMW, batches=Batches(size=20))
    rng, values, errors = torch.Generator().manual_seed(1), [], []
    for number in range(120):
        drawn = pool.take(torch.randint(80, (60,), generator=rng))
        if number % 20 == 0:
            result = metagradient(model, drawn, recipe, metric)
            errors.append(dataset_error(recipe, drawn, result.example_N, 60))
            values.append(result.value)
            assert dataset_error(recipe, drawn, result.example_N, 240) == pytest.approx(errors[-1] / 2)
            assert len(step_of_examples(recipe, drawn).unique()) == 3
        else:
            values.append(effect(model, drawn, metric, InnerSettings(recipe)).value)
    spread = float(torch.tensor(values, dtype=torch.float64).std())
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.15)


def test_two_passes_over_an_example_are_one_credit() -> None:
    twice = Recipe(ADAMW, batches=Batches(size=20, epochs=2.0))
    assert not step_of_examples(twice, make_examples(40)).any()


def test_one_natural_step_reaches_what_the_law_allows() -> None:
    """z after one step, on fresh completions, against sqrt(2 · KL · tokens); in float64, with a hardly damped Fisher and an inner
    step that is linear in the data (ε far above the gradients)."""
    exact = ("models.dtype=float64", "policy.damping=1e-4", "policy.trust=2e-4")
    built = build(natural(*exact, "prompts.per_step=200", "dataset.examples=20000"))
    assert isinstance(built.prospect, ScalarProspect)
    first, second = (outer_step(built.players, built.spec, built.prompts.at(step), step).numbers for step in range(2))
    z = above_start(first, second)["phi_z"]
    tokens = 20_000 * first["completion_tokens"]
    most = math.sqrt(2 * first["policy_kl"] * tokens)
    assert 0.85 * most < z < 1.05 * most
    assert most > 7
    assert first["policy_residual"] < 0.05  # ∂Φ/∂W of the target is nearly the direction
    assert built.prospect.error == pytest.approx(first["phi_error"], rel=0.12)
    assert built.prospect.z == pytest.approx(math.sqrt(2 * 0.02 * tokens), rel=0.05)


def test_drawn_and_soft_labels_measure_the_same_error() -> None:
    found = []
    for labels in ("soft", "drawn"):
        built = build(natural(f"inner.labels={labels}", "prompts.per_step=150"))
        numbers = outer_step(built.players, built.spec, built.prompts.at(0), 0).numbers
        found.append(numbers["phi_error"])
        assert above_start(numbers, numbers) == {"phi_z": 0.0}
    assert found[0] == pytest.approx(found[1], rel=0.1)  # drawn tokens move the target by their own noise, too


def test_a_run_logs_z_and_goes_on_to_the_same_z(tmp_path: Path) -> None:
    whole, cut, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"), StopRequest()
    execute(natural(), whole)
    rows = whole.read_metrics()
    tokens = 6000
    for row, before in zip(rows[1:], rows, strict=False):
        assert 0 < row["phi_z"] < 1.5 * math.sqrt(2 * before["policy_kl"] * tokens)
    assert rows[0]["phi_z"] == 0.0
    assert "z_mean" not in rows[0]

    def ask(report: Any) -> None:
        stop.asked = report.step == 0

    with pytest.raises(InterruptedRunError):
        execute(natural(), cut, stop=stop, on_step=ask)
    execute(cut.read_config(), cut, resume=True)
    assert [row["phi_z"] for row in cut.read_metrics()] == [row["phi_z"] for row in rows]
    page = whole.report.read_text(encoding="utf-8")
    assert "standard errors" in page


def test_the_dry_run_says_what_a_budget_can_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [part for one in NATURAL for part in ("--set", one)]
    answer = call(capsys, monkeypatch, "run", "l2-shrink", *settings, "--dry-run")
    assert answer.code == 0
    assert "at 600 examples 0.02 nats a token raise phi by at most 15 standard errors" in answer.out


@pytest.mark.parametrize(
    ("setting", "cause"),
    [
        ("metric.margin=3.0", "metric.margin: only a pattern has pixels to put beyond their noise"),
        ("stop.predicted=0.9", "stop.predicted: only the pixels of a pattern"),
    ],
)
def test_what_is_for_pixels_is_refused_by_name(setting: str, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause.replace(".", "[.]")):
        natural(setting)


def test_the_law_of_a_scalar() -> None:
    seen = ScalarProspect(100, 3200.0, 0.01, 0.5)
    assert seen.z == pytest.approx(8.0)
    assert seen.nats(8.0) == pytest.approx(0.01)
    assert seen.as_dict()["most"] == pytest.approx(4.0)


def test_a_verdict_counts_in_the_runs_standard_errors() -> None:
    data, control = Reading({"phi": -9.0}, (-9.1, -9.0), 100, 1, 3200), Reading({"phi": -10.0}, (-10.0,), 100, 1, 3200)
    verdict = EffectVerdict("a norm", {"phi": -10.0}, data, control, noise=Noise(0.2, 0.01, 3200))
    assert verdict.percent == pytest.approx(10.0)
    found = verdict.as_dict()["noise"]
    assert (found["standard_errors"], found["most"]) == pytest.approx((5.0, 8.0))
    assert "effect +10 % of phi before; 5.0 standard errors" in verdict.lines()[-1]
    assert "0.62 of the 8.0" in verdict.lines()[-1]
