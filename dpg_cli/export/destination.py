"""Where an export goes: never into the run, never over what dpg did not write, whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dpg_cli.artefacts.card import CARD_MARK
from dpg_cli.errors import UsageError
from dpg_cli.runs.files import replacing, writing
from dpg_cli.runs.folder import RunFolder

WRITTEN = (".md", ".jsonl", ".parquet", ".json", ".arrow", ".safetensors", ".txt", ".model", ".jinja")
PARTS = ("train", "test")  # folders of an export in the `datasets` format


def check_out(out: Path, run: RunFolder, overwrite: bool, *, as_folder: bool) -> None:
    """Refuse a place that must not be written to.

    Args:
        out: the place.
        run: what is exported.
        overwrite: whether something may be there already.
        as_folder: whether a folder is to be written, else a file.

    Raises:
        UsageError: naming the reason.
    """
    try:
        place, home = out.resolve(), run.path.resolve()
        if place.is_relative_to(home):
            raise UsageError(f"{out} lies inside the run.", "Give an --out outside of it.")
        if home.is_relative_to(place):
            raise UsageError(f"{out} holds the run.", "Give another --out.")
        if not (out.exists() or out.is_symlink()):
            return
        if not overwrite:
            raise UsageError(f"{out} exists already.", "Give another --out, or add --overwrite.")
        if out.is_symlink() or not (out.is_dir() or out.is_file()):
            raise UsageError(f"{out} is a link or no ordinary file.", "Give another --out.")
        if out.is_dir() != as_folder:
            here, wanted = ("a folder", "a file") if out.is_dir() else ("a file", "a folder")
            raise UsageError(f"{out} is {here}, and {wanted} is to be written.", "Give another --out.")
        if as_folder and any(out.iterdir()) and not _ours(out):
            raise UsageError(f"{out} holds other things than an export of dpg.", "Give another --out, or empty it.")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{out} cannot be used: {reason}.", "Give another --out.") from None


@contextlib.contextmanager
def into(out: Path) -> Iterator[Path]:
    """A temporary place that becomes `out` when the block succeeds; on any error nothing is left.

    Raises:
        UsageError: if it cannot be written there.
    """
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        yield temporary


def _ours(folder: Path) -> bool:
    """Whether a folder holds an export and nothing else."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > 1_000_000:
        return False
    known = all(
        entry.name in PARTS if entry.is_dir() else entry.is_file() and entry.suffix in WRITTEN
        for entry in folder.iterdir()
    )
    return known and CARD_MARK in card.read_text(encoding="utf-8", errors="replace")
