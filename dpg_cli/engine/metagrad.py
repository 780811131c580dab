"""The exact metagradient: ∂Φ(θ_T)/∂w_i through every optimiser step of an ordinary fine-tuning run.

    forward   L_t = Σ_{i in batch t} w_i Σ_s mask_is ℓ_is(θ_t) / Z_t,   g_t = ∇L_t,   (θ, m, v)_{t+1} = U(g_t, (θ, m, v)_t)
    reverse   (θ̄, m̄, v̄)_{t+1}  --adjoint of U-->  ḡ_t and direct parts of (θ̄, m̄, v̄)_t
              τ_is = mask_is <ḡ_t, ∇ℓ_is(θ_t)> / Z_t,        θ̄_t += ∇_θ <ḡ_t, ∇L_t(θ_t)>   (not at t = 0)

Source: paper §3 for the reward, DESIGN §2 for the reverse pass. No graph spans two inner steps: memory is the states
that the tape keeps (`tape.py`) plus one micro-batch. Adjoints are written over the states that they replace.

Processes that share a run (`ranks.py`) take rows of each batch: g_t and the Hessian-vector product are summed over them in
`target.py`, credits once at the end of `reverse`; all else is computed by each, from these sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dpg_cli.engine.arguments import accepted
from dpg_cli.engine.inner.attention.served import note
from dpg_cli.engine.inner.journal import Course, Journal
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.prefixes import alike
from dpg_cli.engine.inner.prepare import opened, uncompiled
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.recipe import Plan, Recipe, Replay
from dpg_cli.engine.inner.run import SAMPLE, Progress, all_finite, inner_run
from dpg_cli.engine.inner.start import Start
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.inner.target import Normalization, TargetRun, can_pack, can_share, shareable
from dpg_cli.engine.phi import metric_gradient, metric_measures, metric_value
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient, Metagradients, Visits
from dpg_cli.engine.reverse.choice import SecondOrder, check_model, chosen, remedy
from dpg_cli.engine.reverse.walk import reverse, turning_point
from dpg_cli.engine.soft import LabelFactors, LabelSink
from dpg_cli.errors import BadValueError, DegenerateError, UsageError
from dpg_cli.metrics.base import TargetMetric, as_metric

RUNAWAY = 1e3  # fine-tuning moves weights by far less than their own size
MOST_LABELS = 1 << 31  # credits of labels, where they have no factors: 8 GB in float32


def metagradient(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metric: TargetMetric | Callable[..., Tensor],
    *,
    batch_size: int | None = None,
    weights_N: Tensor | None = None,
    normalization: Normalization | None = None,
    micro_batch: int = 0,
    labels: bool | Literal["factors"] = False,
    visits: bool = False,
    plan: Plan | None = None,
    memory: Memory = "keep",
    precision: Precision | None = None,
    packing: bool = False,
    share_prefixes: bool = True,
    second_order: SecondOrder = "exact",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    sink: LabelSink | None = None,
    start: Start | None = None,
    journal: Journal | None = None,
    replay: Replay | None = None,
) -> Metagradient:
    """Fine-tune a copy of `model` on `examples` and attribute the metric to each example and token.

    Args:
        model: a Hugging Face causal LM; θ_0. It is left unchanged, dropout is off. Parameters with `requires_grad` are
            trained, so that LoRA and frozen layers work as they are. Compiled and data-parallel wrappers are opened.
        examples: N token sequences.
        optimizer: the recipe of the inner run; an optimiser alone uses each example once, in order, at a constant rate.
        metric: Φ, larger is better: a `TargetMetric`, or a plain function of (parameters, model) or of (model).
        batch_size: B, instead of the recipe's; 0 takes all examples in one step (T = 1), and so does an optimiser alone.
        weights_N: data weights w, all 1 when None.
        normalization: Z_t, see `TargetRun`; instead of the recipe's.
        micro_batch: rows in memory at once; changes nothing beyond rounding. 0: see `TargetRun`.
        labels: also return the credit of every label, (N, S, V) numbers; or "factors", from which those of some tokens are made
            anew (`soft.LabelFactors`). A target without a standard LM head has no factors, and gives the numbers.
        visits: also return the credit of each visit of an example.
        plan: the examples of each step, instead of the recipe's batches.
        memory: "keep" all T states, "sqrt" recomputes them from √T checkpoints, "offload" puts them on disk (from an
            accelerator: into host memory). Changes time and memory, and the result by rounding alone.
        precision: instead of the recipe's; "bf16" rounds the operands of the linear maps, see `product.py`; `stats` then has
            `precision_error`, the relative error of the token credits at the first and the last inner step, the larger.
        packing: ragged examples of a step share rows, which saves their padding; changes nothing beyond rounding.
        share_prefixes: what examples of a step begin with in common, up to their first label, is computed once where that is
            cheaper and the target reads it so; changes nothing beyond rounding. Of the exact second order, without distributions.
        second_order: "exact", or by "difference"s of ordinary passes ("one-sided": half as many, about ten times the error), with
            the model as it runs: compiled, any attention kernel, any autograd function, checkpoints; `stats` then has
            `difference_error`, the estimated relative error of the token credits. "auto" is exact where the model and the memory
            allow it. See `reverse/choice.py`.
        progress: called as progress(phase, done, total) with phase "forward" or "reverse" after each inner step.
        ranks: the processes that share the work. All call this with the same arguments and get the same result.
        replay: own data that joins every step and gets no credit (`recipe/replay.py`).
        sink: is given the credit of every label chunk by chunk, where the examples have distributions (`soft`).
        start: the run goes on from there: `model` has the weights of that step, and the plan is that of the whole run.
        journal: keeps progress, so that the same call goes on where an earlier process was stopped; with `memory` "sqrt" or
            "offload", and neither `labels` nor `sink`.

    Returns:
        Φ, its measures, τ for each example and token (in the places that `examples` has them), and θ_T. `notes` says what
        was chosen for this model: float32 masters, another implementation of its experts, the double backward.

    Raises:
        DegenerateError: if anything becomes non-finite, or differences would be more than 5 % off.
        UsageError: if the recipe does not fit the model or the number of examples; for a model that no number here would be
            right for (`inner/prepare.py`, `reverse/selfcheck.py`, `reverse/differences/uncut.py`); for differences in bf16.
        BadValueError, BadTypeError: for arguments that cannot be meant; they are also ValueError and TypeError.

    Example:
        >>> result = metagradient(model, Examples.from_sequences(ids), OptimizerSpec(lr=1e-4), metric, batch_size=32)
        >>> most_helpful = result.example_N.argsort(descending=True)
    """
    if journal is not None and (labels or sink is not None):
        raise BadValueError("A journal keeps no credits of labels.", "Leave labels and sink out, or the journal.")
    found, every, factors = _attributed(
        model, examples, optimizer, [metric], batch_size, weights_N, normalization, micro_batch, labels, visits, plan,
        memory, precision, packing, share_prefixes, second_order, progress, ranks, sink, start, journal, replay,
    )  # fmt: skip
    return replace(found[0], label_N_S_V=every, factors=factors)


def metagradients(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metrics: Sequence[TargetMetric | Callable[..., Tensor]],
    *,
    weights_N: Tensor | None = None,
    micro_batch: int = 0,
    visits: bool = False,
    plan: Plan | None = None,
    memory: Memory = "keep",
    packing: bool = False,
    share_prefixes: bool = True,
    second_order: SecondOrder = "exact",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
    start: Start | None = None,
    journal: Journal | None = None,
    replay: Replay | None = None,
) -> Metagradients:
    """Fine-tune a copy of `model` once, and attribute each of Q metrics to each example and token.

    One forward run and one walk back over its states serve all metrics; each has adjoints of its own, three vectors of
    the number of trained parameters, and its own part of every second-order pass (`reverse/walk.py`). The numbers are those
    of Q calls of `metagradient`, to rounding.

    Args:
        metrics: Q of them, as in `metagradient`, which has the other arguments too.

    Raises:
        DegenerateError, UsageError, BadValueError, BadTypeError: as there; and for no metric at all.

    Example:
        >>> found = metagradients(model, examples, recipe, [metric_of(question) for question in questions])
        >>> found.example_Q_N.argsort(1, descending=True)[:, :10]  # of each question, the ten examples that help it most
    """
    if not metrics:
        raise BadValueError("There is no metric.", "Give at least one.")
    return _attributed(
        model, examples, optimizer, metrics, None, weights_N, None, micro_batch, False, visits, plan, memory, None,
        packing, share_prefixes, second_order, progress, ranks, None, start, journal, replay,
    )[0]  # fmt: skip


def outcomes(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metrics: Sequence[TargetMetric | Callable[..., Tensor]],
    weights: Iterable[Tensor],
    *,
    plan: Plan | None = None,
    micro_batch: int = 0,
    packing: bool = False,
    share_prefixes: bool = True,
    second_order: SecondOrder = "exact",
    start: Start | None = None,
) -> Iterator[list[float]]:
    """Φ after fine-tuning a copy of `model`, once for each setting of the data weights; nothing is attributed.

    Args:
        second_order: of the attribution beside it, whose first-order passes these are.
        weights: data weights w, (N,) each; 0 leaves an example out, with batches, order and normaliser as they are.

    Yields:
        The values of all metrics, after each run.

    Raises:
        DegenerateError, UsageError, BadValueError, BadTypeError: as `metagradient`.
    """
    phis = [as_metric(metric) for metric in metrics]
    recipe = Recipe.of(optimizer, None, None, None)
    aligned = accepted(opened(model), examples, optimizer, None).aligned()
    whole = recipe.plan(aligned) if plan is None else plan
    with _ready(
        model, aligned, recipe, whole, micro_batch, packing, share_prefixes, second_order, ALONE, hvp=False
    ) as (run, _):
        read = partial(run.space.read, run.model)
        for weights_N in weights:
            own = weights_N.to(read())
            trace = inner_run(run, read(), aligned, recipe, own, None, None, "sqrt", read, False, whole, None, start)
            if not all_finite(trace.theta):
                raise DegenerateError("An inner run diverged: the weights are not finite.", "Lower inner.lr.")
            yield [metric_value(run, trace.theta, phi) for phi in phis]


@contextmanager
def _ready(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    plan: Plan,
    micro_batch: int,
    packing: bool,
    share_prefixes: bool,
    second_order: SecondOrder,
    ranks: Ranks,
    *,
    hvp: bool,
) -> Iterator[tuple[TargetRun, list[str]]]:
    """The target's passes over these examples, with the model prepared for them while the context lasts; what was chosen.

    Args:
        examples: padded at the right.
        hvp: whether second-order passes will follow, which the model must be right for.
    """
    largest = max(len(plan.index(number)) for number in range(len(plan)))
    way, said = chosen(second_order, recipe, model, examples, micro_batch=micro_batch, batch=largest, ranks=ranks)
    with recipe.prepared(model, as_it_runs=way != "exact") as (target, notes):
        run = TargetRun(
            target,
            recipe.space(target),
            recipe.normalization,
            examples.ids_N_S.shape[1],
            micro_batch,
            precision=recipe.precision,
            ranks=ranks,
            packing=packing,
            second_order="dual" if way == "exact" else way,
        )
        finding = check_model(run, examples, need_hvp=hvp)
        run = finding.apply(run)
        packs = packing and can_pack(run, examples)
        if packing and not packs:
            notes.append("Examples are not packed: this model reads an example otherwise where it shares a row.")
        shared = shareable(run, map(examples.at, plan.rows)) if share_prefixes and alike(examples) else None
        shares = shared is not None and can_share(run, shared)
        if shared is not None and not shares:
            notes.append(
                "Prompts are not shared: this model reads an example otherwise behind another one's beginning."
            )
        if run.slabs and (own_attention := note(target, examples.ids_N_S.shape[1])):
            notes.append(own_attention)
        notes += [*finding.notes, *([said] if said else [])]
        yield replace(run, packing=packs, share_prefixes=shares), notes


def _attributed(
    model: nn.Module,
    examples: Examples,
    optimizer: OptimizerSpec | Recipe,
    metrics: Sequence[TargetMetric | Callable[..., Tensor]],
    batch_size: int | None,
    weights_N: Tensor | None,
    normalization: Normalization | None,
    micro_batch: int,
    labels: bool | Literal["factors"],
    visits: bool,
    plan: Plan | None,
    memory: Memory,
    precision: Precision | None,
    packing: bool,
    share_prefixes: bool,
    second_order: SecondOrder,
    progress: Progress | None,
    ranks: Ranks,
    sink: LabelSink | None,
    start: Start | None,
    journal: Journal | None,
    replay: Replay | None,
) -> tuple[Metagradients, Tensor | None, LabelFactors | None]:
    """What both give, and the credit of every label or its factors."""
    phis = [as_metric(metric) for metric in metrics]
    recipe = Recipe.of(optimizer, batch_size, normalization, precision)
    if recipe.ema and (journal is not None or start is not None):
        what = "is not kept with progress" if start is None else "at a checkpoint is not known"
        raise BadValueError(
            f"The running average of the weights {what}.",
            "Set inner.ema = 0, or inner.states = 'keep' and no checkpoint.",
        )
    bare = opened(model)
    given = accepted(bare, examples, optimizer, weights_N)
    examples = given.aligned()
    plan = recipe.plan(examples) if plan is None else plan
    own, width = examples.ids_N_S.shape
    if replay is not None:
        accepted(bare, replay.examples, optimizer)
        examples, plan = replay.joined(examples, plan)
    with _ready(
        model, examples, recipe, plan, micro_batch, packing, share_prefixes, second_order, ranks, hvp=len(plan) > 1
    ) as (run, notes):
        target = run.model
        if labels == "factors":
            labels = factored(run, examples, given)
        read = partial(run.space.read, target)
        like = next(parameter for parameter in target.parameters() if parameter.requires_grad)
        weights = like.new_ones(own) if weights_N is None else weights_N.to(like)
        weights = torch.cat([weights, weights.new_ones(len(examples) - own)])
        remember = run.second_order == "dual"
        trace = inner_run(
            run, read(), examples, recipe, weights, None, progress, memory, read, remember, plan, None, start, journal
        )
        if not all_finite(trace.theta):
            raise DegenerateError("The inner run diverged: the target's weights are not finite.", "Lower inner.lr.")
        refuse_divergence(run, trace.theta)
        point = None if journal is None else journal.backward(trace.theta)
        if point is None:
            with uncompiled(target):
                values, bars = map(list, zip(*(metric_gradient(run, trace.theta, phi) for phi in phis), strict=True))
            measures = [metric_measures(run, trace.theta, phi) for phi in phis]
            point = turning_point(examples, bars, values, measures)
            del bars
            if journal is not None:
                course = Course(trace.norms, trace.losses, trace.gradient_median)
                journal.turned(trace.theta, course, replace(point, left=len(plan) - trace.start))
        found = reverse(
            run, trace, examples, weights, point, labels, progress, sink, visits, journal, remedy(second_order)
        )
        if run.as_it_runs:
            notes.append(f"Differences: token credits are about {found.stats['difference_error']:.1e} off.")
        own_Q_N_S = found.token_Q_N_S[:, :own, :width]
        tokens = [given.as_given(token_N_S) for token_N_S in own_Q_N_S]
        steps, rows = Plan(plan.rows[trace.start :], plan.count).flat
        kept = rows < own  # the others are replay's
        return (
            Metagradients(
                value_Q=torch.tensor(point.values, dtype=torch.float64),
                measures=point.measures,
                example_Q_N=own_Q_N_S.sum(2),
                token_Q_N_S=torch.stack(tokens) if len(tokens) > 1 else tokens[0][None],
                final=run.space.final(target, trace.theta),
                gradient_median=trace.gradient_median,
                stats=found.stats,
                notes=tuple(notes),
                visits=None
                if found.visit_Q_M is None
                else tuple(
                    Visits(steps[kept] + trace.start, rows[kept], credit[kept.to(credit.device)])
                    for credit in found.visit_Q_M
                ),
            ),
            None if found.label_N_S_V is None else given.as_given(found.label_N_S_V[:own, :width]),
            found.factors,
        )


def factored(run: TargetRun, examples: Examples, given: Examples) -> bool | Literal["factors"]:
    """Whether credits of labels can be kept in factors; True, for all of them, where they cannot.

    Raises:
        UsageError: where neither can be.
    """
    if run.head is not None and run.second_order != "double" and given.aligned() is given:
        return "factors"
    size = getattr(getattr(run.model, "config", None), "vocab_size", None)
    numbers = examples.ids_N_S.numel() * (size if isinstance(size, int) else 1)
    if numbers > MOST_LABELS:
        raise UsageError(
            f"The target has no standard LM head, and the credits of all labels are {numbers:,} numbers, more than {MOST_LABELS:,}.",
            "Set credit.mode = 'token', fewer or shorter completions, or take another target.",
        )
    return True


def refuse_divergence(run: TargetRun, theta: Tensor) -> None:
    """Stop where fine-tuning left nothing of the target, though all numbers are still finite.

    A single inner step never evaluates the weights that it makes, so an absurd learning rate gives finite nonsense.

    Args:
        run: its model's own parameters are θ_0.
        theta: θ_T, shape (n,).

    Raises:
        DegenerateError: if θ moved by `RUNAWAY` times its own size (root mean squares over all weights).
    """
    parameters = dict(run.model.named_parameters())
    norms = []
    for name, after in run.space.views(theta).items():
        before = parameters[name].detach()
        for old, new in zip(before.reshape(-1).split(SAMPLE), after.reshape(-1).split(SAMPLE), strict=True):
            norms.append(torch.stack([torch.linalg.vector_norm(old), torch.linalg.vector_norm(new - old)]))
    read = torch.stack(norms).tolist() if norms else []  # once: a device is waited for at every number
    size, moved = sum(old**2 for old, _ in read), sum(new**2 for _, new in read)
    if moved > RUNAWAY**2 * size > 0:
        raise DegenerateError(
            f"The inner run diverged: it moved the target's weights by {(moved / size) ** 0.5:.1e} times their own size.",
            "Lower inner.lr.",
        )
