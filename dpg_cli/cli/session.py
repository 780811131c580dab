"""One session of a run at the command line: signals, live display, outcome. `dpg run` and `dpg resume` share it."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import typer

from dpg_cli.driver import launch
from dpg_cli.errors import InterruptedRunError, LostProcessError, one_line
from dpg_cli.runs.commands import command

if TYPE_CHECKING:
    from dpg_cli.driver.execute import StopRequest
    from dpg_cli.engine.ranks import Ranks
    from dpg_cli.runs.folder import RunFolder
    from dpg_cli.runs.sessions import Outcome
    from dpg_cli.settings.config import Config

FINISHING = "finishing this outer step, then saving; once more leaves at once"


def session(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool,
    as_json: bool,
    named_metric: str | None = None,
    trackers: Sequence[str] = (),
    ranks: Ranks | None = None,
) -> None:
    """Begin a run or go on with one, with a display on stderr and the outcome on stdout.

    Args:
        config: its settings.
        folder: a free place, or with `resume` a run; a finished one only says so.
        resume: go on with it.
        as_json: print JSON.
        named_metric: what the user gave as --metric; without it no file of a custom metric is run.
        trackers: names that `tracking.check_names` has passed.
        ranks: the processes that share the run, of which this is the first; the others `follow`.

    Raises:
        InterruptedRunError: after Ctrl-C or SIGTERM, with the command that goes on.
        LostProcessError: if another process is lost, likewise.
    """
    from dpg_cli.cli.display import RunDisplay
    from dpg_cli.driver.execute import StopRequest, execute, finished
    from dpg_cli.engine.ranks import ALONE
    from dpg_cli.runs.tracking import Trackers

    ranks = ranks or ALONE
    known = finished(folder, config, lambda line: typer.echo(one_line(line), err=True)) if resume else None
    ranks.agreed(None if known else {"config": config.model_dump(mode="json"), "folder": str(folder.path)})
    if known is not None:
        sys.stderr.write(f"{folder.path} is finished: there is nothing to go on with.\n")
        report(folder, config, known, as_json)
        return
    stop = StopRequest()
    remedy = f"Go on with: {command('resume', folder.path, config)}"
    launch.advise(remedy)
    try:
        with (
            RunDisplay(config, folder.path) as display,
            Trackers(trackers, display.notify) as tracking,
            stopping(stop, display.notify),
        ):
            outcome = execute(
                config,
                folder,
                resume=resume,
                stop=stop,
                on_step=display.step,
                on_stage=display.stage,
                on_built=display.built,
                on_progress=display.progress,
                command=sys.argv,
                named_metric=named_metric,
                trackers=tracking,
                ranks=ranks,
            )
    except KeyboardInterrupt:
        raise left(config, folder) from None
    except LostProcessError as error:
        raise LostProcessError(error.reason, remedy if folder.config.is_file() else "") from None
    report(folder, config, outcome, as_json)


def follow(ranks: Ranks, named_metric: str | None = None) -> None:
    """Share the run that rank 0 begins or goes on with, without a display or a file of its own.

    Raises:
        InterruptedRunError: after Ctrl-C or SIGTERM, on all ranks alike.
        LostProcessError: if another process is lost.
    """
    from dpg_cli.driver.assist import assist
    from dpg_cli.driver.execute import StopRequest
    from dpg_cli.settings.config import validate

    known = ranks.agreed(None)
    if known is None:  # the run is finished
        return
    stop = StopRequest()
    config = validate(known["config"])
    remedy = f"Go on with: {command('resume', known['folder'], config)}"
    launch.advise(remedy)
    try:
        with stopping(stop, lambda text: None):
            assist(config, known["folder"], ranks, stop, named_metric)
    except KeyboardInterrupt:
        raise InterruptedRunError("Left at once.", remedy) from None
    except LostProcessError as error:
        raise LostProcessError(error.reason, remedy) from None


@contextlib.contextmanager
def stopping(stop: StopRequest, notify: Callable[[str], None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM finish the outer step that is under way; any other leaves at once.

    Args:
        stop: what the run looks at after each outer step.
        notify: tells the user; called from the signal handler.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.asked or not stop.in_step:
            raise KeyboardInterrupt
        stop.asked = True
        notify(FINISHING)

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left(config: Config, folder: RunFolder) -> InterruptedRunError:
    """What is left after leaving at once."""
    from dpg_cli.driver.checkpoint import found

    if not folder.config.is_file():
        return InterruptedRunError("Interrupted before the first outer step; nothing was written.")
    saved = next((f"the last checkpoint is of outer step {step} of {config.steps}" for step, _ in found(folder)), None)
    return InterruptedRunError(
        f"Left at once; {saved or 'there is no checkpoint yet'}.",
        f"Go on with: {command('resume', folder.path, config)}",
    )


def report(folder: RunFolder, config: Config, outcome: Outcome, as_json: bool) -> None:
    """Print the outcome on stdout."""
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "run": str(folder.path),
                    "measures": outcome.measures,
                    "control": outcome.control,
                    "seconds": outcome.seconds,
                    "peak_memory_mb": outcome.peak_memory_mb,
                    "sessions": outcome.sessions,
                },
                indent=2,
            )
        )
        return
    measures = ", ".join(f"{name} {value:.4g}" for name, value in outcome.measures.items())
    typer.echo(one_line(f"{folder.path}: {measures}"))
    memory = "" if outcome.peak_memory_mb is None else f", {outcome.peak_memory_mb:,.0f} MB at the peak"
    sessions = "" if outcome.sessions == 1 else f" in {outcome.sessions} sessions"
    typer.echo(f"{outcome.seconds:.0f} s{sessions}{memory}. Next: {command('verify', folder.path, config)}")
