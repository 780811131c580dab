"""The metagradient against finite differences, and the invariances that guard it. Everything in float64 but one test."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn
from torch.func import functional_call

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, metagradient
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import Normalization, TargetRun
from dpg_cli.engine.metagrad import metric_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import DegenerateError

ADAMW = OptimizerSpec("adamw", lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, eps_root=1e-5, weight_decay=0.1)
SMOOTH_ADAMW = OptimizerSpec("adamw", lr=0.05, beta1=0.8, beta2=0.99, eps=1e-2, eps_root=0.0, weight_decay=0.1)
SGD = OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.01)
METRIC = HeldOutLoss(make_examples(4, seed=9))
STEPS = {1: (5, 5), 3: (11, 4), 8: (15, 2)}  # T: (examples, batch); B divides N in none but the first


def phi(
    model: nn.Module, examples: Examples, spec: OptimizerSpec, batch: int, how: Normalization, weights: Tensor
) -> float:
    """Φ after an inner run with these data weights."""
    run = TargetRun(model, ParameterSpace(model), how, examples.ids_N_S.shape[1])
    trace = inner_run(run, run.space.read(model), examples, spec, weights, batch)
    return metric_gradient(run, trace.theta, METRIC)[0]


def finite_differences(
    model: nn.Module, examples: Examples, spec: OptimizerSpec, batch: int, how: Normalization, weights: Tensor, h: float
) -> Tensor:
    """∂Φ/∂w_i by the five-point rule: error h⁴ Φ⁗/30 from the rule, about 1e-16 |Φ| / h from rounding."""
    slopes = torch.zeros_like(weights)
    for i in range(len(weights)):
        step = torch.zeros_like(weights)
        step[i] = h
        a, b, c, d = (phi(model, examples, spec, batch, how, weights + k * step) for k in (-2, -1, 1, 2))
        slopes[i] = (a - 8 * b + 8 * c - d) / (12 * h)
    return slopes


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spec", [ADAMW, SMOOTH_ADAMW, SGD], ids=["adamw", "adamw-eps_root0", "sgd"])
@pytest.mark.parametrize("how", ["token", "example"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_equals_finite_differences(
    architecture: str, tied: bool, how: Normalization, spec: OptimizerSpec, steps: int
) -> None:
    count, batch = STEPS[steps]
    model = make_target(architecture, tied=tied)
    examples = make_examples(count)
    weights = 1 + 0.3 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    result = metagradient(model, examples, spec, METRIC, batch_size=batch, weights_N=weights, normalization=how)
    # With ε_root = 0 the update has kinks of width |g| ~ h at g = 0: the smaller step keeps clear of them.
    numeric = finite_differences(model, examples, spec, batch, how, weights, 2e-6 if spec is SMOOTH_ADAMW else 1e-4)
    assert numeric.norm() > 1e-4
    assert relative(result.example_N, numeric) < 1e-6
    assert relative(result.token_N_S.sum(1), result.example_N) < 1e-12
    assert bool((result.token_N_S[~examples.label_N_S] == 0).all())


def attribution(examples: Examples, **options: object) -> Metagradient:
    settings: dict[str, object] = {"batch_size": 4, "optimizer": ADAMW, "metric": METRIC, **options}
    return metagradient(make_target("gpt2", tied=True), examples, **settings)  # type: ignore[arg-type]


def test_permuting_examples_within_their_batches_permutes_the_result() -> None:
    examples = make_examples(11)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4, 10, 8, 9])
    shuffled = Examples(examples.ids_N_S[order], examples.attention_N_S[order], examples.label_N_S[order])
    plain, moved = attribution(examples), attribution(shuffled)
    assert relative(moved.example_N, plain.example_N[order]) < 1e-11
    assert relative(moved.token_N_S, plain.token_N_S[order]) < 1e-11
    assert not torch.allclose(plain.example_N, plain.example_N[order])


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    examples = make_examples(11)
    plain, split = attribution(examples), attribution(examples, micro_batch=micro_batch)
    assert relative(split.token_N_S, plain.token_N_S) < 1e-11


def test_padding_changes_nothing() -> None:
    examples = make_examples(6)
    wider = Examples(
        nn.functional.pad(examples.ids_N_S, (0, 3), value=5),
        nn.functional.pad(examples.attention_N_S, (0, 3)),
        nn.functional.pad(examples.label_N_S, (0, 3)),
    )
    width = examples.ids_N_S.shape[1]
    assert relative(attribution(wider).token_N_S[:, :width], attribution(examples).token_N_S) < 1e-12


def test_float32_agrees_with_float64() -> None:
    examples = make_examples(11)
    for architecture in ("gpt2", "llama"):
        results = [
            metagradient(make_target(architecture, tied=False, dtype=dtype), examples, ADAMW, METRIC, batch_size=4)
            for dtype in (torch.float32, torch.float64)
        ]
        assert relative(results[0].example_N.double(), results[1].example_N) < 1e-4


def test_label_credits_are_the_credits_of_other_labels() -> None:
    """τ_is(y) of the sampled label is τ_is; of another, what the same position would give had it stood there last."""
    examples = make_examples(6)
    result = attribution(examples, batch_size=6, labels=True)
    assert result.label_N_S_V is not None
    sampled = result.label_N_S_V.gather(-1, examples.ids_N_S[..., None])[..., 0]
    assert relative(sampled, result.token_N_S) < 1e-12

    # By hand: with θ_T and ḡ_0 fixed, τ_is(y) is linear in the label's loss. Take ḡ_0 from finite differences in a
    # replaced last label of row 0: the loss of (prefix, y) has derivative τ_is(y) Z / 1 along the same direction.
    model = make_target("gpt2", tied=True)
    space = ParameterSpace(model)
    run = TargetRun(model, space, "token", examples.ids_N_S.shape[1])
    theta = space.read(model)
    trace = inner_run(run, theta, examples, ADAMW, theta.new_ones(6), 6)
    from dpg_cli.engine.inner.optimizers import State, adjoint

    _, theta_bar = metric_gradient(run, trace.theta, METRIC)
    step = trace.steps[0]
    direction, _ = adjoint(
        ADAMW, State(theta_bar, torch.zeros_like(theta), torch.zeros_like(theta)), step.before, step.grad, 0
    )
    last = int(examples.attention_N_S[0].sum()) - 1

    def losses(at: Tensor) -> Tensor:
        logits = functional_call(model, space.views(at), args=(), kwargs={"input_ids": examples.ids_N_S[:1]}).logits
        return -torch.log_softmax(logits[0, last - 1], -1).detach()

    h = 1e-5 / float(direction.norm())
    slope = (losses(theta + h * direction) - losses(theta - h * direction)) / (2 * h)
    assert relative(result.label_N_S_V[0, last], slope / run.normalizer(examples)) < 1e-6


def test_parameters_with_exactly_zero_gradient_are_finite_and_right() -> None:
    """ε_root = 0: unused positions and token rows have g = 0 throughout, where the root has no derivative."""
    model = make_target("gpt2", tied=False)
    examples = make_examples(6)
    spec = replace(SMOOTH_ADAMW, eps_root=0.0)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    trace = inner_run(run, run.space.read(model), examples, spec, torch.ones(6, dtype=torch.float64), 2)
    assert all(int((step.grad == 0).sum()) > 100 for step in trace.steps)
    result = metagradient(model, examples, spec, METRIC, batch_size=2)
    assert bool(torch.isfinite(result.token_N_S).all())
    numeric = finite_differences(model, examples, spec, 2, "token", torch.ones(6, dtype=torch.float64), 2e-6)
    assert relative(result.example_N, numeric) < 1e-6


def test_progress_counts_both_phases() -> None:
    seen: list[tuple[str, int, int]] = []
    attribution(make_examples(11), progress=lambda *step: seen.append(step))
    assert seen == [(phase, done, 3) for phase in ("forward", "reverse") for done in (1, 2, 3)]


def test_non_finite_metrics_and_runs_are_refused() -> None:
    class Nan(HeldOutLoss):
        def __call__(self, parameters, model):
            return super().__call__(parameters, model) * float("nan")

    class Constant(HeldOutLoss):
        def __call__(self, parameters, model):
            return torch.ones(())

    for metric, cause in ((Nan(METRIC.examples), "one finite scalar"), (Constant(METRIC.examples), "does not depend")):
        with pytest.raises(DegenerateError, match=cause):
            attribution(make_examples(5), metric=metric)
    with pytest.raises(DegenerateError, match="diverged"):
        attribution(make_examples(5), optimizer=OptimizerSpec("sgd", lr=1e300))


def test_the_model_is_left_as_it_was() -> None:
    model = make_target("gpt2", tied=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metagradient(model, make_examples(5), ADAMW, METRIC, batch_size=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
