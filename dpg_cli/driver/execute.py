"""A whole run: settings -> models and metric -> outer steps -> artefacts in the run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpg_cli.artefacts.dataset import Progress, silent
from dpg_cli.artefacts.models import write_model, write_png, write_target
from dpg_cli.driver.build import Built, build
from dpg_cli.driver.checkpoint import Schedule, forget_after, newest, place, require_same, write
from dpg_cli.driver.final import final_data
from dpg_cli.driver.fingerprints import compare, fingerprints
from dpg_cli.driver.fluency import fluency
from dpg_cli.driver.prospect import Prospect
from dpg_cli.driver.state import follow_first, restore
from dpg_cli.engine.loop import StepReport, train
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.errors import InterruptedRunError, UsageError
from dpg_cli.metrics.merged import plain
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.metrics.trial import UserMetric
from dpg_cli.models.folder import ModelError
from dpg_cli.models.loading import quiet_transformers
from dpg_cli.models.lora import without_adapters
from dpg_cli.patterns.render import pattern_image
from dpg_cli.report import write_report
from dpg_cli.runs.commands import command as command_of
from dpg_cli.runs.files import WriteError, replacing
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import Journal, Outcome, read_info
from dpg_cli.runs.tracking import Trackers
from dpg_cli.settings.config import Config


@dataclass
class StopRequest:
    """How a signal handler or another thread asks a run to stop.

    Attributes:
        asked: set it, and the run stops after the present outer step, its state saved.
        in_step: an outer step is under way. When none is, all that counts is saved already: stop by an exception.
    """

    asked: bool = False
    in_step: bool = False


def finished(folder: RunFolder, config: Config, on_stage: Callable[[str], None] = lambda stage: None) -> Outcome | None:
    """The outcome of a run that needs no resume. A page that its end cut off is written now.

    Raises:
        UsageError: if it was begun with other settings than these.
    """
    outcome = read_info(folder)[0].outcome
    if outcome is not None:
        require_same(folder, config)
        if not folder.report.is_file():
            with folder.locked():
                folder.tidy()
                write_page(folder, on_stage)
    return outcome


def execute(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool = False,
    stop: StopRequest | None = None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_built: Callable[[Built], None] = lambda built: None,
    on_progress: Progress = silent,
    command: list[str] | None = None,
    named_metric: str | None = None,
    trackers: Trackers | None = None,
    ranks: Ranks = ALONE,
) -> Outcome:
    """Run DPG, or go on with an unfinished run, and write every artefact of DESIGN §6.

    Args:
        config: the settings.
        folder: a free run folder, made once the settings have proved good; with `resume` an unfinished run.
        resume: go on from the newest checkpoint, and from the beginning where there is none yet.
        stop: asks for an end after the present outer step.
        on_step: called after each outer step.
        on_stage: called with the name of each stage that begins.
        on_built: called once models and metric stand.
        on_progress: called with the examples of a final dataset that are drawn, and of how many.
        command: the command line, for `run.json`.
        named_metric: what the user gave as --metric; without it no file of a custom metric is run.
        trackers: told of every outer step and of the outcome; opened here, closed by the caller.
        ranks: the processes that share the run, of which this is the first; the others are in `assist`.

    Raises:
        DpgError: for bad settings, a folder that cannot be written or resumed, or a training that became degenerate.
        InterruptedRunError: when it stopped because it was asked to.
    """
    stop, trackers = stop or StopRequest(), trackers or Trackers([])
    on_stage("loading models")
    torch.manual_seed(config.seed)
    try:
        built = build(config, named_metric, ranks)
    except ModelError as error:
        if resume and read_info(folder)[0].fingerprints:
            moved = command_of("resume", folder.path, config)
            where = f"If a model has moved, say where it lies (--target, --generator): {moved} --target FOLDER"
            raise UsageError(error.cause, f"{error.remedy} {where}") from error
        raise
    config = built.config
    on_built(built)
    if built.prospect is not None and not resume:
        if isinstance(built.prospect, Prospect) and config.policy.step == "natural":
            built.prospect.refuse_absent_rows()
        on_stage(built.prospect.line())
    if not resume:
        folder.make()  # only now: what is refused above leaves nothing behind
    with folder.locked(), advice(folder, config):
        journal = (continued if resume else begun)(config, folder, built, command or [], on_stage)
        try:
            on_stage("training the generator")
            trackers.start = journal.first_step
            trackers.open(folder.path, config.model_dump(mode="json"))
            training(config, folder, built, journal, stop, on_step, on_stage, trackers)
            journal.trained()
            outcome = finish(config, folder, built, journal, on_stage, on_progress)
            trackers.result(outcome.measures, outcome.control)
            return outcome
        except (KeyboardInterrupt, InterruptedRunError):
            journal.stop("interrupted")
            raise
        except BaseException:
            journal.stop("failed")
            raise


@contextlib.contextmanager
def advice(folder: RunFolder, config: Config) -> Iterator[None]:
    """Say how to go on when something cannot be written, for example on a full disk."""
    try:
        yield
    except WriteError as error:
        if not folder.config.is_file():
            raise
        raise UsageError(
            error.cause, f"{error.remedy} Then go on with: {command_of('resume', folder.path, config)}"
        ) from error


def begun(
    config: Config, folder: RunFolder, built: Built, command: list[str], on_stage: Callable[[str], None]
) -> Journal:
    """The folder of a new run, with its settings.

    Raises:
        UsageError: if another process has begun a run in it meanwhile.
    """
    RunFolder.free(folder.path, leftovers=True)
    folder.tidy()
    if isinstance(metric := plain(built.players.metric), PatternMetric):
        write_png(folder.pattern, pattern_image(metric.pattern))
    folder.write_config(config)  # from here on it is a run, which can be resumed
    journal = Journal(folder, config, str(built.device), command, processes=built.players.ranks.world)
    journal.data["fingerprints"] = fingerprints(built)
    journal.data["data"] = built.notes
    describe(folder, built, journal)
    return journal


def describe(folder: RunFolder, built: Built, journal: Journal) -> None:
    """Keep what the data is for, and of a user's own metric its record and source. A session that was cut off before it
    did so leaves it to the next."""
    metric = plain(built.players.metric)
    journal.data.setdefault("effect", metric.describe())
    if isinstance(metric, UserMetric):
        journal.data.setdefault("metric", metric.record())
        if (source := metric.factory.source) is not None and not folder.metric_file.is_file():
            with replacing(folder.metric_file) as temporary:
                temporary.write_bytes(source)
    journal.write()


def continued(
    config: Config, folder: RunFolder, built: Built, command: list[str], on_stage: Callable[[str], None]
) -> Journal:
    """Put an unfinished run into the state of its newest good checkpoint.

    Raises:
        UsageError: if the folder was begun with other settings or models, or no checkpoint can be used.
    """
    folder.tidy()
    known = compare(folder, built)
    require_same(folder, config, by_name=not known)
    found = read_info(folder)[0].fingerprints or fingerprints(built)
    if config.trainer == "trl":
        from dpg_cli.driver.trl.trainer import newest_step, require_whole

        step, last = newest_step(folder.trl, config)
        if last is not None:
            with quiet_transformers():
                require_whole(last)
        on_stage(f"going on after outer step {step} of {config.steps}" if step else "no checkpoint yet: beginning anew")
        dropped = folder.rewind_metrics(folder.metrics_size(step))
        journal = Journal(folder, config, str(built.device), command, step, dropped, built.players.ranks.world)
        journal.data["fingerprints"] = found
        journal.write()
        return journal
    checkpoint, faults = newest(folder, config, built, by_name=not known)
    for fault in faults:
        on_stage(f"{fault}; the one before it is taken")
    step = 0
    if checkpoint is not None:
        step = checkpoint.header.step
        on_stage(f"going on after outer step {step} of {config.steps}")
        if checkpoint.header.place != place(built):
            on_stage(f"saved by {checkpoint.header.place}, this is {place(built)}: last digits may differ")
        restore(built.players, checkpoint.state)
    else:
        on_stage("no checkpoint was written yet: beginning anew")
    dropped = folder.rewind_metrics(checkpoint.header.metrics_bytes if checkpoint else 0)
    forget_after(folder, step)
    journal = Journal(folder, config, str(built.device), command, step, dropped, built.players.ranks.world)
    journal.data["fingerprints"] = found
    describe(folder, built, journal)
    return journal


def training(
    config: Config,
    folder: RunFolder,
    built: Built,
    journal: Journal,
    stop: StopRequest,
    on_step: Callable[[StepReport], None],
    on_stage: Callable[[str], None],
    trackers: Trackers,
) -> None:
    """The outer steps that are left, with their log and checkpoints; what the engine chose is said once.

    Raises:
        InterruptedRunError: when it stopped because it was asked to.
    """
    schedule = Schedule(config.checkpoint)

    def log(report: StepReport) -> None:
        fluent = fluency(config, report.rollout, built.players.generator.tokenizer)
        report = replace(report, numbers={**report.numbers, **fluent})
        done = report.step + 1
        folder.append_metrics(report.numbers)
        trackers.log(report.numbers)
        for note in journal.note(report.result.notes):
            on_stage(note)
        on_step(report)
        if config.trainer == "trl":
            return
        asked = built.players.ranks.any(stop.asked)
        if asked or report.last or done == config.steps or schedule.due(done):
            schedule.wrote(write(folder, config, built, done))
            journal.write()
        if asked:
            raise stopped(done, config, folder.path)

    stop.in_step = True
    try:
        earlier = folder.read_metrics()[: journal.first_step]
        built.players.ranks.agreed({"first": journal.first_step, "earlier": earlier})
        follow_first(built.players)
        if config.trainer == "trl":
            by_trl(config, built, folder.path, log, stop, schedule, earlier)
        else:
            train(built.players, built.spec, built.prompts.at, log, journal.first_step, earlier)
    finally:
        stop.in_step = False


def by_trl(
    config: Config,
    built: Built,
    folder: Path,
    log: Callable[[StepReport], None],
    stop: StopRequest,
    schedule: Schedule,
    earlier: Sequence[Mapping[str, float]],
) -> None:
    """The outer steps by TRL's trainer, on every rank. Its checkpoints are written when ours would be.

    Raises:
        InterruptedRunError: when it stopped because it was asked to.
    """
    from dpg_cli.driver.trl.trainer import train as train_by_trl

    ranks = built.players.ranks
    asked_at = 0

    def due(done: int) -> bool:
        nonlocal asked_at
        asked_at = done if ranks.any(stop.asked) else 0
        save = ranks.any(bool(asked_at) or done == config.steps or schedule.due(done))
        if save:
            schedule.wrote(0.0)
        return save

    def over() -> int:
        return asked_at

    train_by_trl(config, built, RunFolder(folder).trl, log, due, over, earlier)
    if asked_at and asked_at < config.steps:
        raise stopped(asked_at, config, folder)


def stopped(done: int, config: Config, folder: Path) -> InterruptedRunError:
    """What a run that was asked to stop ends with, on every rank."""
    return InterruptedRunError(
        f"Stopped after outer step {done} of {config.steps}; all of it is saved.",
        f"Go on with: {command_of('resume', folder, config)}",
    )


def finish(
    config: Config,
    folder: RunFolder,
    built: Built,
    journal: Journal,
    on_stage: Callable[[str], None],
    on_progress: Progress = silent,
) -> Outcome:
    """Everything after the training: dataset, models, picture. Repeated from the last checkpoint when it is cut short."""
    final = final_data(config, built, folder, on_stage, on_progress)
    generator = built.players.generator
    whole: Any = without_adapters(generator.model)
    write_model(folder.generator, replace(generator, model=whole))
    journal.write()
    on_stage("writing the models")
    write_target(folder, built.players.target, built.players.metric, final.result.final, config.models)
    outcome = journal.finish(final.measures, final.control)
    write_page(folder, on_stage)
    return outcome


def write_page(folder: RunFolder, on_stage: Callable[[str], None]) -> None:
    """The page of a finished run, the last of its files. Where it cannot be written, the run stays finished without it."""
    try:
        write_report(folder)
    except Exception as error:  # hours of work are safe on disk: a fault of the page must not end in a traceback
        on_stage(f"the report could not be written ({error}); try: {command_of('report', folder.path)}")
