"""CSV and TSV with a line of column names, through pyarrow. Every value is text, an empty one the empty text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from dpg_cli.data.formats.base import Format, Row, Rows, columns_shown, picked
from dpg_cli.errors import UsageError

BLOCK = 1 << 26  # bytes; a row must fit into one


class TableRows(Rows):
    """Rows of an Arrow table in memory, made into Python values as they are taken."""

    def __init__(self, table: pa.Table, name: str, kind: str) -> None:
        self.table, self.name, self.kind, self.columns = table, name, kind, tuple(table.column_names)

    def __len__(self) -> int:
        return self.table.num_rows

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        return picked(self.table, places)


def open_table(path: Path, name: str, delimiter: str, kind: str) -> Rows:
    """The rows of a CSV or TSV file.

    Raises:
        UsageError: if it is none, is not UTF-8, or names a column twice.
    """
    if not path.stat().st_size:
        return TableRows(pa.table({}), name, kind)
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = csv.ReadOptions(block_size=BLOCK)
    try:
        with csv.open_csv(path, read, parse) as stream:
            names = stream.schema.names
        texts = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        table = csv.read_csv(path, read, parse, texts)
    except pa.ArrowException as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        remedy = "Save it as UTF-8." if "UTF8" in reason else "Correct that row: its first line must name the columns."
        raise UsageError(f"{name} is no readable {kind} file: {reason}.", remedy) from None
    if len(set(names)) < len(names):
        raise UsageError(f"{name} names a column twice: {columns_shown(names)}.", "Rename one.")
    return TableRows(table, name, kind)


CSV = Format("CSV", (".csv",), lambda path, name: open_table(path, name, ",", "CSV"))
TSV = Format("TSV", (".tsv", ".tab"), lambda path, name: open_table(path, name, "\t", "TSV"))
