"""A source format, as an example of how one is added (CONTRIBUTING): ASCII-separated values.

The separators that ASCII has had for tables since 1963: 0x1F between the values of a row, 0x1E after each row. The first
row names the columns. Values may hold anything else, line ends too.
"""

from __future__ import annotations

from pathlib import Path

from dpg_cli.data.formats.base import Format, ListedRows, Rows, decoded
from dpg_cli.errors import UsageError

UNIT, RECORD = "\x1f", "\x1e"


def open_asv(path: Path, name: str) -> Rows:
    """The rows of a file, in memory.

    Raises:
        UsageError: for what is not UTF-8, has no row of names, or a row of another length.
    """
    text = decoded(path.read_bytes(), name, 1)
    records = [record.split(UNIT) for record in text.removesuffix(RECORD).split(RECORD)]
    columns = records[0]
    if not all(columns) or len(set(columns)) < len(columns):
        raise UsageError(f"{name} does not begin with a row of column names.", "Put one before the first row.")
    for number, record in enumerate(records[1:]):
        if len(record) != len(columns):
            raise UsageError(
                f"{name}, row {number}: {len(record)} values for {len(columns)} columns.",
                "Correct or leave out that row.",
            )
    rows = [dict(zip(columns, record, strict=True)) for record in records[1:]]
    return ListedRows(rows, name, "ASCII-separated values", columns)


ASV = Format("ASCII-separated values", (".asv",), open_asv)
