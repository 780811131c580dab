"""Experiment trackers: every logged figure of a run also goes to tensorboard, wandb or trackio, by their own libraries.

All are optional extras and off unless asked for by name. tensorboard and trackio write to this machine; wandb sends to its
server unless `WANDB_MODE=offline` is set. A tracker that fails is dropped with a word to the user: it never ends a run.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dpg_cli.errors import UsageError

NAMES = ("tensorboard", "wandb", "trackio")
PROJECT = "dpg"


class Tracker(Protocol):
    """One open tracker."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the figures of an outer step."""
        ...

    def finish(self, results: Mapping[str, float], ok: bool) -> None:
        """Record the results and close."""
        ...


def check_names(names: Sequence[str]) -> list[str]:
    """The trackers' names without repetition.

    Raises:
        UsageError: for a name that is unknown, or whose library is not installed.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if name not in NAMES:
            raise UsageError(f"--report-to {name!r} is unknown.", f"There are {', '.join(NAMES)}.")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"--report-to {name}: {name} is not installed.", f"pip install 'dpg-cli[{name}]'")
    return chosen


class Trackers:
    """The trackers of a run; a context manager that closes them.

    Args:
        names: of the trackers, as `check_names` returns them.
        on_trouble: told in one line when a tracker fails and is dropped.
        start: first outer step, above 0 for a resumed run.
    """

    def __init__(
        self, names: Sequence[str], on_trouble: Callable[[str], None] = lambda line: None, start: int = 0
    ) -> None:
        self.names = list(names)
        self.on_trouble = on_trouble
        self.start = start
        self.open_ones: dict[str, Tracker] = {}
        self.results: dict[str, float] = {}

    def open(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Open them all, once the run folder stands.

        Args:
            folder: the run folder; its name is the run's name.
            settings: nested plain settings, kept by the trackers.
        """
        flat = flattened(settings)
        for name in self.names:
            opener = {"tensorboard": _Tensorboard, "wandb": _Wandb, "trackio": _Trackio}[name]
            tracker = self._guarded(name, lambda opener=opener: opener(folder, flat, self.start))  # type: ignore[misc]
            if tracker is not None:
                self.open_ones[name] = tracker

    def log(self, numbers: Mapping[str, float]) -> None:
        """Record the figures of one outer step; `numbers["step"]` says which."""
        shown = {key: value for key, value in numbers.items() if key != "step"}
        for name, tracker in list(self.open_ones.items()):
            self._guarded(name, lambda tracker=tracker: tracker.log(int(numbers["step"]), shown))  # type: ignore[misc]

    def result(self, measures: Mapping[str, float], control: Mapping[str, float] | None) -> None:
        """Keep the run's results, which the trackers get when they are closed."""
        self.results = {f"result/{key}": value for key, value in measures.items()}
        self.results |= {f"control/{key}": value for key, value in (control or {}).items()}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, tracker in list(self.open_ones.items()):
            self._guarded(name, lambda tracker=tracker: tracker.finish(self.results, kind is None))  # type: ignore[misc]
        self.open_ones.clear()

    def _guarded(self, name: str, act: Callable[[], Any]) -> Any:
        """Do it; what the library prints goes to stderr, and what it raises costs the tracker, not the run."""
        try:
            with contextlib.redirect_stdout(sys.stderr):
                return act()
        except Exception as error:  # whatever a tracker's library raises
            self.open_ones.pop(name, None)
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            self.on_trouble(f"tracking by {name} stopped: {reason.strip()[:200]}")
            return None


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    """Nested settings as dotted keys with plain values; lists become text."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | int | float | bool) else str(value)
    return flat


class _Tensorboard:
    """Event files under RUN/tensorboard, written by torch's own writer."""

    def __init__(self, folder: Path, settings: dict[str, Any], start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=start if start else None)
        rows = "\n".join(f"| {key} | {str(value).replace('|', ' ')} |" for key, value in settings.items())
        self.writer.add_text("settings", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def finish(self, results: Mapping[str, float], ok: bool) -> None:
        for key, value in results.items():
            self.writer.add_scalar(key, value, 0)
        self.writer.close()


class _Wandb:
    """A run of the project `dpg` (or `WANDB_PROJECT`); files under RUN/wandb."""

    def __init__(self, folder: Path, settings: dict[str, Any], start: int) -> None:
        import os

        wandb: Any = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        self.run: Any = wandb.init(project=project, name=folder.name, config=settings, dir=str(folder))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def finish(self, results: Mapping[str, float], ok: bool) -> None:
        self.run.summary.update(dict(results))
        self.run.finish(exit_code=0 if ok else 1)


class _Trackio:
    """A run of the project `dpg` in trackio's own database on this machine, or where its environment variables say."""

    def __init__(self, folder: Path, settings: dict[str, Any], start: int) -> None:
        self.trackio: Any = importlib.import_module("trackio")
        self.run: Any = self.trackio.init(project=PROJECT, name=folder.name, config=settings, embed=False)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self.run.log({key: value for key, value in numbers.items() if math.isfinite(value)}, step=step)

    def finish(self, results: Mapping[str, float], ok: bool) -> None:
        if results:
            self.run.log({key: value for key, value in results.items() if math.isfinite(value)})
        self.trackio.finish()  # not run.finish(): the module would close the run once more at exit, and print on stdout
