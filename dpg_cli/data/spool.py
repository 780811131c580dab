"""Pipes and compressed files, made into ordinary files: whatever reads rows may then seek.

A pipe (process substitution, `/dev/stdin`) can be read once; its content is kept until the process ends, so that DATA and
--prompts may name the same one.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from dpg_cli.errors import UsageError

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_KNOWN: dict[tuple[int, ...], Path] = {}


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="dpg-")


def local(path: Path) -> tuple[Path, str]:
    """A file that can be read again and again, and what its name ends in.

    Args:
        path: a file, a compressed file or a pipe.

    Returns:
        The file itself, or a copy of its content; and the suffix (lower case) that tells its format, without that of the
        compression; empty for a pipe.

    Raises:
        UsageError: if a compressed file is damaged.
        OSError: if it cannot be read.
    """
    status = path.stat()
    suffix = path.suffix.lower()
    key: tuple[int, ...] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if not path.is_file():
        suffix, key = "", (status.st_dev, status.st_ino)
        if key not in _KNOWN:
            _KNOWN[key] = _copied(path, path.open("rb"))
        path, key = _KNOWN[key], (*key, 0)
    kind = COMPRESSED.get(suffix)
    if not suffix:
        with path.open("rb") as file:
            begin = file.read(4)
        kind = next((name for magic, name in MAGIC.items() if begin.startswith(magic)), None)
    if kind is None:
        return path, suffix
    if key not in _KNOWN:
        _KNOWN[key] = _copied(path, pa.input_stream(str(path), compression=kind))
    return _KNOWN[key], Path(path.stem).suffix.lower() if suffix else ""


def _copied(path: Path, stream: BinaryIO) -> Path:
    """A copy of what a stream holds.

    Raises:
        UsageError: if it cannot be read to its end.
    """
    copy = Path(_folder().name) / str(len(_KNOWN))
    try:
        with stream, copy.open("wb") as file:
            shutil.copyfileobj(stream, file, 1 << 20)
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read to its end: {reason}.", "Copy or make it again.") from None
    return copy
