"""Writing files and folders whole or not at all, so that they survive a kill, a power cut and a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")  # what `replacing` leaves behind when the process is killed


class WriteError(UsageError):
    """A file that cannot be written."""


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for a file or a folder, that takes its place when the block succeeds.

    What stands there has reached the disk. Files get the permissions of ordinary new files.

    Raises:
        WriteError: if it cannot be written, for example on a full disk; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            settle(temporary)
            _take_place(temporary, path)
            sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _take_place(temporary: Path, path: Path) -> None:
    """Rename; a folder that stands there steps aside first and goes when the new one stands."""
    if not path.is_dir() or path.is_symlink():
        temporary.replace(path)
        return
    old = path.with_name(f".{path.name}.old.{os.getpid()}.tmp")
    path.replace(old)
    try:
        temporary.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be written.

    Raises:
        WriteError: for an error of the operating system, also where a library wraps it.
    """
    try:
        yield
    except Exception as error:
        reason = os_reason(error)
        if reason is None:
            raise
        remedy = "Check the folder and its permissions."
        if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "space" in reason:
            remedy = "Make room on that disk."
        raise WriteError(f"{path} cannot be written: {reason}.", remedy) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line that `path` cannot be read.

    Raises:
        UsageError: for an error of the operating system.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {os_reason(error)}.", "Check the path.") from error


def os_reason(error: Exception) -> str | None:
    """What the operating system said, or None if the error is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error) or type(error).__name__
    # safetensors and tokenizers raise errors of their own that only quote the system's
    found = re.search(r"([^:]*) \(os error \d+\)", str(error))
    return found[1].strip() if found else None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While this process writes into a folder, no other does. The lock ends with the process, however it ends.

    Raises:
        UsageError: if another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with reading(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"Another process is at work in {folder}.", "Wait for it, or give another folder."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def settle(path: Path) -> None:
    """Bring a file, or a folder and what is in it, to the disk, with the permissions of ordinary new files."""
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    for entry in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if entry.is_file():
            entry.chmod(0o666 & ~mask)
        sync(entry)


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries have reached the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a system that opens no folders
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # what cannot be synced is no failure
            raise
    finally:
        os.close(handle)
