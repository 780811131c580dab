"""Is a setting learnable? `dpg check`: one outer step's worth of measurements before hours are spent.

Unlike the verification of a finished run, this uses the engine: its subject is the engine's reward under these settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dpg_cli.driver.build import Built, build
from dpg_cli.driver.trial import try_out
from dpg_cli.engine.detect import metric_before, refuse_dead_reward
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.credit import assign
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.inner.optimizers import OptimizerSpec, initial_state, update
from dpg_cli.engine.loop import LoopSpec, attribute
from dpg_cli.engine.noise import HearsNoise
from dpg_cli.engine.records import Rollout
from dpg_cli.errors import DegenerateError
from dpg_cli.evidence.check_findings import CheckReport, Finding, rounded
from dpg_cli.evidence.check_gradient import Probe, epsilon, finite_differences, metasmoothness
from dpg_cli.evidence.check_reward import cost, exploration, movement, spread, tokenisers
from dpg_cli.settings.config import Config

COMPLETIONS = 256  # measured on, unless asked for more
DIFFERENCES, SMOOTHNESS = 32, 128  # examples of the runs with changed data weights
CHEAP = 20_000_000  # target parameters up to which a float64 copy is made


def check(
    config: Config,
    *,
    make: Callable[[Config], Built] = build,
    completions: int = COMPLETIONS,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> CheckReport:
    """Measure whether these settings can learn.

    Args:
        config: the settings.
        make: from settings to live models.
        completions: how many to measure on, at most an outer step's; the inner run keeps its T.
        on_stage: called with the name of each stage that begins.

    Raises:
        UsageError: whatever `dpg run` would refuse.
    """
    on_stage("loading models")
    torch.manual_seed(config.seed)
    built = make(config)
    on_stage("trying them out")
    notes = try_out(built)
    players = built.players
    group = config.rollout.group_size
    prompts = built.prompts.at(0)[: max(1, completions // group)]
    on_stage("sampling completions")
    generator = players.generator
    rollout = sample(generator.model, generator.tokenizer, prompts, built.spec.sampling, players.rng)
    spec = scaled(built.spec, config, len(rollout))

    findings = [
        tokenisers(built.tokenizers, config.credit.mode),
        exploration(rollout.entropy, generator.head.shape[0], config.rollout.temperature),
        *cost(built.prospect),
    ]
    if notes:
        findings.append(Finding("derivatives", "ok", " ".join(notes)))
    if findings[0].verdict == "ok":
        on_stage("attributing them")
        findings += _attribution(config, built, spec, rollout, on_stage, make)
    return CheckReport(config.task, len(rollout), config.examples_per_step, findings)


def scaled(spec: LoopSpec, config: Config, count: int) -> LoopSpec:
    """The loop's settings for fewer completions: the same T, and inner runs that they can fill."""
    wanted, groups = spec.attribution, count // config.rollout.group_size
    runs = min(wanted.runs, groups if wanted.cross_group else count)
    return replace(spec.rescaled(config.examples_per_step, count), attribution=replace(wanted, runs=runs))


def _attribution(
    config: Config,
    built: Built,
    spec: LoopSpec,
    rollout: Rollout,
    on_stage: Callable[[str], None],
    make: Callable[[Config], Built],
) -> list[Finding]:
    """The checks that need rewards; a reward that is dead is a finding too."""
    players, method = built.players, spec.attribution.method
    try:
        result, token_N_K, labels = attribute(players, spec, rollout)
        refuse_dead_reward(result, spec.attribution.per_example)
        before = metric_before(players.metric, players.target.model)
        examples = read_completions(rollout, players.generator, players.target, spec.max_length).examples
        probe = Probe(players.target.model, players.metric, examples, replace(spec.inner, memory="keep"))
        theta, grad, final, theta_bar = probe.start()
    except DegenerateError as error:
        return [_dead(error, config)]
    credit = assign(
        spec.credit, token_N_K, labels, rollout.mask_N_K, rollout.group_size,
        discount=spec.discount, across=spec.attribution.across,
    )  # fmt: skip
    gradient_method = method in ("metagradient", "sgd")
    read = (theta_bar != 0) & (grad != 0)
    unit = float(result.example_N.abs().sum()) if method == "metagradient" else 0.0
    exact = theta.double()
    optimizer = spec.recipe.optimizer
    planned = update(optimizer, initial_state(optimizer, exact), grad.double(), 0).theta - exact
    found = [movement(before, result.value, optimizer.lr, theta, final, planned, read, unit)]
    found.append(
        spread(
            credit.stats,
            rollout,
            across=spec.attribution.across,
            labels=spec.credit == "expected",
            temperature=config.rollout.temperature,
            runs=spec.attribution.runs,
        )
    )
    if not gradient_method:
        return found
    if method == "sgd":
        optimizer = OptimizerSpec("sgd", lr=result.stats["sgd_lr"])
    sign = epsilon(optimizer, grad, theta_bar, config.inner_steps)
    found.append(sign)
    if found[0].verdict == "fail":  # differences of a metric that does not move would measure rounding
        return found
    inner = replace(probe.inner, optimizer=replace(spec.recipe, optimizer=optimizer))
    probe = _precise(config, built, replace(probe, inner=inner), make)
    try:
        on_stage("finite differences")
        found.append(finite_differences(probe.first(DIFFERENCES), sign.suggested))
        on_stage("metasmoothness")
        found.append(metasmoothness(probe.first(SMOOTHNESS), sign.suggested))
    except DegenerateError as error:
        found.append(_dead(error, config))
    return found


def _precise(config: Config, built: Built, probe: Probe, make: Callable[[Config], Built]) -> Probe:
    """The same inner runs on a float64 copy of the target, where that is cheap."""
    if config.models.dtype == "float64" or built.players.target.parameter_count > CHEAP or built.device.type == "mps":
        return probe
    double = make(config.model_copy(update={"models": config.models.model_copy(update={"dtype": "float64"})}))
    metric, known = double.players.metric, built.players.metric
    if isinstance(metric, HearsNoise) and isinstance(known, HearsNoise) and known.heard is not None:
        metric.hear(known.heard)  # the same noise: a metric in units of it has no value without
    return replace(probe, model=double.players.target.model, metric=metric)


def _dead(error: DegenerateError, config: Config) -> Finding:
    """A reward or a metric that stopped the measurement."""
    setting, suggested = ("inner.lr", rounded(config.inner.lr / 10))
    if error.cause.startswith("Every reward is zero"):
        setting, suggested = ("inner.eps", rounded(max(1e-3, 10 * config.inner.eps)))
    return Finding("reward", "fail", f"{error.cause} {error.remedy}".strip(), {}, setting, suggested)
