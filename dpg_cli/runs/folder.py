"""The run folder: where each artefact lies, and who may write to it. DESIGN §6 lists what a finished folder holds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpg_cli.data.sources import absolute
from dpg_cli.errors import UsageError
from dpg_cli.runs.commands import command
from dpg_cli.runs.files import TEMPORARY, locked, reading, replacing, write_json, write_text, writing
from dpg_cli.settings.config import Config, PatternOptions, load_toml, to_toml, validate

__all__ = ["RunFolder", "command", "replacing", "resolve_paths", "write_json", "write_text"]

OWN_PROMPTS = ("tiny", "prose", "empty")  # sources that are no paths
OWN_TEXTS = ("prose",)  # held-out texts that are none


class RunFolder:
    """A run folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.info = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.pattern = path / "pattern.png"
        self.metric_file = path / "metric.py"  # a copy for the record; nothing here ever runs it
        self.generator = path / "generator"
        self.target = path / "target"
        self.adapter = path / "adapter"  # of a LoRA target, which `target` has merged
        self.dataset = path / "dataset"
        self.image = path / "lm_head.png"
        self.checkpoints = path / "checkpoints"
        self.trl = path / "trl"  # TRL's own checkpoints, where TRL trains
        self.report = path / "report.html"

    @classmethod
    def free(cls, path: Path, *, leftovers: bool = False) -> RunFolder:
        """A run folder that is yet to be made, at a place that is free for it.

        Args:
            path: the place.
            leftovers: count as free also a folder with no more than a run leaves that was killed before its settings
                were written.

        Raises:
            UsageError: if something is there already.
        """
        try:
            there = [path.name] if path.exists() and not path.is_dir() else []
            if path.is_dir():
                there = [entry.name for entry in path.iterdir()]
            if leftovers:
                there = [name for name in there if name != "pattern.png" and not TEMPORARY.fullmatch(name)]
            if "config.toml" in there:
                raise UsageError(
                    f"{path} holds a run.", f"Give another --out, or go on with it: {command('resume', path)}"
                )
            if there:
                raise UsageError(f"{path} exists and is not empty.", "Give another --out, or remove it.")
        except OSError as error:
            raise UsageError(f"The folder {path} cannot be read: {error.strerror}.", "Give another --out.") from None
        return cls(path)

    def make(self) -> None:
        """Make the folder.

        Raises:
            UsageError: if that fails.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"The folder {self.path} cannot be made: {error.strerror}."
            raise UsageError(reason, "Give another --out.") from None

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            UsageError: if it is none.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise UsageError(f"{path} is no run folder: it has no config.toml.", "Name a folder that `dpg run` wrote.")
        return folder

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """While this process writes into the folder, no other does. The lock ends with the process, however it ends.

        Raises:
            UsageError: if another process holds it.
        """
        with locked(self.path):
            yield

    def tidy(self) -> None:
        """Remove what a killed process left half-written.

        Raises:
            UsageError: if an entry that could be written to is a link: it might lead outside the folder.
        """
        for folder in (self.path, self.dataset, self.checkpoints):
            for path in list(folder.iterdir()) if folder.is_dir() else []:
                if path.is_symlink():
                    raise UsageError(f"{path} is a link; a run writes into its own folder alone.", "Remove the link.")
                if TEMPORARY.fullmatch(path.name):
                    with writing(path):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read_config(self) -> Config:
        """The run's settings; relative paths in them are relative to the folder."""
        return validate(resolve_paths(load_toml(self.config), self.path))

    def write_config(self, config: Config) -> None:
        """Write the settings so that `dpg run --config` repeats the run, wherever the folder is moved."""
        if isinstance(config.metric, PatternOptions) and config.metric.image:
            config = config.model_copy(update={"metric": config.metric.model_copy(update={"image": self.pattern.name})})
        write_text(self.config, to_toml(config))

    def append_metrics(self, numbers: dict[str, float]) -> None:
        """Add one outer step to `metrics.jsonl`: the whole line, or nothing.

        Raises:
            UsageError: if it cannot be written.
        """
        with writing(self.metrics), self.metrics.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            data = (json.dumps(numbers) + "\n").encode()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size)
                raise

    def read_metrics(self) -> list[dict[str, Any]]:
        """All logged outer steps. A last line that was cut off in the middle is left out.

        Raises:
            UsageError: if another line is no JSON object.
        """
        if not self.metrics.is_file():
            return []
        with reading(self.metrics):
            lines = self.metrics.read_bytes().split(b"\n")
        return [self._metrics_line(line, number) for number, line in enumerate(lines[:-1], 1)]

    def metrics_size(self, lines: int) -> int:
        """Bytes of the first so many lines of `metrics.jsonl`, or of all where there are fewer."""
        if not self.metrics.is_file():
            return 0
        with reading(self.metrics), self.metrics.open("rb") as file:
            return sum(len(line) for line, _ in zip(file, range(lines), strict=False))

    def rewind_metrics(self, size: int) -> tuple[int, float]:
        """Cut `metrics.jsonl` back to its first `size` bytes.

        Returns:
            How many outer steps that takes away, and the seconds that they took.
        """
        if not self.metrics.exists():
            return 0, 0.0
        with writing(self.metrics), self.metrics.open("r+b") as file:
            file.seek(size)
            lines = file.read().split(b"\n")[:-1]
            file.truncate(size)
        seconds = 0.0
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
                seconds += max(0.0, min(float(json.loads(line)["seconds"]), 1e9))
        return len(lines), seconds

    def _metrics_line(self, line: bytes, number: int) -> dict[str, Any]:
        """One line of `metrics.jsonl`."""
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise UsageError(f"{self.metrics}, line {number}: no JSON object.", "The file is damaged there.")
        return data


def resolve_paths(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Settings with relative paths made absolute against the folder of their settings file: that of the image, and those
    of prompts and held-out text where there is such a file or folder."""
    metric, prompts = data.get("metric"), data.get("prompts")
    if isinstance(metric, dict) and isinstance(metric.get("image"), str) and metric["image"]:
        with contextlib.suppress(ValueError, OSError):  # no possible path: whatever opens it will say so
            data = {**data, "metric": {**metric, "image": str((base / metric["image"]).resolve())}}
    if isinstance(metric, dict) and isinstance(metric.get("file"), str) and metric["file"] not in ("", *OWN_TEXTS):
        with contextlib.suppress(ValueError, OSError):
            data = {**data, "metric": {**metric, "file": absolute(metric["file"], base)}}
    if isinstance(prompts, dict) and isinstance(prompts.get("source"), str) and prompts["source"] not in OWN_PROMPTS:
        with contextlib.suppress(ValueError, OSError):
            data = {**data, "prompts": {**prompts, "source": absolute(prompts["source"], base)}}
    return data
