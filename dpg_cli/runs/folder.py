"""The run folder: where each artefact lies, and atomic writing. DESIGN §6 lists what a finished folder holds."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpg_cli.config import Config, PatternOptions, load_toml, to_toml, validate
from dpg_cli.errors import UsageError


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
        self.dataset = path / "dataset"
        self.image = path / "lm_head.png"

    @classmethod
    def free(cls, path: Path) -> RunFolder:
        """A run folder that is yet to be made, at a place that is free for it.

        Raises:
            UsageError: if something is there already.
        """
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
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

    def read_config(self) -> Config:
        """The run's settings; relative paths in them are relative to the folder."""
        return validate(resolve_paths(load_toml(self.config), self.path))

    def write_config(self, config: Config) -> None:
        """Write the settings so that `dpg run --config` repeats the run, wherever the folder is moved."""
        if isinstance(config.metric, PatternOptions) and config.metric.image:
            config = config.model_copy(update={"metric": config.metric.model_copy(update={"image": self.pattern.name})})
        write_text(self.config, to_toml(config))

    def append_metrics(self, numbers: dict[str, float]) -> None:
        """Add one outer step to `metrics.jsonl`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")

    def read_metrics(self) -> list[dict[str, float]]:
        """All logged outer steps."""
        if not self.metrics.is_file():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]


def resolve_paths(data: dict[str, Any], base: Path) -> dict[str, Any]:
    """Settings with the relative path of the image made absolute against the folder of its settings file."""
    metric = data.get("metric")
    if isinstance(metric, dict) and isinstance(metric.get("image"), str) and metric["image"]:
        data = {**data, "metric": {**metric, "image": str((base / metric["image"]).resolve())}}
    return data


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder, that takes its place when the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


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
