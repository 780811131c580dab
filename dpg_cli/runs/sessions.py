"""`run.json`: where, how and how long a run was made, over all its sessions (a resume begins a new one)."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpg_cli.errors import DpgError, UsageError
from dpg_cli.runs.files import reading, write_json
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config

Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Ending = Literal["finished", "interrupted", "failed", "killed"]


@dataclass(frozen=True)
class Outcome:
    """What a finished run reports.

    Attributes:
        measures: Φ and readable measures of a target trained on the final dataset.
        control: the same for the untrained generator's data, or None.
        seconds: of the whole run, over all its sessions.
        peak_memory_mb: peak resident memory of the process, of the largest session.
        sessions: how often it was started or resumed.
    """

    measures: dict[str, float]
    control: dict[str, float] | None
    seconds: float
    peak_memory_mb: float | None
    sessions: int = 1


class Info(BaseModel):
    """What is read back from `run.json`; the rest of it is for people."""

    model_config = ConfigDict(frozen=True, strict=True)

    finished: bool = False
    seconds: Seconds = 0.0
    seconds_training: Seconds | None = None
    peak_memory_mb: Seconds | None = None
    measures: dict[str, float] = {}
    control: dict[str, float] | None = None
    sessions: list[dict[str, Any]] = []
    fingerprints: dict[str, dict[str, str]] = {}  # of generator and target, as they were when the run began

    @property
    def outcome(self) -> Outcome | None:
        """What the run reported, if it is finished."""
        if not self.finished:
            return None
        return Outcome(self.measures, self.control, self.seconds, self.peak_memory_mb, max(1, len(self.sessions)))


def read_info(folder: RunFolder) -> tuple[Info, dict[str, Any]]:
    """What `run.json` says: checked, and as it stands; empty where a run was killed before it wrote any.

    Raises:
        UsageError: if it is damaged.
    """
    if not folder.info.is_file():
        return Info(), {}
    try:
        with reading(folder.info):
            if folder.info.stat().st_size > 100_000_000:
                raise ValueError
            data = json.loads(folder.info.read_bytes())
        info = Info.model_validate(data)
        if any(not 0 <= _number(session.get("seconds", 0.0)) <= 1e12 for session in info.sessions):
            raise ValueError
    except (ValueError, RecursionError, ValidationError):
        raise UsageError(
            f"{folder.info} is damaged.", "Remove it to go on: the history of the run's sessions is then lost."
        ) from None
    return info, data


def _number(value: object) -> float:
    """A number that JSON held, or nan."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


class Journal:
    """Keeps `run.json` while a session runs.

    Args:
        folder: the run.
        config: its settings.
        device: where it runs.
        command: the command line.
        step: outer steps that are already done.
        dropped: outer steps that an earlier session did and that are done again, and their seconds.
        processes: how many share the run.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        device: str,
        command: list[str],
        step: int = 0,
        dropped: tuple[int, float] = (0, 0.0),
        processes: int = 1,
    ) -> None:
        self.folder = folder
        self.first_step = step
        self.clock = time.perf_counter()
        known, data = read_info(folder)
        here = environment(config, device, command)
        here["hardware"]["processes"] = processes
        self.earlier = [dict(session) for session in known.sessions]
        self.peak = known.peak_memory_mb
        if self.earlier:
            last = self.earlier[-1]
            if last.get("ended") is None:  # nothing was left to write it: what its log lost still took its time
                last["ended"] = "killed"
                last["seconds"] = round(last.get("seconds", 0.0) + dropped[1], 2)
            last["steps_lost"] = dropped[0]
        self.session: dict[str, Any] = {
            "started": here["started"],
            "command": here["command"],
            "first_step": step,
            "seconds": 0.0,
            "ended": None,
            "versions": here["versions"],
            "revision": here["revision"],
            "hardware": here["hardware"],
        }
        self.data: dict[str, Any] = {**here, **data, "finished": False}
        self.said: set[str] = set()
        self.write()

    @property
    def seconds(self) -> float:
        """Of all sessions up to now."""
        return sum(session.get("seconds", 0.0) for session in self.earlier) + time.perf_counter() - self.clock

    def write(self) -> None:
        """Bring `run.json` up to date."""
        self.session["seconds"] = round(time.perf_counter() - self.clock, 2)
        write_json(self.folder.info, {**self.data, "sessions": [*self.earlier, self.session]})

    def note(self, notes: Iterable[str]) -> list[str]:
        """Keep what the engine chose for the target, a sentence each.

        Returns:
            Those that this session has not been told yet.
        """
        new = [note for note in dict.fromkeys(notes) if note not in self.said]
        if new:
            self.said.update(new)
            kept = self.data.get("notes")
            earlier = [str(note) for note in kept] if isinstance(kept, list) else []
            self.data["notes"] = list(dict.fromkeys((*earlier, *new)))
            self.write()
        return new

    def trained(self) -> None:
        """The training is done; a session that resumes after it does not count again."""
        self.data.setdefault("seconds_training", round(self.seconds, 2))
        self.write()

    def stop(self, ending: Ending) -> None:
        """The session ends without a result. On a full disk `run.json` stays as it was."""
        self.session["ended"] = ending
        with contextlib.suppress(DpgError):
            self.write()

    def finish(self, measures: dict[str, float], control: dict[str, float] | None) -> Outcome:
        """The run is finished: the last thing that is written."""
        peak = max((value for value in (self.peak, peak_memory_mb()) if value is not None), default=None)
        outcome = Outcome(measures, control, self.seconds, peak, len(self.earlier) + 1)
        self.session["ended"] = "finished"
        self.data |= {
            "finished": True,
            "seconds": round(outcome.seconds, 2),
            "peak_memory_mb": peak,
            "measures": measures,
            "control": control,
        }
        self.write()
        return outcome


def environment(config: Config, device: str, command: list[str]) -> dict[str, Any]:
    """What `run.json` says of where and how a run was made."""
    import torch

    versions = {"python": platform.python_version()}
    for package in ("dpg-cli", "torch", "transformers", "tokenizers", "safetensors", "numpy", "pyarrow"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "task": config.task,
        "scale": config.scale,
        "seed": config.seed,
        "command": [Path(command[0]).name, *command[1:]] if command else [],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions,
        "revision": git_revision(),
        "hardware": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }


def git_revision() -> str | None:
    """Revision of the source tree that this package runs from, if it is a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
        return answer.stdout.strip() or None
    return None


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process in MB (10^6 bytes), where the system tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
