"""Texts that a user names: files, `datasets` folders and hub datasets, read lazily and addressed by number.

A source is written PATH or OWNER/NAME, then, as far as needed, `@CONFIG` (hub datasets), `#SPLIT` and `:COLUMN`:

    articles.txt                                  a text a line; blank lines are left out
    articles.jsonl:question                       a JSON object a line
    articles.parquet:text
    articles/                                     what `Dataset.save_to_disk` wrote, or a folder of data files
    wikimedia/wikipedia@20231101.en#train:text    a dataset of the hub
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpg_cli.data.texts import (
    DatasetTexts,
    LineTexts,
    ListedTexts,
    ParquetTexts,
    Part,
    Texts,
    choose_column,
    require_texts,
)
from dpg_cli.errors import UsageError
from dpg_cli.models.hub import first_line, offline_note, require, unreachable

JSON_LINES, PARQUET = (".jsonl", ".ndjson", ".json"), (".parquet",)
_FILES = (*JSON_LINES, *PARQUET, ".txt", ".text", ".md", ".csv", ".tsv")
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A source taken apart: `path` is a local path or a hub name; the rest is empty where not given."""

    path: str
    config: str = ""
    split: str = ""
    column: str = ""


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
    local = parse(source).path
    path = (base or Path()) / Path(local).expanduser()
    return str(path.resolve()) + source[len(local) :] if local and path.exists() else source


def open_texts(source: str, keys: Sequence[str], *, split: str, what: str, flag: str, limit: int = 0) -> Texts:
    """Open a source.

    Args:
        source: see the module.
        keys: columns to look for where the source names none.
        split: of a dataset whose source names none.
        what: what the texts are, for messages, such as "prompts".
        flag: the flag that names them.
        limit: only the first so many texts; 0 takes all. A hub dataset is then streamed, not downloaded whole.

    Raises:
        UsageError: in one line, for whatever cannot be read or holds no text.
    """
    parsed = parse(source)
    keys = [parsed.column] if parsed.column else keys
    path = Path(parsed.path).expanduser()
    try:
        if path.is_dir():
            texts: Texts = _dataset_folder(path, parsed, keys, split)
        elif path.suffix in PARQUET and path.exists():
            texts = ParquetTexts(path, keys)
        elif path.exists() or path.suffix in _FILES or not _HUB.fullmatch(parsed.path):
            texts = LineTexts(path, keys if path.suffix in JSON_LINES else ())
        else:
            texts = _hub_dataset(parsed, keys, split, limit)
    except OSError as error:
        remedy = f"Give {flag} a text, JSONL or parquet file, a datasets folder, or OWNER/NAME of a hub dataset."
        raise UsageError(f"The {what} {source} cannot be read: {error.strerror or error}.", remedy) from None
    if limit and len(texts) > limit:
        texts = Part(texts, 0, limit)
    if not len(texts):
        raise UsageError(f"The {what} {source} are empty.", "Give at least one.")
    return texts


def _datasets() -> Any:
    datasets = require("datasets", "datasets", "A datasets folder or hub dataset")
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets


def _dataset_folder(path: Path, source: Source, keys: Sequence[str], split: str) -> Texts:
    """A folder of `save_to_disk`, or one of plain data files."""
    datasets = _datasets()
    saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        rows = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # the library raises many kinds for folders that are none of its own
        raise UsageError(
            f"{path} is no datasets folder: {first_line(error)}.", "Name what save_to_disk wrote."
        ) from None
    if isinstance(rows, dict):
        wanted = source.split or (split if split in rows else next(iter(rows)))
        if wanted not in rows:
            raise UsageError(f"{path} has no split {wanted!r}; it has {', '.join(rows)}.", f"Name one: {path}#SPLIT.")
        rows = rows[wanted]
    return DatasetTexts(rows, str(path), keys)


def _hub_dataset(source: Source, keys: Sequence[str], split: str, limit: int) -> Texts:
    """A dataset of the hub; with a limit it is streamed, and only so many rows are read."""
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(
            source.path, source.config or None, split=source.split or split, streaming=limit > 0
        )
        if not limit:
            return DatasetTexts(rows, source.path, keys)
        head = list(islice(rows, limit))
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
    column = choose_column(source.path, keys, list(head[0]) if head else [])
    return ListedTexts(require_texts([row[column] for row in head], source.path, column))
