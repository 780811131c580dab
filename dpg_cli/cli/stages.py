"""Stages of a longer command and how far the present one is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dpg_cli.cli.display import PLAIN_SECONDS, clock
from dpg_cli.escape import printable


class Stages:
    """Shows stages; `with` takes the bar away at the end."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.started = self.last_line = time.monotonic()
        self.name = ""
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Stages:
        if self.console.is_terminal:
            columns = BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"), TimeRemainingColumn()
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.name = printable(name)
        if self.bar is not None and self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        self.console.print(f"{clock(time.monotonic() - self.started):>7}  {self.name}")

    def progress(self, done: int, total: int) -> None:
        """So much of the stage is done."""
        if self.bar is not None:
            if self.task is None:
                self.task = self.bar.add_task("", total=total)
            self.bar.update(self.task, completed=done, total=total)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"{clock(self.last_line - self.started):>7}  {self.name}: {done:,} of {total:,}")
