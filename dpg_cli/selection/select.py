"""`dpg select` without its display: scores -> choice -> the user's data without the rest, and the record of it."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.attribution.key import file_sum
from dpg_cli.attribution.reading import Table, read_scores
from dpg_cli.attribution.scores import record_of
from dpg_cli.data.formats.base import Rows
from dpg_cli.data.sources import files_of, open_rows
from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted
from dpg_cli.runs.files import write_json
from dpg_cli.selection.choice import Choice, Wish, choose
from dpg_cli.selection.raw import Cut, check_ending, rewrite


@dataclass(frozen=True)
class Selection:
    """What was selected.

    Attributes:
        choice: the rows.
        out: where they are.
        kept, rows: how many stay, of how many.
        source: whose they are.
    """

    choice: Choice
    out: Path
    kept: int
    rows: int
    source: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "data": str(self.out),
            "source": self.source,
            "kept": self.kept,
            "rows": self.rows,
            "query": self.choice.query.name,
            "predicted": self.choice.predicted,
            "dropped": list(self.choice.dropped),
        }


def place_of(record: Path) -> Path:
    """Where the record of a selection lies."""
    return record.with_name(f"{record.name}.selection.json")


def select(scores: Path, wish: Wish, *, data: str = "", out: Path | None = None, overwrite: bool = False) -> Selection:
    """Write the data without what is not wanted.

    Args:
        scores: what `dpg attribute` wrote.
        wish: what stays.
        data: the rows, where they are not where the record says.
        out: where they go, in the format of the data; by default its name with `-selected`, in the working folder.
        overwrite: whether an earlier selection may be replaced.

    Raises:
        UsageError: if the scores or the data cannot be read, do not belong together, or `out` does not fit.
    """
    table = read_scores(scores)
    choice = choose(table, wish)
    source = data or source_of(table)
    rows = open_rows(source, split="train", what="examples", flag="--data")
    require_same(table, source, rows)
    place = out or default_place(source)
    check_ending(source, rows, place)
    check_place(place, source, scores, overwrite)
    gone = set(choice.dropped)
    scored = set(table.ids_N.tolist())
    cut = Cut(lambda row: row not in gone and (row in scored or not choice.only), choice.weights)
    kept = rewrite(source, rows, place, cut)
    found = Selection(choice, place, kept, len(rows), source)
    made = {
        **found.as_dict(),
        "scores": str(scores),
        "scores_record": table.record,
        "weighed": choice.weights is not None,
        "folder": _way_back(place),
    }
    write_json(place_of(place), made)
    return found


def _way_back(place: Path) -> str:
    """From where the selection lies to the working folder, which relative paths of the record are read from."""
    try:
        return os.path.relpath(Path.cwd(), place.absolute().parent)
    except (OSError, ValueError):  # another drive
        return ""


def source_of(table: Table) -> str:
    """The data of some scores.

    Raises:
        UsageError: if the record does not say, or it is gone or was a pipe.
    """
    data = table.record.get("request")
    source = data.get("data", "") if isinstance(data, dict) else ""
    if not source or not isinstance(source, str):
        raise UsageError(f"{record_of(table.path)} does not say whose scores they are.", "Name it: --data FILE")
    if not files_of(source) or not (files_of(source)[0].is_file() or files_of(source)[0].is_dir()):
        raise UsageError(f"The data {source} is not there.", "Name it: --data FILE")
    return source


def require_same(table: Table, source: str, rows: Rows) -> None:
    """Refuse data that is not what the scores are of.

    Raises:
        UsageError: if its content has changed, or it is too short.
    """
    known = table.record.get("data_sha256")
    files = files_of(source)
    changed = isinstance(known, str) and known and files and file_sum(files[0]) not in ("", known)
    if changed or int(table.ids_N.max()) >= len(rows):
        raise UsageError(f"{source} has changed since {table.path} was made.", "Run `dpg attribute` again.")


def default_place(source: str) -> Path:
    """The data's name with `-selected`, in the working folder."""
    name = files_of(source)[0].name if files_of(source) else Path(source).name
    stem, dot, endings = name.partition(".")
    return Path(f"{stem}-selected{dot}{endings}")


def check_place(out: Path, source: str, scores: Path, overwrite: bool) -> None:
    """Refuse a place that holds something.

    Raises:
        UsageError: if it is the data or the scores, lies in a folder of them, or exists.
    """
    for place in (out, place_of(out)):
        for read in (*files_of(source), scores, record_of(scores)):
            if place.exists() and read.exists() and place.samefile(read):
                raise UsageError(f"--out {out} would write onto {read}, which is read.", "Name another place.")
        if (place.exists() or place.is_symlink()) and not overwrite:
            raise UsageError(
                f"{place} exists already.", f"--out {pasted(out.with_stem(out.stem + '-2'))}, or --overwrite."
            )
    if not out.parent.is_dir():
        raise UsageError(f"There is no folder {out.parent}.", "Make it, or name another place.")


def read_selection(path: Path) -> dict[str, Any] | None:
    """The record of a selection; None where a file or folder is none.

    Raises:
        UsageError: if the record is damaged.
    """
    place = place_of(path)
    if not place.is_file():
        return None
    try:
        made = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{place} cannot be read: {error}.", "Run `dpg select` again.") from None
    if not isinstance(made, dict) or not isinstance(made.get("scores_record"), dict):
        raise UsageError(f"{place} is no record of a selection.", "Run `dpg select` again.")
    return made


def home_of(path: Path) -> Path:
    """The folder that relative paths of a selection's record are read from: this one, or if its data is not here, where it was made."""
    made = read_selection(path) or {}
    back, source = made.get("folder"), made.get("source")
    here = Path.cwd()
    if not isinstance(back, str) or not back or not isinstance(source, str):
        return here
    there = path.absolute().parent / back
    if any(file.exists() for file in files_of(source)) or not there.is_dir():
        return here
    with contextlib.chdir(there):
        return there if any(file.exists() for file in files_of(source)) else here


def keep_verdict(path: Path, verdict: dict[str, Any]) -> None:
    """Write what retraining said into the record of a selection, for the page of its scores."""
    made = read_selection(path)
    assert made is not None
    write_json(place_of(path), {**made, "verdict": verdict})
