"""The table of source formats: each is one module that turns a local file into `Rows`, and one line of `FORMATS`.

Not here: what a row means (`data/shapes.py`), and how a source is named (`data/sources.py`).
"""

from __future__ import annotations

from pathlib import Path

from dpg_cli.data.formats.base import Format, Rows
from dpg_cli.data.formats.json_rows import JSON
from dpg_cli.data.formats.lines import LINES
from dpg_cli.data.formats.parquet import PARQUET
from dpg_cli.data.formats.table import CSV, TSV

FORMATS: tuple[Format, ...] = (LINES, JSON, CSV, TSV, PARQUET)
SUFFIXES = tuple(suffix for known in FORMATS for suffix in known.suffixes)


def open_file(path: Path, suffix: str, name: str) -> Rows:
    """The rows of a local, seekable, uncompressed file.

    Args:
        path: the file.
        suffix: what its name ends in, lower case, with the dot; an unknown one (or none) is decided by the content.
        name: how the user named it, for messages.

    Raises:
        UsageError: in one line, for what is no file of its format.
        OSError: if it cannot be read.
    """
    told = (known for known in FORMATS if suffix in known.suffixes)
    sniffed = (known for known in FORMATS if known.sniff is not None and known.sniff(path))
    return next(told, next(sniffed, LINES)).open(path, name)
