"""Sources that a user names: files, `datasets` folders and hub datasets, opened as rows that are addressed by number.

A source is written PATH or OWNER/NAME, then, as far as needed, `@CONFIG` (hub datasets), `#SPLIT` and `:COLUMN`:

    articles.txt                                  a text a line
    articles.jsonl:question                       a JSON object a line, or (.json) an array of objects
    articles.csv.gz:text                          CSV, TSV; any file may be compressed (.gz, .zst), or a pipe
    articles.parquet:text
    articles/#train                               what `Dataset.save_to_disk` wrote, or a folder of data files
    wikimedia/wikipedia@20231101.en#train:text    a dataset of the hub

docs/data.md lists what rows may look like; `shapes` reads them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dpg_cli.data.formats import FORMATS, SUFFIXES, open_file
from dpg_cli.data.formats.base import Head, ListedRows, Row, Rows
from dpg_cli.data.spool import COMPRESSED, local
from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted
from dpg_cli.models.hub import first_line, offline_note, require, unreachable

STDIN = "-"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A source taken apart: `path` is a local path or a hub name; the rest is empty where not given."""

    path: str
    config: str = ""
    split: str = ""
    column: str = ""

    @property
    def place(self) -> Path:
        """The local path."""
        return Path("/dev/stdin") if self.path == STDIN else Path(self.path).expanduser()


def parse(source: str) -> Source:
    """Take a source apart; whatever exists as a path is a path, however it is spelt."""
    rest, parts = source, {"column": "", "split": "", "config": ""}
    for name, sign in (("column", ":"), ("split", "#"), ("config", "@")):
        if Path(rest).expanduser().exists():
            break
        head, found, tail = rest.rpartition(sign)
        if found and head and tail and "/" not in tail and "\\" not in tail:
            rest, parts[name] = head, tail
    return Source(rest, **parts)


def absolute(source: str, base: Path | None = None) -> str:
    """The source with a local relative path that exists made absolute against `base`; any other source as it is."""
    name = parse(source).path
    path = (base or Path()) / Path(name).expanduser()
    ordinary = bool(name) and (path.is_file() or path.is_dir())  # a pipe has no other name
    return str(path.resolve()) + source[len(name) :] if ordinary else source


def files_of(source: str) -> list[Path]:
    """The local file or folder that a source names, also where a name is `FILE.py:Name`; none for any other."""
    try:
        path = parse(source).place
        return [path] if source and path.exists() else []
    except (OSError, ValueError):
        return []


def open_rows(source: str, *, split: str, what: str, flag: str, limit: int = 0) -> Rows:
    """Open a source.

    Args:
        source: see the module.
        split: of a dataset with several splits whose source names none.
        what: what the rows are, for messages, such as "prompts".
        flag: the flag that names them.
        limit: only the first so many rows; 0 takes all. A hub dataset is then streamed, not downloaded whole.

    Raises:
        UsageError: in one line, for whatever cannot be read or holds no row.
    """
    parsed = parse(source)
    path = parsed.place
    try:
        if path.is_dir():
            rows = _folder(path, parsed, split)
        elif path.exists() or _named_as_file(parsed.path):
            rows = open_file(*local(path), parsed.path)
        else:
            rows = _hub(parsed, split, limit)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        endings = ", ".join(known.suffixes[0] for known in FORMATS)
        remedy = f"Give {flag} a file ({endings}), a datasets folder, or OWNER/NAME of a hub dataset."
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"The {what} {source} cannot be read: {reason}.", remedy) from None
    if parsed.column and not rows.named:
        raise UsageError(
            f"{source} asks for the column {parsed.column!r}, and {rows.kind} have no columns.",
            "Leave it out, or give a file whose format has columns.",
        )
    if not len(rows):
        raise UsageError(f"The {what} {source} are empty.", "Give at least one row.")
    return Head(rows, limit) if limit and len(rows) > limit else rows


def _named_as_file(name: str) -> bool:
    """Whether a name that nothing has is meant as a file, not as a hub dataset."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes[-2:]]
    suffixes = suffixes[:-1] if suffixes and suffixes[-1] in COMPRESSED else suffixes[-1:]
    return any(suffix in SUFFIXES for suffix in suffixes) or not _HUB.fullmatch(name)


def _datasets() -> Any:
    datasets = require("datasets", "datasets", "A datasets folder or hub dataset")
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


class DatasetRows(Rows):
    """A map-style dataset of the `datasets` library, which keeps it on disk.

    Args:
        rows: the dataset.
        name: of the source.
    """

    def __init__(self, rows: Any, name: str) -> None:
        self.whole, self.rows = rows, rows
        self.name, self.kind, self.columns = name, "a dataset", tuple(rows.column_names)

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, columns: Sequence[str]) -> None:
        """See `Rows`."""
        self.rows = self.whole.select_columns([name for name in self.columns if name in columns])

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        columns = self.rows[list(places)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _folder(path: Path, source: Source, split: str) -> Rows:
    """A folder of `save_to_disk`, or one of plain data files."""
    datasets = _datasets()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        rows = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the library raises many kinds for folders that are none of its own
        raise UsageError(
            f"{path} is no datasets folder: {first_line(error)}.", "Name what save_to_disk wrote."
        ) from None
    if not isinstance(rows, dict):
        if source.split:
            raise UsageError(f"{path} has no splits; {source.split!r} is asked for.", "Leave it out.")
        return DatasetRows(rows, str(path))
    wanted = source.split or (split if split in rows else next(iter(rows)) if len(rows) == 1 else "")
    if wanted not in rows:
        cause = f"has no split {source.split!r}" if source.split else "has several splits"
        raise UsageError(
            f"{path} {cause}; there are {', '.join(rows)}.", f"Name one: {pasted(f'{path}#{next(iter(rows))}')}"
        )
    return DatasetRows(rows[wanted], f"{path}#{wanted}")


def _hub(source: Source, split: str, limit: int) -> Rows:
    """A dataset of the hub; with a limit it is streamed, and only so many rows are read."""
    datasets = _datasets()
    source = replace(source, split=source.split or split)
    try:
        rows = datasets.load_dataset(source.path, source.config or None, split=source.split, streaming=limit > 0)
        name = f"{source.path}#{source.split}"
        return ListedRows(list(islice(rows, limit)), name, "a dataset") if limit else DatasetRows(rows, name)
    except UsageError:
        raise
    except Exception as error:  # connection, permission, unknown name, config or split: each a class of its own
        if unreachable(error):
            raise UsageError(
                f"The dataset {source.path!r} is not on this machine, and the hub cannot be reached{offline_note()}.",
                "Name a local file or folder, or run where the hub can be reached.",
            ) from None
        raise UsageError(
            f"The dataset {source.path!r} cannot be loaded: {first_line(error)}.", "Check its name."
        ) from None
