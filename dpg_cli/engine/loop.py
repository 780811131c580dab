"""The Dataset Policy Gradient algorithm on one screen (`outer_step`), and the loop around it.

How it departs from ordinary RL with verifiable rewards: the reward of a completion is no property of its text, but the
exact derivative of Φ(θ_T) by the weight of that completion in a fine-tuning run on the whole batch. The target and its
optimiser start afresh at every outer step; only the generator learns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dpg_cli.engine.attribution import AttributionSpec, InnerSettings, at_first_token, attribute_examples
from dpg_cli.engine.detect import Watch, metric_before, refuse_dead_reward, refuse_nonfinite, weights_changed
from dpg_cli.engine.generator.align import completion_texts, read_completions
from dpg_cli.engine.generator.contexts import contexts, standard_head
from dpg_cli.engine.generator.credit import assign, form_of_labels
from dpg_cli.engine.generator.policy import PolicySpec, policy_step
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.inner.recipe import Recipe, Replay
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.natural.head_policy import DrawnCredit, LabelGradient, Sinks, add_advantages
from dpg_cli.engine.natural.scalar import ERROR, above_start, dataset_error
from dpg_cli.engine.natural.step import NaturalPolicy, aimed_share
from dpg_cli.engine.noise import (
    Aimed,
    HearsNoise,
    head_moments,
    head_optimizers,
    measured_factor,
    patch_noise,
    tilt_of,
)
from dpg_cli.engine.phi import parameter_gradient
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Credit, Examples, Metagradient, Rollout
from dpg_cli.engine.reverse.choice import SecondOrder
from dpg_cli.engine.soft import HeadLabels, LabelFactors
from dpg_cli.engine.whole.policy import WholePolicy
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models.loading import LanguageModel


@dataclass(frozen=True)
class LoopSpec:
    """The fixed choices of a run.

    Attributes:
        steps: outer steps.
        sampling: of the rollouts.
        recipe: of the inner run.
        micro_batch: rows in memory at once.
        credit: "sequence", "token" or "expected".
        discount: γ of future rewards in token and expected credit; 1 is exact.
        policy: of the policy step.
        packing: ragged examples share rows, see `packing.py`.
        share_prefixes: what examples begin with in common is computed once, see `prefixes.py`.
        second_order: how second derivatives are taken, see `reverse/choice.py`.
        states: which states of the inner run are kept, see `tape.py`.
        lr: peak learning rate of the generator; warm-up steps and the share of steps of the final decay shape it.
        kl_decay: share of the steps, at the end, over which the KL coefficient falls to (almost) zero.
        max_length: examples are cut and padded to so many target tokens; 0 leaves them as they come.
        attribution: metagradient, or a control.
        labels: what the inner run trains on: the "drawn" tokens, or the expectation over labels, "soft".
        dataset: examples of the final dataset, whose noise a metric may ask about.
        predicted: a predicted accuracy at which the run ends; 0 for never.
        replay: own data that joins every inner step.
    """

    steps: int
    sampling: Sampling
    recipe: Recipe
    micro_batch: int
    credit: str
    discount: float
    policy: PolicySpec
    lr: float
    lr_warmup: int = 0
    lr_decay: float = 0.0
    kl_decay: float = 0.0
    states: Memory = "keep"
    packing: bool = False
    share_prefixes: bool = True
    second_order: SecondOrder = "exact"
    max_length: int = 0
    attribution: AttributionSpec = field(default_factory=AttributionSpec)
    labels: str = "drawn"
    dataset: int = 0
    predicted: float = 0.0
    replay: Replay | None = None

    @property
    def inner(self) -> InnerSettings:
        """The inner run, in one process."""
        return InnerSettings(
            self.recipe,
            micro_batch=self.micro_batch,
            memory=self.states,
            packing=self.packing,
            share_prefixes=self.share_prefixes,
            replay=self.replay,
            second_order=self.second_order,
        )

    def rescaled(self, before: int, after: int) -> LoopSpec:
        """The same for `after` completions in place of `before`: as many inner steps, on larger or smaller batches."""
        batches = self.recipe.batches.rescaled(before, after)
        return replace(self, recipe=replace(self.recipe, batches=batches))

    def reached(self, numbers: Mapping[str, float]) -> bool:
        """Whether the prediction of an outer step is good enough to end the run."""
        return bool(self.predicted) and numbers.get("predicted_accuracy", 0.0) >= self.predicted

    def measures_noise(self, metric: TargetMetric) -> bool:
        """Whether the credits of drawn tokens tell the noise of Φ at the size of the final dataset."""
        exact = self.attribution.method == "metagradient" and self.attribution.runs == 1
        exact &= self.replay is None  # whose credits count in the normaliser's part and are not kept
        return bool(self.dataset) and exact and not isinstance(metric, HearsNoise)

    def lr_at(self, step: int) -> float:
        """Learning rate of an outer step: linear warm-up, constant, linear decay to (almost) zero."""
        rise = min(1.0, (step + 1) / self.lr_warmup) if self.lr_warmup else 1.0
        return self.lr * rise * self._fall(step, self.lr_decay)

    def policy_at(self, step: int) -> PolicySpec:
        """Settings of the policy step of an outer step."""
        return replace(self.policy, kl=self.policy.kl * self._fall(step, self.kl_decay))

    def _fall(self, step: int, share: float) -> float:
        """From 1 linearly to (almost) 0 over the last `share` of the steps."""
        span = share * self.steps
        return min(1.0, (self.steps - step) / (span + 1)) if span else 1.0


@dataclass
class Players:
    """What changes during a run and what it acts upon. Only `generator`, its policy and the RNGs change.

    The policy is an optimiser of the generator's parameters, or `natural` steps.

    `text_reward` gives the rewards of texts, (N,), where the attribution's method is "text". `redraw` gives the target
    the weights of an outer step, where each step has a blank target of its own; a pure function of the step. `ranks` are
    the processes that share the work: each has players of its own, which stay equal.
    """

    generator: LanguageModel
    target: LanguageModel
    metric: TargetMetric
    policy_optimizer: torch.optim.Optimizer | None
    rng: torch.Generator
    order_rng: torch.Generator
    reference: nn.Module | None = None
    text_reward: Callable[[list[str]], Tensor] | None = None
    redraw: Callable[[int], None] | None = None
    ranks: Ranks = ALONE
    natural: NaturalPolicy | WholePolicy | None = None

    @property
    def policy(self) -> torch.optim.Optimizer:
        """The optimiser, where there is one."""
        if self.policy_optimizer is None:
            raise ValueError("a generator under natural steps has no optimiser")
        return self.policy_optimizer


@dataclass(frozen=True)
class StepReport:
    """What one outer step did: the line of `metrics.jsonl`, and what a display needs.

    Attributes:
        step: outer step, from 0.
        numbers: every logged figure by name.
        result: the metagradient.
        rollout: the completions.
        warning: what the user should know about it, or nothing.
        last: its prediction ends the run; the generator is as it was measured.
    """

    step: int
    numbers: dict[str, float]
    result: Metagradient = field(repr=False)
    rollout: Rollout = field(repr=False)
    warning: str = ""
    last: bool = False


def labels_of(players: Players, spec: LoopSpec, rollout: Rollout) -> HeadLabels:
    """The distributions that a rollout was drawn from."""
    model = players.generator.model
    head = standard_head(model, players.generator.name)
    policy = spec.policy
    return contexts(model, head, rollout, spec.sampling, policy.micro_batch, players.ranks, policy.share)


def attribute(
    players: Players,
    spec: LoopSpec,
    rollout: Rollout,
    labels: HeadLabels | None = None,
    sink: LabelGradient | None = None,
) -> tuple[Metagradient, Tensor, Tensor | LabelFactors | None]:
    """Inner run and rewards of a rollout.

    Args:
        labels: the distributions that it was drawn from, where they are known; made where they are needed.
        sink: takes the credits of labels, which are then not returned; needs `labels`.

    Returns:
        The result, with the standard error of Φ in its `stats` where the metric is a scalar (`natural/scalar.py`); τ aligned
        with the generator's tokens, of the token that was drawn unless credit is "expected" (where the labels' credits hold
        what that token was worth); and τ of every label, in factors where it is large, or None.
    """
    reading = read_completions(rollout, players.generator, players.target, spec.max_length)
    examples, drawn, noisy = reading.examples, None, spec.measures_noise(players.metric)
    if labels is None and spec.labels == "soft":
        labels = labels_of(players, spec, rollout)
    if labels is not None:
        soft = replace(labels, offset=reading.offset, width=examples.ids_N_S.shape[1])
        examples = replace(examples, soft=soft, drawn=spec.labels == "drawn")
        if spec.labels == "soft" and (noisy or spec.credit != "expected"):
            drawn = DrawnCredit(labels.weight.new_zeros(rollout.ids_N_K.shape))
    tell_noise(players, spec, examples)
    asked: bool | Literal["factors"] = False
    if spec.credit == "expected" and sink is None:
        size, width = players.target.head.shape
        asked = form_of_labels(examples.ids_N_S.numel(), size, width, len(spec.recipe.plan(examples)))
    result = attribute_examples(
        players.target.model,
        examples,
        Aimed(players.metric) if sink is not None and getattr(players.metric, "aims", False) else players.metric,
        spec.attribution,
        replace(spec.inner, ranks=players.ranks),
        group_size=rollout.group_size,
        labels=asked,
        text_reward_N=text_rewards(players, rollout) if spec.attribution.method == "text" else None,
        sink=Sinks((drawn, sink)) if drawn is not None and sink is not None else sink or drawn,
    )
    if noisy:
        credit_N = result.example_N if drawn is None else players.ranks.sum_(drawn.token_N_K.sum(1))
        error = dataset_error(spec.recipe, examples, credit_N, spec.dataset)
        result = replace(result, stats={**result.stats, ERROR: error})
    if spec.attribution.per_example:
        return result, at_first_token(result.example_N, rollout.mask_N_K), None
    token_N_K, label_N_K_V = reading.to_completions(result)
    if drawn is None or spec.credit == "expected":
        return result, token_N_K, label_N_K_V
    return result, players.ranks.sum_(drawn.token_N_K), label_N_K_V


def tell_noise(players: Players, spec: LoopSpec, examples: Examples) -> None:
    """Tell a metric that asks for it the noise of what it reads, at the size of the final dataset."""
    metric, recipe, model = players.metric, spec.recipe, players.target.model
    if not spec.dataset or not isinstance(metric, HearsNoise) or spec.replay is not None:
        return
    steps = len(recipe.plan(examples))
    if steps > 1 and not (getattr(metric, "margin", 0) or spec.predicted):
        return  # over several steps it takes inner runs of its own: only where something rests upon it
    if steps > 1 and recipe.ema:  # the noise is of the last weights
        return
    optimizers = head_optimizers(model, recipe, steps)
    moments = head_moments(model, examples, metric.window) if optimizers else None
    if moments is not None:
        tokens = spec.dataset * int(examples.label_N_S.sum()) / len(examples)
        drawn = examples.soft is None or examples.drawn
        excess = spec.dataset / len(examples) if drawn else 0.0
        inner, factor = replace(spec.inner, ranks=players.ranks), 1.0
        if steps > 1:
            # never below the formula: small runs whose noise is beyond ε saturate, and differ by too little
            factor = max(1.0, measured_factor(model, examples, metric, inner, moments))
        metric.hear(patch_noise(moments, optimizers, tokens, spec.dataset, excess, factor))


def text_rewards(players: Players, rollout: Rollout) -> Tensor:
    """The rewards of the completions' texts, (N,)."""
    if players.text_reward is None:
        raise ValueError("attribution by text needs a text_reward")
    lengths = rollout.mask_N_K.sum(1).tolist()
    rows = [row[:length] for row, length in zip(rollout.ids_N_K.tolist(), lengths, strict=True)]
    return players.text_reward(completion_texts(players.generator.tokenizer, rows))


def hint(players: Players, result: Metagradient, like_V_D: Tensor) -> Tensor | None:
    """A change of the generator's head whose multiple is near the natural step's: ∂Φ/∂W of the target's, of the same shape.

    Exact where the hidden states are the same, one inner step is linear in the data, and Φ reads the head alone.
    """
    head = find_head(players.target.model)
    if head is None or head.layer.weight.shape != players.generator.head.shape or head.weight not in result.final:
        return None
    found = parameter_gradient(players.target.model, result.final, head.weight, players.metric)
    if found is None or not bool(found.any()):
        return None
    start = torch.zeros_like(like_V_D)
    start[:, : found.shape[1]] = found
    return start


def new_gradient(natural: NaturalPolicy | WholePolicy, labels: HeadLabels, places: Tensor) -> LabelGradient:
    """A gradient of nothing yet, by what the policy moves."""
    return LabelGradient.like(labels, places, backbone=isinstance(natural, WholePolicy))


def improve(
    players: Players,
    spec: LoopSpec,
    step: int,
    rollout: Rollout,
    credit: Credit,
    labels: HeadLabels | None,
    sink: LabelGradient | None,
    result: Metagradient,
) -> dict[str, float]:
    """The policy step of an outer step, and its figures."""
    if players.natural is not None and labels is not None:
        places = players.natural.places(rollout.mask_N_K)
        gradient = new_gradient(players.natural, labels, places) if sink is None else sink
        add_advantages(gradient, labels, rollout, credit, players.ranks)
        gradient.scale(int(rollout.mask_N_K.sum()) / len(places))  # of all tokens, from those that were looked at
        gradient.sum_over(players.ranks)
        metric, start, share = players.metric, None, 0.0
        if isinstance(metric, HearsNoise) and metric.heard is not None:
            share = aimed_share(step, metric.heard.reach.one_model) if metric.aims else 0.0
            if not isinstance(players.natural, WholePolicy):
                start = tilt_of(metric, result.final, metric.heard, gradient.total)
        elif not isinstance(players.natural, WholePolicy):
            start = hint(players, result, gradient.total)
        if isinstance(players.natural, WholePolicy):
            rng, ranks = players.order_rng, players.ranks
            return players.natural.step(labels, rollout, gradient, result.value, rng, share=share, ranks=ranks)
        return players.natural.step(labels, places, gradient.total, result.value, start=start, share=share)
    for group in players.policy.param_groups:
        group["lr"] = spec.lr_at(step)
    return policy_step(
        players.generator.model, players.policy, rollout, credit, spec.policy_at(step), players.order_rng,
        players.reference, players.ranks,
    )  # fmt: skip


def outer_step(players: Players, spec: LoopSpec, prompts: list[str], step: int) -> StepReport:
    """One outer step of DPG: rollout -> inner run -> metagradient -> credit -> policy step.

    Raises:
        DegenerateError: if anything becomes non-finite, or the reward is all zero.
    """
    clock = [time.perf_counter()]
    generator = players.generator
    rollout = sample(generator.model, generator.tokenizer, prompts, spec.sampling, players.rng, ranks=players.ranks)
    clock.append(time.perf_counter())

    natural, sink = players.natural, None
    labels = labels_of(players, spec, rollout) if natural is not None or spec.labels == "soft" else None
    if natural is not None and labels is not None and spec.credit == "expected":
        sink = new_gradient(natural, labels, natural.places(rollout.mask_N_K))
    result, token_N_K, label_N_K_V = attribute(players, spec, rollout, labels, sink)
    refuse_dead_reward(result, spec.attribution.per_example or spec.labels == "soft")
    credit = assign(
        spec.credit, token_N_K, label_N_K_V, rollout.mask_N_K, rollout.group_size,
        discount=spec.discount, across=spec.attribution.across, normalize=natural is None, elsewhere=sink is not None,
    )  # fmt: skip
    clock.append(time.perf_counter())

    last = spec.reached(result.measures)  # then the generator stays as it was measured
    policy = {"grad_norm": 0.0} if last else improve(players, spec, step, rollout, credit, labels, sink, result)
    clock.append(time.perf_counter())

    tokens = int(rollout.mask_N_K.sum())
    numbers = {
        "step": step,
        "phi": result.value,
        **result.measures,
        **result.stats,
        **credit.stats,
        "same_completions": rollout.same_completions,
        "gradient_median": result.gradient_median,
        "entropy": rollout.entropy,
        **{f"policy_{name}": value for name, value in policy.items()},
        "lr": spec.lr_at(step),
        "examples": len(rollout),
        "tokens": tokens,
        "completion_tokens": tokens / len(rollout),
        "seconds": clock[3] - clock[0],
        "seconds_rollout": clock[1] - clock[0],
        "seconds_metagradient": clock[2] - clock[1],
        "seconds_policy": clock[3] - clock[2],
    }
    refuse_nonfinite(numbers)
    return StepReport(step, numbers, result, rollout, last=last)


def train(
    players: Players,
    spec: LoopSpec,
    prompts_at: Callable[[int], list[str]],
    on_step: Callable[[StepReport], None],
    start: int = 0,
    history: Iterable[Mapping[str, float]] = (),
) -> None:
    """Run the outer steps `start` … `spec.steps` - 1, or until a prediction holds.

    Args:
        players: models, metric, optimiser and RNGs; changed in place.
        spec: settings.
        prompts_at: the P prompts of an outer step.
        on_step: called after each outer step; what it raises ends the run.
        start: first outer step.
        history: figures of the outer steps before `start`, for the watch.

    Raises:
        DegenerateError: if the reward or the metric is dead (`detect.Watch`); the step has been reported by then.
    """
    parameter = next(players.target.model.parameters())
    watch = Watch(
        start=metric_before(players.metric, players.target.model),
        dtype=parameter.dtype,
        optimizer=spec.recipe.optimizer,
        labels=spec.credit == "expected",
        across=spec.attribution.across,
        soft=spec.labels == "soft",
    )
    known = list(history)
    watch.replay(known)
    for step in range(start, spec.steps) if not known or not spec.reached(known[-1]) else ():
        if players.redraw is not None:
            players.redraw(step)
        report = outer_step(players, spec, prompts_at(step), step)
        if spec.labels == "soft":
            known = known or [report.numbers]
            report = replace(report, numbers=report.numbers | above_start(known[0], report.numbers))
        report = replace(report, numbers=players.ranks.agreed(report.numbers))
        warning, fault = watch.see(report.numbers, partial(weights_changed, report.result.final, players.target.model))
        on_step(replace(report, warning=warning))
        if fault is not None:
            raise fault
        if report.last:
            break
        del report  # with the target's last weights, before the next inner run makes its own
    if players.redraw is not None:
        players.redraw(0)
