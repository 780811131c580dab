"""How far a run is and what it measured, read from its files as they are: nothing in them is believed or executed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError
from dpg_cli.runs.folder import RunFolder, command
from dpg_cli.settings.config import Config

LARGEST_JSON = 64 * 2**20  # bytes; tokenisers reach some ten million
LONGEST_LINE = 2**20
DEEPEST = 50  # levels of nesting


@dataclass(frozen=True)
class Status:
    """What `run.json` and the log say.

    Attributes:
        info: `run.json`; empty where there is none.
        finished: whether the run came to its end.
        steps_done: outer steps in the log.
        measures: of a target trained on the final dataset.
        control: the same for the untrained generator's data.
        verification: what `dpg verify` left in `verify.json`, or None.
        verified: its verdict; None where it was not asked, or was asked of another dataset than the one that is there.
    """

    info: dict[str, Any]
    finished: bool
    steps_done: int
    measures: dict[str, float] = field(default_factory=dict)
    control: dict[str, float] | None = None
    verification: dict[str, Any] | None = None
    verified: bool | None = None

    @property
    def effect(self) -> str:
        """What the metric said that it is for; empty where that was not written down."""
        effect = self.info.get("effect")
        return effect if isinstance(effect, str) else ""

    def number(self, key: str) -> float | None:
        """A number of `run.json`."""
        return (_numbers(self.info) or {}).get(key)


def read_status(folder: RunFolder) -> Status:
    """Read `run.json`, the log's length and `verify.json`.

    Raises:
        UsageError: if one of them is damaged.
    """
    info = read_json(folder.info) if folder.info.is_file() else {}
    place = folder.path / "verify.json"
    verification = read_json(place) if place.is_file() else None
    return Status(
        info=info,
        finished=info.get("finished") is True,
        steps_done=_count_lines(folder.metrics),
        measures=_numbers(info.get("measures")) or {},
        control=_numbers(info.get("control")),
        verification=verification,
        verified=None if verification is None else _verdict(folder, verification),
    )


def _count_lines(path: Path) -> int:
    """Whole lines of a log, unread."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def _verdict(folder: RunFolder, verification: dict[str, Any]) -> bool | None:
    """The verdict, if it is of the dataset that is there now (`dataset_sha256`: of train.parquet, then control.parquet)."""
    verdict = verification.get("verified")
    digest = hashlib.sha256()
    for name in ("train.parquet", "control.parquet"):
        path = folder.dataset / name
        if path.is_file():
            with path.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    current = verification.get("dataset_sha256", digest.hexdigest()) == digest.hexdigest()
    return verdict if isinstance(verdict, bool) and current else None


def require_finished(folder: RunFolder, config: Config, status: Status) -> None:
    """Refuse a run that has not come to its end.

    Raises:
        UsageError: saying how far it is.
    """
    if not status.finished:
        raise UsageError(
            f"{folder.path} is not finished: {status.steps_done} of {config.steps} outer steps are done.",
            f"Finish it first: {command('resume', folder.path, config.metric_file)}",
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: if it is missing, too large, or no JSON object.
    """
    try:
        if not path.is_file():
            raise UsageError(f"{path} is missing or no ordinary file.", "Check the path.")
        if path.stat().st_size > LARGEST_JSON:
            raise UsageError(f"{path} is larger than {LARGEST_JSON >> 20} MB.", "It is no file of dpg or transformers.")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is no valid JSON.", "The file is damaged; take it from a copy.") from None
    if not isinstance(data, dict) or _is_deep(data):
        raise UsageError(f"{path} holds no JSON object, or one nested too deeply.", "Take it from a copy.")
    return data


def _is_deep(data: Any) -> bool:
    """Whether lists and objects are nested more than `DEEPEST` levels: what goes through them by recursion would fail."""
    level = [data]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict | list):
                inner.extend(value.values() if isinstance(value, dict) else value)
        level = inner
        if not level:
            return False
    return True


def log_lines(path: Path) -> Iterator[dict[str, float]]:
    """The outer steps of a `metrics.jsonl`, one dict of numbers each, in bounded memory.

    A last line that was cut off in the middle (a killed run) is left out. Values that are no numbers are left out.

    Raises:
        UsageError: if another line is no JSON object.
    """
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE):
                number += 1
                if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                    return
                yield _log_line(path, line, number)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None


def _log_line(path: Path, line: bytes, number: int) -> dict[str, float]:
    """One line of the log."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UsageError(
            f"{path}, line {number}: no JSON object.", "The file is damaged there; mend or remove that line."
        )
    return _numbers(data) or {}


def _numbers(data: object) -> dict[str, float] | None:
    """The entries of a mapping that are numbers; None if it is none."""
    if not isinstance(data, dict):
        return None
    kept = {k: v for k, v in data.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {
        k: v if isinstance(v, float) or abs(v) < 2**53 else math.inf * (1 if v > 0 else -1) for k, v in kept.items()
    }


def finite_or_none(value: Any) -> Any:
    """Nested data with None in the place of numbers that JSON does not know."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    return [finite_or_none(item) for item in value] if isinstance(value, list | tuple) else value
