"""Controls of the metagradient: several inner runs, SGD, and the naive reward, in float64 against their definitions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from test_credit import gradient, rollout_of, tiny_generator
from torch import Tensor
from torch.func import functional_call
from zoo.tiny import tiny_model

from dpg_cli.driver.trial import RandomDirection
from dpg_cli.engine import OptimizerSpec, metagradient, reference_metagradient
from dpg_cli.engine.attribution import (
    METHODS,
    AttributionSpec,
    InnerSettings,
    at_first_token,
    attribute_examples,
    effect,
    split,
    take,
)
from dpg_cli.engine.generator.credit import assign
from dpg_cli.engine.generator.policy import PolicySpec, completion_logits, policy_loss
from dpg_cli.errors import DegenerateError

ADAMW = OptimizerSpec("adamw", lr=0.01, beta1=0.9, beta2=0.95, eps=1e-4, weight_decay=0.1)
METRIC = HeldOutLoss(make_examples(4, seed=9))
INNER = InnerSettings(ADAMW, batch_size=3)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def test_splits_hold_every_row_once() -> None:
    assert [rows.tolist() for rows in split(12, 3, 1, True)] == [list(range(12))]
    assert [rows.tolist() for rows in split(12, 3, 3, False)] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert [rows.tolist() for rows in split(12, 3, 2, True)] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert [rows.tolist() for rows in split(12, 3, 6, False)] == [[0, 3], [6, 9], [1, 4], [7, 10], [2, 5], [8, 11]]
    for wrong in ((12, 3, 4, False), (12, 3, 15, False), (12, 3, 5, True)):
        with pytest.raises(ValueError, match="inner runs cannot"):
            split(*wrong)


@pytest.mark.parametrize("how", ["token", "example"])
def test_without_cross_group_it_is_g_separate_metagradients(how: str) -> None:
    """Group size 3, four prompts: the g-th completions of all groups have a run of their own, of two inner steps."""
    model, examples = make_target("gpt2", tied=True), make_examples(12)
    inner = replace(INNER, normalization=how)
    spec = AttributionSpec(runs=3, cross_group=False)
    result = attribute_examples(model, examples, METRIC, spec, inner, group_size=3, labels=True)
    for g in range(3):
        rows = torch.arange(g, 12, 3)
        alone = metagradient(
            model, take(examples, rows), ADAMW, METRIC, batch_size=3, normalization=how, labels=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert torch.equal(result.token_N_S[rows], alone.token_N_S)
        assert torch.equal(result.example_N[rows], alone.example_N)
        assert torch.equal(result.label_N_S_V[rows], alone.label_N_S_V)  # type: ignore[index]
    shared = metagradient(model, examples, ADAMW, METRIC, batch_size=3, normalization=how)  # type: ignore[arg-type]
    assert relative(result.example_N, shared.example_N) > 0.1  # or else the split would not show
    assert result.value == shared.value  # whatever the method, Φ is of one run on all
    assert result.measures == shared.measures


@pytest.mark.parametrize("lr", [0.3, 0.0])
def test_sgd_attribution_equals_the_reference_of_the_sgd_run(lr: float) -> None:
    model, examples = make_target("llama", tied=False), make_examples(7)
    result = attribute_examples(model, examples, METRIC, AttributionSpec("sgd", sgd_lr=lr), INNER, group_size=1)
    sgd = OptimizerSpec("sgd", lr=result.stats["sgd_lr"])
    if lr:
        assert sgd.lr == lr
    else:  # as long a first step as AdamW's
        first = {
            name: metagradient(model, take(examples, torch.arange(3)), spec, METRIC).final
            for name, spec in (("sgd", sgd), ("adamw", ADAMW))
        }
        before = dict(model.named_parameters())
        lengths = {
            name: torch.cat([(value - before[key]).flatten() for key, value in final.items()]).norm().detach()
            for name, final in first.items()
        }
        assert float(lengths["sgd"]) == pytest.approx(float(lengths["adamw"]), rel=1e-9)

    slow = reference_metagradient(model, examples, sgd, METRIC, batch_size=3)
    assert float(slow.example_N.norm()) > 1e-4
    assert relative(result.token_N_S, slow.token_N_S) < 1e-9
    assert result.value == effect(model, examples, METRIC, INNER).value  # Φ is AdamW's
    assert result.value != result.stats["phi_runs_mean"]


def test_naive_gives_every_example_the_metric_of_its_run() -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(12)
    spec = AttributionSpec("naive", runs=3, cross_group=False)
    result = attribute_examples(model, examples, METRIC, spec, INNER, group_size=3)
    values = [effect(model, take(examples, torch.arange(g, 12, 3)), METRIC, INNER).value for g in range(3)]
    assert result.example_N.tolist() == values * 4
    assert len(set(values)) == 3
    assert result.value == effect(model, examples, METRIC, INNER).value
    assert result.stats["phi_runs_mean"] == pytest.approx(sum(values) / 3, rel=1e-12)


def test_naive_policy_gradient_is_reinforce_with_the_metric() -> None:
    """Two prompts, two completions each, naive attribution without cross_group: two inner runs of two examples.

    Enumerating all outcomes, weighted by their probability, the expected policy gradient must be a multiple of
    ∂E[Φ]/∂(generator), where Φ is the metric of a real inner run on the pair of completions.
    """
    generator, target = tiny_generator(), make_target("gpt2", tied=True)
    alone = [(token,) for token in range(4)]  # completions of one token; prompts are alike
    pairs = list(itertools.product(range(4), repeat=2))
    inner = InnerSettings(replace(ADAMW, lr=0.05), batch_size=0)
    metric = HeldOutLoss(make_examples(4, seed=9))

    def examples_of(tokens: tuple[int, ...]):
        from dpg_cli.engine import Examples

        return Examples.from_sequences([[3, token] for token in tokens])

    phi = {pair: effect(target, examples_of(pair), metric, inner).value for pair in pairs}
    single = rollout_of(alone, generator, 1)
    log_pi = torch.log_softmax(completion_logits(generator, single)[:, 0], -1)[0]
    expected = sum(phi[a, b] * (log_pi[a] + log_pi[b]).exp() for a, b in pairs)
    truth = gradient(generator, expected)

    estimate = torch.zeros_like(truth)
    spec = AttributionSpec("naive", runs=2, cross_group=False)
    for outcome in itertools.product(range(4), repeat=4):  # rows: prompt 0, prompt 0, prompt 1, prompt 1
        rollout = rollout_of([(token,) for token in outcome], generator, 2)
        reward_N = torch.tensor([phi[outcome[0], outcome[2]], phi[outcome[1], outcome[3]]] * 2, dtype=torch.float64)
        if sum(outcome) % 5 == 4:  # every fifth by the engine; all of them would take a minute
            ours = attribute_examples(target, examples_of(outcome), metric, spec, inner, group_size=2)
            assert ours.example_N.tolist() == pytest.approx(reward_N.tolist(), rel=1e-12)
            reward_N = ours.example_N
        token_N_K = at_first_token(reward_N, rollout.mask_N_K)
        credit = assign("sequence", token_N_K, None, rollout.mask_N_K, 2, normalize=False, across=spec.across)
        loss, _ = policy_loss(completion_logits(generator, rollout), rollout, credit, PolicySpec())
        probability = float(rollout.logprobs_N_K.sum().exp())
        estimate -= probability * gradient(generator, loss)
    assert float(truth.norm()) > 1e-6
    assert float(torch.cosine_similarity(estimate, truth, dim=0)) > 1 - 1e-10


def test_batch_comparison_normalises_over_the_batch() -> None:
    rewards = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 5.0], dtype=torch.float64)
    mask = torch.ones(6, 3, dtype=torch.bool)
    credit = assign("sequence", at_first_token(rewards, mask), None, mask, 2, across="batch")
    by_hand = (rewards - rewards.mean()) / rewards.std() * (6 / 5)
    torch.testing.assert_close(credit.advantage_N_K, by_hand[:, None].expand(6, 3))
    # All alike within groups: compared within groups there is nothing, across the batch there is.
    alike = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    mask = torch.ones(4, 1, dtype=torch.bool)
    assert float(assign("sequence", at_first_token(alike, mask), None, mask, 2).advantage_N_K.abs().max()) == 0
    assert assign("sequence", at_first_token(alike, mask), None, mask, 2, across="batch").advantage_N_K[0, 0] < 0


def test_rewards_of_texts_pass_through_and_must_be_finite() -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(4)
    rewards = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    spec = AttributionSpec("text")
    result = attribute_examples(model, examples, METRIC, spec, INNER, group_size=2, text_reward_N=rewards)
    assert torch.equal(result.example_N, rewards)
    assert result.value == metagradient(model, examples, ADAMW, METRIC, batch_size=3).value
    with pytest.raises(DegenerateError, match="not finite"):
        attribute_examples(model, examples, METRIC, spec, INNER, group_size=2, text_reward_N=rewards.log() * 0 / 0)


def test_effect_is_the_metagradients_forward_half() -> None:
    model, examples = make_target("llama", tied=True), make_examples(7)
    ours, full = effect(model, examples, METRIC, INNER), metagradient(model, examples, ADAMW, METRIC, batch_size=3)
    assert ours.value == full.value
    assert all(torch.equal(ours.final[name], full.final[name]) for name in full.final)
    assert ours.gradient_median == full.gradient_median
    weights = dict(ours.final)
    logits = functional_call(model, weights, (), {"input_ids": METRIC.examples.ids_N_S}).logits
    assert bool(torch.isfinite(logits).all())
    with pytest.raises(DegenerateError, match="not finite"):
        effect(model, examples, METRIC, InnerSettings(OptimizerSpec("sgd", lr=1e300), 3))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_says_what_was_chosen_for_the_target(method: str) -> None:
    """Bloom has no forward derivative: the self-check's choice is said for controls too, once."""
    result = attribute_examples(
        tiny_model("bloom"), make_examples(4), RandomDirection(), AttributionSpec(method, sgd_lr=0.1), INNER, group_size=1,
        text_reward_N=torch.arange(4.0),
    )  # fmt: skip
    assert len(result.notes) == 1
    assert "double backward" in result.notes[0]
