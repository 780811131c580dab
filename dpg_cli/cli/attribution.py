"""What `dpg attribute` shows: its stages and how long it still takes, on stderr; tables and summary, on stdout."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from dpg_cli.cli.tokens import mask_legend, masked_tokens, scored_tokens
from dpg_cli.errors import InterruptedRunError, one_line
from dpg_cli.escape import printable

if TYPE_CHECKING:
    from dpg_cli.attribution.attribute import Request
    from dpg_cli.attribution.outcome import Answer, Attribution
    from dpg_cli.attribution.pace import Pace
    from dpg_cli.settings.config import Config

PLAIN_SECONDS = 10.0  # between two plain lines of progress
NAMES = {"forward": "fine-tuning", "reverse": "attributing", "retraining": "retraining"}


def in_words(seconds: float) -> str:
    """A time that is left, no more precisely than it is known."""
    if seconds < 90:
        return f"{max(1, round(seconds / 5)) * 5} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


class AttributionDisplay:
    """Stages and progress on stderr; a bar on a terminal, else a line now and then.

    Args:
        pace: estimates the time that is left.
    """

    def __init__(self, pace: Pace) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.started = self.last_line = time.monotonic()
        self.pace = pace
        self.place = ""
        self.retraining: tuple[float, int] | None = None  # when it began, and with how many
        self.bar: Progress | None = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> AttributionDisplay:
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self.bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.console.print(f"{time.monotonic() - self.started:6.0f} s  {name}")

    def note(self, line: str) -> None:
        """Something to know of the data."""
        self.console.print(Text(f"         {printable(line)}"))

    def _left(self, phase: str, done: int, total: int) -> float | None:
        if phase != "retraining":
            return self.pace.left(phase, done, total)
        now = time.monotonic()
        since, first = self.retraining = self.retraining or (now, done)
        return (now - since) / (done - first) * (total - done) if done > first else None

    def progress(self, phase: str, done: int, total: int) -> None:
        """An inner step is done, forward or in reverse."""
        name, seconds = NAMES[phase], self._left(phase, done, total)
        left = "" if seconds is None else f"about {in_words(seconds)} left"
        self.place = f"{name}: {'run' if phase == 'retraining' else 'step'} {done:,} of {total:,}"
        if self.bar is not None:
            if phase not in self.tasks:
                self.tasks[phase] = self.bar.add_task(name, total=total, left="")
            self.bar.update(self.tasks[phase], completed=done, left=left)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"{self.last_line - self.started:6.0f} s  {self.place}{left and ', '}{left}")


@contextmanager
def interruptible(display: AttributionDisplay, keeps: Path | None) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the attribution in one line that says what is kept.

    Args:
        display: knows how far it is.
        keeps: the work folder; None where nothing outlives the process.

    Raises:
        InterruptedRunError: then.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # signals are the main thread's
    before = signal.signal(signal.SIGTERM, handle) if main else None
    try:
        yield
    except KeyboardInterrupt:
        where = f" ({display.place})" if display.place else ""
        if keeps is not None and keeps.is_dir():
            raise InterruptedRunError(
                f"Interrupted{where}; what is done is kept in {keeps}.", "The same command goes on with it."
            ) from None
        raise InterruptedRunError(
            f"Interrupted{where}; nothing is kept.", "With --memory sqrt or offload the same command would go on."
        ) from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def show_result(result: Attribution, out: Path) -> None:
    """The tables and the summary, on stdout."""
    console = Console(highlight=False)
    several = len(result.answers) > 1
    for answer in result.answers:
        if several:
            console.print(Text(printable(f"{answer.name}: {answer.metric}"), style="bold"))
        for title, rows in (("Most helpful", answer.helpful), ("Most harmful", answer.harmful)):
            if not rows:
                continue
            table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
            table.add_column("example", justify="right")
            table.add_column("score", justify="right")
            table.add_column("tokens")
            for row in rows:
                table.add_row(str(row.example_id), f"{row.score:+.3e}", scored_tokens(row.tokens, row.token_scores))
            console.print(table)
            console.print()
    lines = [_change(answer, several) for answer in result.answers]
    lines.append(result.epsilon[0].upper() + result.epsilon[1:])
    if result.clipped_share is not None:
        lines.append(f"The gradient was clipped on {result.clipped_share:.0%} of the steps.")
    if result.precision_error is not None:
        lines.append(
            f"bf16: token scores of the first and the last step are at most {result.precision_error:.1%} off those of float32."
        )
    if result.difference_error is not None:
        lines.append(
            f"By differences: token scores are about {result.difference_error:.1e} off, relative to all of them."
        )
    memory = "" if result.peak_memory_mb is None else f", {result.peak_memory_mb:,.0f} MB at the peak"
    asked = f", {len(result.answers):,} queries ({result.width:,} at once)" if several else ""
    lines.append(
        f"{result.examples:,} examples in {result.inner_steps:,} steps{asked}, {result.seconds:.0f} s{memory}."
    )
    lines.append(f"Scores: {out}; how they were made: {out}.json")
    for line in lines:
        typer.echo(one_line(line))


def _change(answer: Answer, several: bool) -> str:
    """Φ before and after, on a line."""
    measures = ", ".join(f"{name} {value:.4g}" for name, value in answer.measures.items())
    who = f"{answer.name}: {answer.metric}" if several else f"Metric: {answer.metric}"
    return f"{who}. Φ {answer.value_before:.4f} -> {answer.value:.4f} ({measures})."


def show_rows(config: Config, request: Request, count: int) -> None:
    """The first rows as tokens, on stdout."""
    from dpg_cli.attribution.attribute import show

    found, tokens = show(config, request, count)
    console = Console(highlight=False, soft_wrap=True)
    for line in (found.understood.line(), *found.understood.notes(), mask_legend(console.is_terminal)):
        typer.echo(one_line(line))
    for number, row, texts in zip(found.numbers, found.rows, tokens, strict=False):
        console.print()
        console.print(Text(f"row {number}: {sum(row.label):,} of {len(row.ids):,} tokens count, {row.cut:,} cut away"))
        console.print(masked_tokens(texts, row.label, console.is_terminal))
