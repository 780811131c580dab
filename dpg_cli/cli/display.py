"""The live display of a run on stderr; plain lines where stderr is no terminal."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpg_cli.errors import one_line
from dpg_cli.patterns.render import text_pattern

if TYPE_CHECKING:
    from dpg_cli.driver.build import Built
    from dpg_cli.engine.loop import StepReport
    from dpg_cli.settings.config import Config

PLAIN_SECONDS = 10.0  # between two plain lines


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    """`1 outer step`, `2 outer steps`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


class RunDisplay:
    """Shows stages and outer steps.

    Args:
        config: the run's settings.
        folder: where it writes.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.config = config
        self.folder = folder
        self.started = time.monotonic()
        self.last_line = float("-inf")
        self.recent: deque[float] = deque(maxlen=20)
        self.metric: object | None = None
        self.live: Live | None = None
        self.panel: Group | None = None
        self.notice = ""
        self.work = ""

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self.live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.notice = self.work = ""
            self.live.transient = self.panel is None  # the last picture stays on the screen
            self.live.stop()

    def notify(self, text: str) -> None:
        """Show a line at once. A signal handler may call it: it waits for no lock and uses no buffer."""
        self.notice = text
        if self.live is None:
            os.write(2, f"         {text}\n".encode())

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.work = ""
        if self.live is not None:
            self.console.print(
                Text(f"{clock(time.monotonic() - self.started):>7}  ", "dim"), Text(one_line(name)), sep=""
            )
        else:
            self.console.print(Text(f"{clock(time.monotonic() - self.started):>7}  {one_line(name)}"))

    def progress(self, done: int, total: int) -> None:
        """Some of the examples of a final dataset are drawn."""
        self.work = f"{done:,} of {total:,} examples"
        now = time.monotonic()
        if self.live is None and now - self.last_line >= PLAIN_SECONDS:
            self.last_line = now
            self.console.print(f"{clock(now - self.started):>7}  {self.work}")

    def built(self, built: Built) -> None:
        """Models and metric stand."""
        self.metric = built.players.metric
        generator, target = built.players.generator, built.players.target
        config = self.config
        self.console.print(
            f"         {built.players.metric.describe()}; target {target.name} ({target.parameter_count:,} parameters, "
            f"{config.models.target_init}); generator {generator.name} ({generator.parameter_count:,})"
        )
        for line in built.notes:
            self.console.print(Text(f"         {one_line(line)}"))
        if not built.tokenizers.shared:
            self.console.print(f"         {built.tokenizers.as_text()}")
        self.console.print(
            f"         {counted(config.steps, 'outer step')} of {counted(config.examples_per_step, 'completion')}, T = {config.inner_steps}, "
            f"credit {config.credit.mode}, on {built.device} -> {self.folder}"
        )

    def step(self, report: StepReport) -> None:
        """An outer step is done."""
        if report.warning:
            self.console.print(f"warning: outer step {report.step + 1}: {report.warning}", markup=False)
        numbers = report.numbers
        self.recent.append(numbers["seconds"])
        done = report.step + 1
        left = (self.config.steps - done) * sum(self.recent) / len(self.recent)
        if self.live is not None:
            self.panel = self._panel(report, done, left)
            return
        now = time.monotonic()
        if now - self.last_line >= PLAIN_SECONDS or done == self.config.steps:
            self.last_line = now
            self.console.print(
                f"{clock(now - self.started):>7}  step {done}/{self.config.steps}  phi {numbers['phi']:.4f}  "
                f"{self._measure(report)}{self._noise(report)}  entropy {numbers['entropy']:.2f}  "
                f"{numbers['examples'] / numbers['seconds']:.0f} examples/s  left {clock(left)}"
            )

    def _picture(self) -> Group:
        """The live display as it stands."""
        lines = [Text(self.work, "dim")] if self.work else []
        return Group(self.panel or Text("starting"), *lines, *([Text(self.notice, "bold")] if self.notice else []))

    @staticmethod
    def _measure(report: StepReport) -> str:
        """The first readable measure."""
        for name, value in report.result.measures.items():
            return f"{name.replace('_', ' ')} {value:.4g}"
        return ""

    @staticmethod
    def _noise(report: StepReport) -> str:
        """What the noise of drawn tokens leaves of the effect, and what it cost, where these are known."""
        numbers = report.numbers
        found = ""
        if "z_mean" in numbers:
            found += f"  z {numbers['z_mean']:.2f} (least {numbers['z_least']:.2f})"
            found += f"  predicted {numbers['predicted_accuracy']:.4f}"
        if "phi_z" in numbers:
            found += f"  z {numbers['phi_z']:.1f} (a standard error is {numbers['phi_error']:.2g})"
        if "examples_needed" in numbers:
            found += f"  needs {numbers['examples_needed']:,.0f} examples"
        return found + (f"  kl {numbers['policy_kl']:.4f}" if "policy_kl" in numbers else "")

    def _panel(self, report: StepReport, done: int, left: float) -> Group:
        """What the live display shows."""
        numbers = report.numbers
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("outer step", f"{done} / {self.config.steps}"),
            ("Φ", f"{numbers['phi']:.4f}"),
            *((name.replace("_", " "), f"{value:.4f}") for name, value in list(report.result.measures.items())[:2]),
            *([("noise", noise)] if (noise := self._noise(report).strip()) else []),
            ("entropy", f"{numbers['entropy']:.3f} nats"),
            ("examples a second", f"{numbers['examples'] / numbers['seconds']:.0f}"),
            ("time left", clock(left)),
        ):
            table.add_row(Text(name, style="dim"), value)
        bar = ProgressBar(total=self.config.steps, completed=done, width=32)
        change = getattr(self.metric, "change", None)
        if change is None:
            return Group(table, bar)
        signs = change(report.result.final).sign().cpu().numpy().astype("int8")
        side = Table.grid(padding=(0, 4))
        side.add_row(Text(text_pattern(signs)), Group(table, Text(), bar))
        return Group(side)
