"""What the completions of an outer step are worth: the metagradient, and the paper's controls, through one function.

    metagradient   τ through the inner run as configured
    sgd            τ through an SGD inner run; Φ and its measures stay those of the configured optimiser
    naive          every example of an inner run gets that run's Φ; compared across the batch, not within groups
    text           a reward of the text alone (edit distance, language identification, ...), given from outside

The completions are attributed in R inner runs: one that they all share, or several, of which each may hold at most one
completion of a prompt. Whatever the method, Φ and its measures are those of one run on all of them by the configured
optimiser, so that controls can be compared. Source: paper, ablations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dpg_cli.engine.arguments import accepted
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.prepare import opened
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.recipe import Plan, Recipe, Replay
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.tape import FirstTape, Memory
from dpg_cli.engine.inner.target import Normalization, TargetRun
from dpg_cli.engine.metagrad import metagradient, refuse_divergence
from dpg_cli.engine.phi import metric_measures, metric_value
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient
from dpg_cli.engine.reverse.choice import SecondOrder, check_model, chosen
from dpg_cli.engine.soft import LabelFactors, LabelSink
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric

METHODS = ("metagradient", "sgd", "naive", "text")


@dataclass(frozen=True)
class AttributionSpec:
    """How completions are attributed.

    Attributes:
        method: one of `METHODS`.
        runs: R, inner runs that share the completions.
        cross_group: completions of one prompt may share an inner run; if not, R is a multiple of G.
        sgd_lr: learning rate of the SGD run; 0 makes its first step as long as the configured optimiser's.
    """

    method: str = "metagradient"
    runs: int = 1
    cross_group: bool = True
    sgd_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown attribution method {self.method!r}; there are {', '.join(METHODS)}")

    @property
    def per_example(self) -> bool:
        """An example has one value, not one for each token."""
        return self.method in ("naive", "text")

    @property
    def across(self) -> str:
        """What a reward is compared with: its "group", or the whole "batch"."""
        return "batch" if self.method == "naive" else "group"


@dataclass(frozen=True)
class InnerSettings:
    """The inner run that every attribution shares: its recipe, or an optimiser alone; B, the loss's normaliser and the
    precision where they are not the recipe's; rows in memory at once, states kept, the processes that share the work, own data that
    joins every step, and how second derivatives are taken."""

    optimizer: OptimizerSpec | Recipe
    batch_size: int | None = None
    normalization: Normalization | None = None
    micro_batch: int = 0
    memory: Memory = "keep"
    precision: Precision | None = None
    ranks: Ranks = ALONE
    packing: bool = False
    share_prefixes: bool = True
    replay: Replay | None = None
    second_order: SecondOrder = "exact"

    @property
    def recipe(self) -> Recipe:
        """The whole recipe."""
        return Recipe.of(self.optimizer, self.batch_size, self.normalization, self.precision)

    def laid_out(self, examples: Examples) -> tuple[Examples, Plan]:
        """The examples, those of replay behind them, and the plan of all."""
        plan = self.recipe.plan(examples)
        return (examples, plan) if self.replay is None else self.replay.joined(examples, plan)

    def target_run(self, model: nn.Module, length: int) -> TargetRun:
        """The target as the passes see it, for examples of this length; within the recipe's `prepared`."""
        recipe = self.recipe
        return TargetRun(
            model,
            recipe.space(model),
            recipe.normalization,
            length,
            self.micro_batch,
            precision=recipe.precision,
            ranks=self.ranks,
        )


def split(count: int, group_size: int, runs: int, cross_group: bool) -> list[Tensor]:
    """Rows of each inner run; every row is in exactly one.

    Args:
        count: N rows, group by group.
        group_size: G.
        runs: R. With `cross_group` each run takes whole groups; else the g-th completions of groups, so that R must be a
            multiple of G.
        cross_group: see `AttributionSpec`.

    Raises:
        ValueError: if the runs cannot be filled so.
    """
    if runs == 1 and (cross_group or group_size == 1):
        return [torch.arange(count)]
    rows_P_G = torch.arange(count).unflatten(0, (-1, group_size))
    groups = len(rows_P_G)
    if cross_group:
        if runs > groups:
            raise ValueError(f"{runs} inner runs cannot be filled with {groups} groups")
        return [part.flatten() for part in rows_P_G.tensor_split(runs)]
    if runs % group_size or runs // group_size > groups:
        raise ValueError(f"{runs} inner runs cannot hold {groups} groups of {group_size}, one of each")
    return [part for column in rows_P_G.T for part in column.tensor_split(runs // group_size)]


def take(examples: Examples, rows: Tensor) -> Examples:
    """The examples of an index, at the width of the whole batch (the `example` normaliser counts it)."""
    return examples.take(rows)


@torch.no_grad()
def effect(model: nn.Module, examples: Examples, metric: TargetMetric, inner: InnerSettings) -> Metagradient:
    """Fine-tune and read the metric, without any attribution: τ is zero.

    `stats` has `sgd_lr_matched`, the learning rate with which SGD's first step would be as long.

    Raises:
        DegenerateError: if the run or Φ is not finite.
    """
    given = accepted(opened(model), examples, inner.optimizer).aligned()
    aligned, plan = inner.laid_out(given)
    way, said = chosen(
        inner.second_order,
        inner.recipe,
        model,
        aligned,
        micro_batch=inner.micro_batch,
        batch=len(aligned),
        ranks=inner.ranks,
    )
    with inner.recipe.prepared(model, as_it_runs=way != "exact") as (target, notes):
        run = inner.target_run(target, aligned.ids_N_S.shape[1])
        if way != "exact":
            run = replace(run, second_order=way)
        finding = check_model(run, aligned, need_hvp=False)
        run = finding.apply(run)
        theta = run.space.read(target)
        with torch.enable_grad():
            trace = inner_run(
                run, theta, aligned, inner.recipe, theta.new_ones(len(aligned)), plan=plan, tape=FirstTape()
            )
        if not torch.isfinite(trace.theta).all():
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(run, trace.theta)
        value = metric_value(run, trace.theta, metric)
        first = trace.steps[0].grad
        second = trace.steps[1].before.theta if len(trace.steps) > 1 else trace.theta
        length = float(first.norm())
        return Metagradient(
            value=value,
            measures=metric_measures(run, trace.theta, metric),
            example_N=theta.new_zeros(len(examples)),
            token_N_S=theta.new_zeros(examples.ids_N_S.shape),
            label_N_S_V=None,
            final=run.space.final(target, trace.theta),
            gradient_median=trace.gradient_median,
            stats={"sgd_lr_matched": float((second - theta).norm()) / length if length > 0 else 0.0},
            notes=(*notes, *finding.notes, *([said] if said else [])),
        )


def attribute_examples(
    model: nn.Module,
    examples: Examples,
    metric: TargetMetric,
    spec: AttributionSpec,
    inner: InnerSettings,
    *,
    group_size: int,
    labels: bool | Literal["factors"] = False,
    text_reward_N: Tensor | None = None,
    sink: LabelSink | None = None,
) -> Metagradient:
    """Reward N examples by the method of `spec`.

    Args:
        model: the target θ_0; left unchanged.
        examples: N sequences, group by group.
        metric: Φ.
        spec: method and inner runs.
        inner: settings of the inner runs; B applies within each.
        group_size: G.
        labels: also the credit of every label, or its "factors"; only where tokens have values.
        text_reward_N: the rewards of method "text".
        sink: is given the credits of labels, where the examples have distributions and tokens have values.

    Returns:
        Φ, measures and θ_T of one run on all examples by the configured optimiser, and the rewards: of tokens for
        metagradients; for the other methods `example_N` alone, with zero tokens.

    Raises:
        DegenerateError: if anything becomes non-finite.
    """
    if spec.method == "metagradient" and spec.runs == 1:
        return _metagradient(model, examples, metric, inner, labels, sink)
    whole = effect(model, examples, metric, inner)
    if spec.method == "text":
        if text_reward_N is None:
            raise ValueError("method 'text' needs the rewards of the texts")
        if not torch.isfinite(text_reward_N).all():
            raise DegenerateError(
                "The reward of a text is not finite.", "Correct the reward, or choose another method."
            )
        return replace(whole, example_N=text_reward_N.to(whole.example_N), stats={})

    parts = split(len(examples), group_size, spec.runs, spec.cross_group)
    if spec.method == "naive":
        results = [effect(model, take(examples, rows), metric, inner) for rows in parts]
        reward_N = torch.empty_like(whole.example_N)
        for rows, result in zip(parts, results, strict=True):
            reward_N[rows] = result.value
        return replace(whole, example_N=reward_N, stats=_spread(results), notes=_notes(whole, results))

    if spec.method == "sgd":
        lr = spec.sgd_lr or whole.stats["sgd_lr_matched"]
        if not lr > 0:
            raise DegenerateError("The inner run has no gradient, so SGD has no matching learning rate.", "")
        inner = replace(inner, optimizer=replace(inner.recipe, optimizer=OptimizerSpec("sgd", lr=lr)))
    results = [_metagradient(model, take(examples, rows), metric, inner, labels, sink) for rows in parts]
    stats = {**results[0].stats, **_spread(results)} | ({"sgd_lr": lr} if spec.method == "sgd" else {})
    return replace(
        whole,
        example_N=_gather(parts, [result.example_N for result in results]),
        token_N_S=_gather(parts, [result.token_N_S for result in results]),
        label_N_S_V=_gather(parts, [result.label_N_S_V for result in results if result.label_N_S_V is not None])
        if all(result.label_N_S_V is not None for result in results)
        else None,
        factors=LabelFactors.merged(parts, [result.factors for result in results if result.factors is not None])
        if all(result.factors is not None for result in results)
        else None,
        stats=stats,
        notes=_notes(whole, results),
    )


def _metagradient(
    model: nn.Module,
    examples: Examples,
    metric: TargetMetric,
    inner: InnerSettings,
    labels: bool | Literal["factors"],
    sink: LabelSink | None,
) -> Metagradient:
    """The metagradient of one inner run."""
    return metagradient(
        model,
        examples,
        inner.recipe,
        metric,
        micro_batch=inner.micro_batch,
        labels=labels,
        memory=inner.memory,
        packing=inner.packing,
        share_prefixes=inner.share_prefixes,
        second_order=inner.second_order,
        ranks=inner.ranks,
        sink=sink,
        replay=inner.replay,
    )


def _spread(results: list[Metagradient]) -> dict[str, float]:
    """Mean and standard deviation of Φ over the runs that rewards were taken from."""
    values = torch.tensor([result.value for result in results], dtype=torch.float64)
    return {"phi_runs_mean": float(values.mean()), "phi_runs_std": float(values.std(correction=0))}


def _notes(whole: Metagradient, results: list[Metagradient]) -> tuple[str, ...]:
    """What was chosen in any of the runs, each once."""
    return tuple(dict.fromkeys(note for result in (whole, *results) for note in result.notes))


def _gather(parts: list[Tensor], values: list[Tensor]) -> Tensor:
    """Rows of the parts, back in the order of the whole."""
    order = torch.cat(parts).to(values[0].device)
    return torch.empty_like(torch.cat(values)).index_copy_(0, order, torch.cat(values))


def at_first_token(reward_N: Tensor, mask_N_K: Tensor) -> Tensor:
    """A reward for each example as rewards of its tokens, for credit that only sums them: all on the first."""
    token_N_K = reward_N.new_zeros(mask_N_K.shape)
    token_N_K[:, 0] = reward_N
    return token_N_K
