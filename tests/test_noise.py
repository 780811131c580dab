"""The noise of drawn tokens on the LM head, against drawing; and the pattern metric that counts in it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import VOCAB, make_examples, make_target
from test_natural_run import natural as margin_run
from torch import nn

from dpg_cli.driver.build import build
from dpg_cli.engine import Examples, OptimizerSpec, Recipe
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.inner.recipe import Batches
from dpg_cli.engine.loop import outer_step
from dpg_cli.engine.natural.reach import Reach
from dpg_cli.engine.noise import (
    HearsNoise,
    Nothing,
    PatchNoise,
    head_moments,
    head_optimizers,
    measured_factor,
    patch_noise,
)
from dpg_cli.engine.soft import TableLabels
from dpg_cli.errors import DegenerateError, UsageError
from dpg_cli.metrics.pattern import PatternMetric, predictions
from dpg_cli.patterns.pattern import Pattern

WINDOW = (slice(3, 9), slice(2, 6))
ADAMW = OptimizerSpec("adamw", lr=2e-3, eps=1e-2)
REACH = Reach(*(torch.full((1, size), value, dtype=torch.float64) for size, value in ((4, 1.0), (4, 1.0), (6, 0.1))))


def world(n: int = 40):
    """A target, sequences, and distributions that are near the target's own at each place."""
    model = make_target("gpt2", tied=False)
    examples = make_examples(n, longest=8, seed=1)
    with torch.no_grad():
        logits = model(input_ids=examples.ids_N_S).logits
    rng = torch.Generator().manual_seed(2)
    q = torch.softmax(torch.roll(logits, 1, 1) + 0.3 * torch.randn(logits.shape, dtype=logits.dtype, generator=rng), -1)
    return model, replace(examples, soft=TableLabels(q))


def test_the_noise_is_the_spread_over_drawn_labels() -> None:
    """Gradients of the head by 4,000 draws of all labels, contexts kept: their spread and their mean."""
    model, examples = world()
    moments = head_moments(model, examples, WINDOW)
    assert moments is not None
    assert moments.tokens == int(examples.label_N_S.sum()) > 100
    with torch.no_grad():
        hidden = model.transformer(input_ids=examples.ids_N_S).last_hidden_state
        p = torch.softmax(model.lm_head(hidden), -1)
    places = examples.label_N_S.flatten().nonzero()[:, 0]
    assert isinstance(examples.soft, TableLabels)
    q, h, p = examples.soft.at(places), hidden.flatten(0, 1)[places - 1], p.flatten(0, 1)[places - 1]
    rng = torch.Generator().manual_seed(3)
    draws = torch.multinomial(q, 4000, replacement=True, generator=rng).mT  # (draws, M)
    rows, columns = torch.arange(3, 9), WINDOW[1]
    hits = (draws[:, :, None] == rows).double()
    grads = torch.einsum("mr,mc->rc", p[:, rows], h[:, columns]) - torch.einsum("dmr,mc->drc", hits, h[:, columns])
    grads = grads / len(places)
    error = moments.error(len(places))
    # the labels' share of the variance: what is over comes from the contexts
    labels_only = torch.einsum("mr,mc->rc", q[:, rows] * (1 - q[:, rows]), h[:, columns].square()).sqrt() / len(places)
    assert torch.allclose(grads.std(0), labels_only, rtol=0.06)
    assert bool((error >= 0.98 * labels_only).all())
    tokens = torch.einsum("mr,mc->mrc", p[:, rows] - q[:, rows], h[:, columns])
    contexts = (tokens.square().mean(0) - tokens.mean(0).square()) / len(places)
    assert torch.allclose(error, (labels_only.square() + contexts).sqrt(), rtol=1e-10)
    assert torch.allclose(moments.mean_R_C, tokens.mean(0), rtol=1e-10)


def test_drawn_tokens_stand_for_distributions_that_are_not_known() -> None:
    model, examples = world(400)
    known = head_moments(model, examples, WINDOW, most=10**6)
    drawn = head_moments(model, replace(examples, soft=None), WINDOW, most=10**6)
    one_hot = TableLabels(torch.nn.functional.one_hot(examples.ids_N_S, VOCAB).double())
    same = head_moments(model, replace(examples, soft=one_hot), WINDOW, most=10**6)
    assert known is not None
    assert drawn is not None
    assert same is not None
    assert torch.allclose(drawn.square_R_C, same.square_R_C, rtol=1e-12)
    assert not torch.allclose(drawn.square_R_C, known.square_R_C, rtol=0.05)
    some = head_moments(model, examples, WINDOW, most=500)
    assert some is not None
    assert 400 < some.tokens <= 500
    assert torch.allclose(some.square_R_C, known.square_R_C, rtol=0.5)


@pytest.mark.parametrize("spec", [ADAMW, OptimizerSpec("adamw", lr=2e-3, eps=1e-8), OptimizerSpec("sgd", lr=0.3)])
def test_the_weights_noise_keeps_the_gradients_z(spec: OptimizerSpec) -> None:
    """ΔW / its error = -g / σ, whatever the optimiser does to g."""
    model, examples = world()
    moments = head_moments(model, examples, WINDOW)
    assert moments is not None
    noise = patch_noise(moments, [spec], 5000, 10).error_R_C
    grad = moments.mean_R_C
    moved = -0.3 * grad if spec.name == "sgd" else -spec.lr * grad / (grad.abs() + spec.eps)
    assert torch.allclose(moved / noise, -grad / moments.error(5000), rtol=1e-9)
    nothing = replace(moments, mean_R_C=torch.zeros_like(grad))
    slope = {"sgd": 0.3, "adamw": spec.lr / spec.eps}[spec.name]
    if spec.eps != 1e-8:
        assert torch.allclose(patch_noise(nothing, [spec], 5000, 10).error_R_C, slope * nothing.error(5000), rtol=1e-6)


def make_metric(margin: float, sharpness: float = 2.0) -> PatternMetric:
    signs = np.where(np.random.default_rng(0).random((6, 4)) < 0.5, -1.0, 1.0)
    model = make_target("gpt2", tied=False)
    return PatternMetric(model, Pattern(signs, "bitmap", None, "a test"), sharpness, (3, 2), margin)  # type: ignore[arg-type]


def test_a_margin_is_counted_in_standard_errors() -> None:
    metric = make_metric(3.0)
    assert isinstance(metric, HearsNoise)
    parameters = {name: value.detach().clone() for name, value in make_target("gpt2", tied=False).named_parameters()}
    assert float(metric(parameters, nn.Module())) == pytest.approx(-math.log1p(math.exp(6.0)))
    assert "z_mean" not in metric.measures(parameters, nn.Module())
    noise = torch.full((6, 4), 0.01, dtype=torch.float64)
    noise[0, 0] = 0.02
    parameters[metric.head][3:9, 2:6] += 0.05 * metric.signs
    with pytest.raises(UsageError, match="standard errors"):
        metric(parameters, nn.Module())
    metric.hear(PatchNoise(noise, noise, REACH, 4096))
    by_hand = -(23 * math.log1p(math.exp(2 * (3 - 5))) + math.log1p(math.exp(2 * (3 - 2.5)))) / 24
    assert float(metric(parameters, nn.Module())) == pytest.approx(by_hand, rel=1e-9)
    found = metric.measures(parameters, nn.Module())
    assert found["z_least"] == pytest.approx(2.5)
    assert found["z_mean"] == pytest.approx((23 * 5 + 2.5) / 24)
    assert found["sharpness_times_change"] == pytest.approx(10.0)
    plain = make_metric(0.0)
    plain.hear(PatchNoise(noise, noise, REACH, 4096))
    assert float(plain(parameters, nn.Module())) == pytest.approx(-math.log1p(math.exp(-2 * 0.05)))


def test_predictions_are_those_of_the_normal_distribution() -> None:
    found = predictions(torch.full((21, 21), 2.0, dtype=torch.float64), 1000)
    assert found["predicted_accuracy"] == pytest.approx(0.977250, abs=1e-6)
    assert found["examples_needed"] == pytest.approx(1000 * (3.719016 / 2.0) ** 2, abs=1)  # ndtr(3.719016) = 0.9999
    wrong = torch.full((21, 21), 2.0, dtype=torch.float64)
    wrong[0, 0] = -1.0
    found = predictions(wrong, 1000)
    assert "examples_needed" not in found  # more examples make a wrong pixel surer, not right
    assert found["predicted_accuracy"] == pytest.approx((440 * 0.977250 + 0.158655) / 441, abs=1e-6)
    assert found["z_least"] == -1.0


def test_predictions_from_drawn_tokens_know_their_own_noise() -> None:
    """True z of 1 at the dataset's size; measured on a quarter of its examples, so with a standard deviation of 2."""
    rng = torch.Generator().manual_seed(0)
    measured = 1.0 + 2.0 * torch.randn(400_000, dtype=torch.float64, generator=rng)
    flat_prior = predictions(measured, 1000, excess=4.0)["predicted_accuracy"]
    truly, naive = 0.841345, predictions(measured, 1000)["predicted_accuracy"]
    # with z known so badly the expected share is nearer one half, never nearer one
    assert 0.5 < flat_prior < naive < truly
    assert flat_prior == pytest.approx(
        float(torch.special.ndtr(torch.tensor(1 / 3.0))), abs=0.002
    )  # 1 / sqrt(1 + 4 + 4)


def window_change(model: nn.Module, examples: Examples, recipe: Recipe) -> torch.Tensor:
    """Of the head's window, by an inner run."""
    final = effect(model, examples, Nothing(), InnerSettings(recipe)).final["lm_head.weight"]
    return final[WINDOW] - model.get_parameter("lm_head.weight").detach()[WINDOW]


@pytest.mark.parametrize(
    ("spec", "lowest"),
    [
        (OptimizerSpec("adamw", lr=3e-2, beta1=0.9, beta2=0.95, eps=0.3), 1.05),
        (OptimizerSpec("sgd", lr=0.2, momentum=0.8), 1.05),
    ],
)
def test_the_noise_of_several_steps_is_the_spread_over_drawn_runs(spec: OptimizerSpec, lowest: float) -> None:
    """90 inner runs of four steps on 160 examples that were drawn from a pool, against what one of them is told."""
    model, pool = make_target("gpt2", tied=False), make_examples(400, longest=8, seed=1)
    recipe, rng = Recipe(spec, batches=Batches(size=40)), torch.Generator().manual_seed(2)
    changes, factors, errors = [], [], []
    metric = make_metric(3.0)
    metric.window, metric.head = WINDOW, "lm_head.weight"
    for number in range(90):
        drawn = pool.take(torch.randint(400, (160,), generator=rng))
        changes.append(window_change(model, drawn, recipe))
        if number % 9 == 0:
            moments = head_moments(model, drawn, WINDOW)
            assert moments is not None
            factors.append(measured_factor(model, drawn, metric, InnerSettings(recipe), moments))
            tokens = int(drawn.label_N_S.sum())
            errors.append(
                patch_noise(moments, head_optimizers(model, recipe, 4), tokens, 160, 1.0, factors[-1]).error_R_C
            )
    spread = torch.stack(changes).std(0)
    error = torch.stack(errors).mean(0)
    assert float((error.square().mean() / spread.square().mean()).sqrt()) == pytest.approx(1.0, abs=0.15)
    assert float((error / spread).log().abs().median()) < 0.15  # and pixel by pixel
    assert float(error.max() / error.min()) > 1.5
    assert 0.8 < sum(factors) / len(factors) < 1.25
    assert float(patch_noise(moments, head_optimizers(model, recipe, 4), 100, 1).error_R_C.mean()) >= lowest * float(
        (patch_noise(moments, head_optimizers(model, recipe, 4), 100, 1).slope_R_C * moments.error(100)).mean()
    )


def test_equal_steps_are_one_of_their_whole_rate() -> None:
    model, examples = world()
    moments, spec = head_moments(model, examples, WINDOW), OptimizerSpec("sgd", lr=0.3)
    assert moments is not None
    once = patch_noise(moments, [replace(spec, lr=4 * spec.lr)], 500, 10).error_R_C
    assert torch.allclose(patch_noise(moments, [spec] * 4, 500, 10).error_R_C, once, rtol=1e-9)
    uneven = [replace(spec, lr=rate) for rate in (0.9, 0.1, 0.1, 0.1)]  # sqrt(4 · 0.84) / 1.2 times as noisy
    assert torch.allclose(patch_noise(moments, uneven, 500, 10).error_R_C, once * 0.84**0.5 / 0.6, rtol=1e-9)


def test_runs_that_the_formula_does_not_explain_have_no_noise() -> None:
    model, pool = make_target("gpt2", tied=False), make_examples(100, longest=8, seed=1)
    recipe = Recipe(OptimizerSpec("sgd", lr=0.1), batches=Batches(size=25))
    moments, metric = head_moments(model, pool, WINDOW), make_metric(3.0)
    assert moments is not None
    metric.window, metric.head = WINDOW, "lm_head.weight"
    other = replace(moments, square_R_C=100 * moments.square_R_C)
    assert 0.5 < measured_factor(model, pool, metric, InnerSettings(recipe), moments) < 2
    with pytest.raises(DegenerateError, match="standard errors of the patch are not known"):
        measured_factor(model, pool, metric, InnerSettings(recipe), other)


def test_a_margin_over_several_inner_steps() -> None:
    """The noise of a run whose inner run has two steps: about that of one step of twice the rate on the same completions."""
    found = []
    for batch, rate in (("100000", "2e-3"), ("32", "1e-3")):
        built = build(margin_run(f"inner.batch_size={batch}", f"inner.lr={rate}", "inner.beta1=0.0"))
        assert (built.prospect is None) == (batch == "32")
        numbers = outer_step(built.players, built.spec, built.prompts.at(0), 0).numbers
        assert numbers["z_mean"] == pytest.approx(0, abs=0.2)
        found.append(built.players.metric.heard.error_R_C)  # type: ignore[attr-defined]
    assert float((found[1] / found[0]).mean()) == pytest.approx(1, abs=0.5)
    assert not torch.equal(*found)
