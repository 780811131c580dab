"""What a run folder says of itself, read without trust: plain data, nothing unpickled, nothing of the folder executed."""

from __future__ import annotations

import base64
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError
from dpg_cli.report.samples import Sample, read_sample
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.verdict import SavedVerdict, read_json, read_verdict
from dpg_cli.settings.config import load_toml

LARGEST_PICTURE = 8_000_000  # bytes; it becomes a third larger in the page
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A picture of the run.

    Attributes:
        source: data URI.
        alt: what it shows, for who cannot see it.
        caption: the line below it.
    """

    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Facts:
    """Everything the page tells.

    Attributes:
        name: of the run folder.
        path: of the run folder, as given.
        task: of the run.
        effect: what its data is for, in words; may be empty.
        settings: parsed `config.toml`.
        settings_text: the same file as it is.
        info: `run.json`; empty where there is none.
        command: the command line that made the run; may be empty.
        rows: the lines of `metrics.jsonl`.
        verdict: of `dpg verify`, or None.
        pictures: of the run.
        sample: of its dataset, or None.
    """

    name: str
    path: str
    task: str
    effect: str
    settings: dict[str, Any]
    settings_text: str
    info: dict[str, Any]
    command: str
    rows: list[dict[str, Any]]
    verdict: SavedVerdict | None
    pictures: list[Picture]
    sample: Sample | None

    @property
    def finished(self) -> bool:
        """Whether the run reached its end."""
        return self.info.get("finished") is True

    def setting(self, key: str, default: Any = "") -> Any:
        """A setting by its dotted key."""
        value: Any = self.settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def gather(folder: RunFolder) -> Facts:
    """Read a run folder.

    Raises:
        UsageError: if one of its files is damaged.
    """
    settings = load_toml(folder.config)
    info = read_json(folder.info) if folder.info.is_file() else {}
    task = str(settings.get("task", "run"))
    effect = str(info.get("effect", ""))
    return Facts(
        name=folder.path.resolve().name,
        path=str(folder.path),
        task=task,
        effect=effect,
        settings=settings,
        settings_text=folder.config.read_text(encoding="utf-8"),
        info=info,
        command=command_line(info.get("command")),
        rows=read_rows(folder.metrics),
        verdict=read_verdict(folder),
        pictures=pictures(folder, effect or task),
        sample=read_sample(folder),
    )


def command_line(arguments: Any) -> str:
    """A command line that a shell takes, from its arguments; empty where none were kept."""
    if not isinstance(arguments, list) or not arguments:
        return ""
    return shlex.join(["dpg", *(str(argument) for argument in arguments[1:])])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`. A last line that a crash cut short is left out.

    Raises:
        UsageError: if another line is no JSON object.
    """
    if not path.is_file():
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line.strip()]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the file.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number < len(lines):
            raise UsageError(f"{path}, line {number}: no JSON object.", "Correct or remove that line.")
    return rows


def pictures(folder: RunFolder, effect: str) -> list[Picture]:
    """The run's PNG pictures as data URIs; what is missing, too large or no PNG is left out."""
    found = []
    for path, alt, caption in (
        (folder.pattern, f"The pattern that was asked for: {effect}", "Asked for"),
        (
            folder.image,
            f"The LM head of the target before fine-tuning, after it, and the change. Aim: {effect}",
            "What fine-tuning on the dataset did to the target's LM head (by the engine that made the data)",
        ),
    ):
        if path.is_file() and path.stat().st_size <= LARGEST_PICTURE:
            data = path.read_bytes()
            if data.startswith(_PNG):
                source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
                found.append(Picture(source, alt, caption))
    return found
