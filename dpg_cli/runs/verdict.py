"""The verdict of `dpg verify`, kept beside the run as `verify.json`, with the fingerprint of the dataset it speaks of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from dpg_cli.errors import UsageError
from dpg_cli.runs.folder import RunFolder, write_json

LARGEST_JSON = 20_000_000  # bytes; a larger JSON file in a run folder is none of ours


class Verdict(Protocol):
    """What `evidence/verify.py` comes to, as far as it is kept."""

    @property
    def verified(self) -> bool:
        """Whether the data shows the effect and the control does not."""
        ...

    @property
    def reason(self) -> str:
        """Why not."""
        ...

    def lines(self) -> list[str]:
        """For people."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Everything that was measured."""
        ...


@dataclass(frozen=True)
class SavedVerdict:
    """What `verify.json` holds.

    Attributes:
        verified: whether the data shows the effect and the control does not.
        reason: why not; empty where it does.
        lines: the verdict for people.
        when: time of the verification, ISO 8601, UTC.
        current: whether the run's dataset is still the one that was verified.
        details: everything that was measured.
    """

    verified: bool
    reason: str
    lines: list[str]
    when: str
    current: bool
    details: dict[str, Any]


def path_of(folder: RunFolder) -> Path:
    """Where the verdict on a run lies."""
    return folder.path / "verify.json"


def save_verdict(folder: RunFolder, verdict: Verdict) -> Path:
    """Write `verify.json`.

    Raises:
        OSError: if it cannot be written.
    """
    versions = {}
    for package in ("dpg-cli", "torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    path = path_of(folder)
    write_json(
        path,
        {
            "verified": verdict.verified,
            "reason": "" if verdict.verified else verdict.reason,
            "lines": verdict.lines(),
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions,
            "dataset_sha256": dataset_fingerprint(folder),
            "details": verdict.as_dict(),
        },
    )
    return path


def read_verdict(folder: RunFolder) -> SavedVerdict | None:
    """The saved verdict on a run, or None where it was never verified.

    Raises:
        UsageError: if `verify.json` is damaged.
    """
    path = path_of(folder)
    if not path.is_file():
        return None
    data = read_json(path)
    details = data.get("details")
    lines = data.get("lines")
    return SavedVerdict(
        verified=data.get("verified") is True,
        reason=str(data.get("reason", "")),
        lines=[str(line) for line in lines] if isinstance(lines, list) else [],
        when=str(data.get("when", "")),
        current=data.get("dataset_sha256") == dataset_fingerprint(folder),
        details=details if isinstance(details, dict) else {},
    )


def dataset_fingerprint(folder: RunFolder) -> str | None:
    """SHA-256 of the run's dataset and of its control, one after the other; None where there is no dataset."""
    digest = hashlib.sha256()
    for name in ("train.parquet", "control.parquet"):
        path = folder.dataset / name
        if not path.is_file():
            if name == "train.parquet":
                return None
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UsageError: if the file cannot be read, is too large, or is no JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise UsageError(f"{path} is larger than 20 MB.", "It is none that `dpg` wrote; move it away.")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the file.") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {str(error)[:200]}.", "Move it away, or make it anew.") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path} is damaged: it holds no JSON object.", "Move it away, or make it anew.")
    return data
