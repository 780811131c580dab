"""The Dataset Policy Gradient algorithm on one screen (`outer_step`), and the loop around it.

How it departs from ordinary RL with verifiable rewards: the reward of a completion is no property of its text, but the
exact derivative of Φ(θ_T) by the weight of that completion in a fine-tuning run on the whole batch. The target and its
optimiser start afresh at every outer step; only the generator learns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dpg_cli.engine.align import read_completions
from dpg_cli.engine.credit import assign
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.optim import OptimizerSpec
from dpg_cli.engine.policy import PolicySpec, policy_step
from dpg_cli.engine.records import Metagradient, Rollout
from dpg_cli.engine.rollout import Sampling, sample
from dpg_cli.engine.target import Normalization
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models import LanguageModel


@dataclass(frozen=True)
class LoopSpec:
    """The fixed choices of a run.

    Attributes:
        steps: outer steps.
        sampling: of the rollouts.
        optimizer: the inner optimiser.
        inner_batch: B; T = ceil(N / B).
        normalization: of the inner loss.
        micro_batch: rows in memory at once.
        credit: "sequence", "token" or "expected".
        discount: γ of future rewards in token and expected credit; 1 is exact.
        policy: of the policy step.
        lr: peak learning rate of the generator; warm-up steps and the share of steps of the final decay shape it.
        max_length: examples are cut and padded to so many target tokens; 0 leaves them as they come.
    """

    steps: int
    sampling: Sampling
    optimizer: OptimizerSpec
    inner_batch: int
    normalization: Normalization
    micro_batch: int
    credit: str
    discount: float
    policy: PolicySpec
    lr: float
    lr_warmup: int = 0
    lr_decay: float = 0.0
    max_length: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of an outer step: linear warm-up, constant, linear decay to (almost) zero."""
        rise = min(1.0, (step + 1) / self.lr_warmup) if self.lr_warmup else 1.0
        span = self.lr_decay * self.steps
        fall = min(1.0, (self.steps - step) / (span + 1)) if span else 1.0
        return self.lr * rise * fall


@dataclass
class Players:
    """What changes during a run and what it acts upon. Only `generator`, `policy_optimizer` and the RNGs change."""

    generator: LanguageModel
    target: LanguageModel
    metric: TargetMetric
    policy_optimizer: torch.optim.Optimizer
    rng: torch.Generator
    order_rng: torch.Generator
    reference: nn.Module | None = None


@dataclass(frozen=True)
class StepReport:
    """What one outer step did: the line of `metrics.jsonl`, and what a display needs.

    Attributes:
        step: outer step, from 0.
        numbers: every logged figure by name.
        result: the metagradient.
        rollout: the completions.
    """

    step: int
    numbers: dict[str, float]
    result: Metagradient = field(repr=False)
    rollout: Rollout = field(repr=False)


def attribute(players: Players, spec: LoopSpec, rollout: Rollout) -> tuple[Metagradient, Tensor, Tensor | None]:
    """Inner run and metagradient on a rollout: the result, and τ aligned with the generator's tokens."""
    reading = read_completions(rollout, players.generator, players.target, spec.max_length)
    result = metagradient(
        players.target.model,
        reading.examples,
        spec.optimizer,
        players.metric,
        batch_size=spec.inner_batch,
        normalization=spec.normalization,
        micro_batch=spec.micro_batch,
        labels=spec.credit == "expected",
    )
    return result, *reading.to_completions(result)


def outer_step(players: Players, spec: LoopSpec, prompts: list[str], step: int) -> StepReport:
    """One outer step of DPG: rollout -> inner run -> metagradient -> credit -> policy step.

    Raises:
        DegenerateError: if anything becomes non-finite, or the reward is all zero.
    """
    clock = [time.perf_counter()]
    generator = players.generator
    rollout = sample(generator.model, generator.tokenizer, prompts, spec.sampling, players.rng)
    clock.append(time.perf_counter())

    result, token_N_K, label_N_K_V = attribute(players, spec, rollout)
    refuse_dead_reward(result)
    credit = assign(spec.credit, token_N_K, label_N_K_V, rollout.mask_N_K, rollout.group_size, discount=spec.discount)
    clock.append(time.perf_counter())

    for group in players.policy_optimizer.param_groups:
        group["lr"] = spec.lr_at(step)
    policy = policy_step(
        generator.model, players.policy_optimizer, rollout, credit, spec.policy, players.order_rng, players.reference
    )
    clock.append(time.perf_counter())

    tokens = int(rollout.mask_N_K.sum())
    numbers = {
        "step": step,
        "phi": result.value,
        **result.measures,
        **credit.stats,
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
    return StepReport(step, numbers, result, rollout)


def refuse_nonfinite(numbers: dict[str, float]) -> None:
    """Stop where the policy step or a figure of it overflowed: what was learnt then is lost.

    Raises:
        DegenerateError: naming the figure.
    """
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise DegenerateError(f"The training diverged: {name} is {value}.", "Lower policy.lr or inner.lr.")


def refuse_dead_reward(result: Metagradient) -> None:
    """Stop where the reward says nothing, instead of training on zeros.

    Raises:
        DegenerateError: naming the cause: no gradient reached the data, or it underflowed.
    """
    if bool((result.token_N_S != 0).any()):
        return
    if result.gradient_median == 0:
        raise DegenerateError(
            "Every reward is zero: the inner run has no gradient, because the completions hold no trained token.",
            "Raise rollout.max_tokens, or look at the completions.",
        )
    raise DegenerateError(
        f"Every reward is zero although the inner run's gradients are not (median {result.gradient_median:.1e}): "
        "the metric does not react to these weights, or the optimiser acts as sign(g).",
        "Raise inner.eps or inner.eps_root towards the gradients' size, or check that the metric reads trained weights.",
    )


def train(
    players: Players,
    spec: LoopSpec,
    prompts_at: Callable[[int], list[str]],
    on_step: Callable[[StepReport], None],
    start: int = 0,
) -> None:
    """Run the outer steps `start` … `spec.steps` - 1.

    Args:
        players: models, metric, optimiser and RNGs; changed in place.
        spec: settings.
        prompts_at: the P prompts of an outer step.
        on_step: called after each outer step; what it raises ends the run.
        start: first outer step.
    """
    for step in range(start, spec.steps):
        on_step(outer_step(players, spec, prompts_at(step), step))
