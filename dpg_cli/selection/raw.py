"""The user's file without some of its rows, or with a weight in each: what stays is there byte for byte.

Text and JSON lines, JSON arrays, CSV and TSV are cut as bytes; parquet keeps its schema, a `datasets` folder its features.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.data.formats import FORMATS
from dpg_cli.data.formats.base import Rows
from dpg_cli.data.formats.json_rows import JsonLineRows
from dpg_cli.data.formats.lines import LineRows
from dpg_cli.data.formats.parquet import ParquetRows
from dpg_cli.data.formats.table import TableRows
from dpg_cli.data.sources import DatasetRows, parse
from dpg_cli.data.spool import COMPRESSED, local
from dpg_cli.errors import UsageError
from dpg_cli.runs.files import replacing

WEIGHT = "weight"  # the column


@dataclass(frozen=True)
class Cut:
    """What becomes of the rows.

    Attributes:
        stays: whether a row stays, by its number.
        weights: of each row; None where they have none.
    """

    stays: Callable[[int], bool]
    weights: Mapping[int, float] | None = None

    def weight(self, place: int) -> str:
        """A row's weight as it is written; rows without a score weigh 1."""
        assert self.weights is not None
        return repr(float(f"{self.weights.get(place, 1.0):.6g}"))


def check_ending(source: str, rows: Rows, out: Path) -> None:
    """Refuse a place whose ending is of another format than the source's.

    Raises:
        UsageError: naming the endings that fit.
    """
    if isinstance(rows, DatasetRows):
        if out.suffix:
            raise UsageError(f"{source} is a datasets folder, and --out {out} names a file.", "Name a folder.")
        return
    suffix = ending(out)
    own = ending(parse(source).place)
    fits = next((known.suffixes for known in FORMATS if own in known.suffixes), (own,) if own else ())
    if fits and suffix not in fits:
        raise UsageError(
            f"{source} is {rows.kind}, and --out {out} does not end so.", f"End it in {' or '.join(fits)}."
        )


def ending(path: Path) -> str:
    """What a file's name ends in, without that of a compression."""
    stem = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return stem.suffix.lower()


def rewrite(source: str, rows: Rows, out: Path, cut: Cut) -> int:
    """Write what stays.

    Args:
        source: as the user named it.
        rows: of it.
        out: where to; `check_ending` has passed it.
        cut: what becomes of the rows.

    Returns:
        How many rows stay.

    Raises:
        UsageError: if rows of this format take no weight, or the format cannot be written.
    """
    with replacing(out) as temporary:
        if isinstance(rows, ParquetRows):
            return _parquet(rows, temporary, cut)
        if isinstance(rows, DatasetRows):
            return _dataset(rows, source, temporary, cut)
        path, _ = local(parse(source).place)
        with _written(temporary, out) as file:
            if isinstance(rows, LineRows):
                return _lines(rows, path, file, cut)
            if isinstance(rows, JsonLineRows):
                return _json_lines(rows, path, file, cut)
            if isinstance(rows, TableRows):
                return _table(rows, path, file, cut, "," if rows.kind == "CSV" else "\t")
            if rows.kind == "a JSON array":
                return _array(rows, path, file, cut)
    raise UsageError(f"{source} is {rows.kind}, which cannot be written back.", "Save it as parquet, and name that.")


@contextmanager
def _written(temporary: Path, out: Path) -> Iterator[BinaryIO]:
    """The file to write to, compressed as its name says."""
    kind = COMPRESSED.get(out.suffix.lower())
    with pa.output_stream(str(temporary), compression=kind) if kind else temporary.open("wb") as file:
        yield file


def _lines(rows: LineRows, path: Path, file: BinaryIO, cut: Cut) -> int:
    if cut.weights is not None:
        raise UsageError("Lines of text have no room for a weight.", "Save them as JSON lines, or use --drop.")
    kept = 0
    with path.open("rb") as lines:
        for place, line in enumerate(lines):
            if cut.stays(place):
                file.write(line)
                kept += 1
    return kept


def _json_lines(rows: JsonLineRows, path: Path, file: BinaryIO, cut: Cut) -> int:
    places = {int(number): place for place, number in enumerate(rows.numbers)}
    kept = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = places.get(number)
            if place is None:  # blank
                file.write(line)
            elif cut.stays(place):
                file.write(_weighed(line, cut, place, rows.columns))
                kept += 1
    return kept


def _weighed(text: bytes, cut: Cut, place: int, columns: tuple[str, ...]) -> bytes:
    """The bytes of an object with its weight as the last key."""
    if cut.weights is None:
        return text
    _require_free(columns)
    end = text.rindex(b"}")
    comma = b"" if text[:end].rstrip().endswith(b"{") else b", "
    return text[:end] + comma + f'"{WEIGHT}": {cut.weight(place)}'.encode() + text[end:]


def _require_free(columns: tuple[str, ...]) -> None:
    if WEIGHT in columns:
        raise UsageError(f"The rows have a column {WEIGHT!r} already.", "Rename it, or use --drop.")


def _array(rows: Rows, path: Path, file: BinaryIO, cut: Cut) -> int:
    """An array's elements as they stand, each with what stands before it."""
    text = path.read_bytes().decode("utf-8-sig")
    decoder, spans = json.JSONDecoder(), []
    at = text.index("[") + 1
    while True:
        start = at + len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text[start] == "]":
            break
        at = decoder.raw_decode(text, start)[1]
        spans.append((start, at))
    begin = path.read_bytes()[:3] if path.read_bytes().startswith(b"\xef\xbb\xbf") else b""
    kept = [place for place in range(len(spans)) if cut.stays(place)]
    file.write(begin + text[: spans[0][0]].encode())
    for number, place in enumerate(kept):
        if number:
            file.write(text[spans[place - 1][1] : spans[place][0]].encode())
        element = text[slice(*spans[place])].encode()
        file.write(_weighed(element, cut, place, rows.columns))
    file.write(text[spans[-1][1] :].encode())
    return len(kept)


def _table(rows: TableRows, path: Path, file: BinaryIO, cut: Cut, delimiter: str) -> int:
    """CSV by whole records, which may hold line breaks; latin-1 maps bytes to letters and back one for one."""
    kept, place = 0, -1
    with path.open(encoding="latin-1", newline="") as lines:
        mine, theirs = itertools.tee(lines)
        records = csv.reader(theirs, delimiter=delimiter)
        read = 0
        for record in records:
            raw = "".join(itertools.islice(mine, records.line_num - read))
            read = records.line_num
            if not record:  # a blank line
                file.write(raw.encode("latin-1"))
                continue
            if place < 0 or cut.stays(place):
                file.write(_wider(raw, cut, place, delimiter, rows.columns).encode("latin-1"))
                kept += place >= 0
            place += 1
    if place != len(rows):
        raise UsageError(f"{rows.name} has records of which readers think differently.", "Save it as parquet.")
    return kept


def _wider(raw: str, cut: Cut, place: int, delimiter: str, columns: tuple[str, ...]) -> str:
    """A record with its weight as the last field."""
    if cut.weights is None:
        return raw
    _require_free(columns)
    text = raw.rstrip("\r\n")
    return f"{text}{delimiter}{WEIGHT if place < 0 else cut.weight(place)}{raw[len(text) :]}"


def _parquet(rows: ParquetRows, temporary: Path, cut: Cut) -> int:
    """Row group by row group, with the schema and its metadata."""
    schema, kept, first = rows.file.schema_arrow, 0, 0
    if cut.weights is not None:
        _require_free(rows.columns)
        schema = schema.append(pa.field(WEIGHT, pa.float64()))
    groups = rows.file.num_row_groups
    packed = rows.file.metadata.row_group(0).column(0).compression.lower() if groups else "zstd"
    with pq.ParquetWriter(temporary, schema, compression="none" if packed == "uncompressed" else packed) as writer:
        for group in range(groups):
            table = rows.file.read_row_group(group)
            places = range(first, first + table.num_rows)
            stays = [cut.stays(place) for place in places]
            if cut.weights is not None:
                weights = pa.array([float(cut.weight(place)) for place in places], pa.float64())
                table = table.append_column(schema.field(WEIGHT), weights)
            table = table.filter(pa.array(stays))
            writer.write_table(table)
            kept, first = kept + table.num_rows, first + len(stays)
    return kept


def _dataset(rows: DatasetRows, source: str, temporary: Path, cut: Cut) -> int:
    """A split of a `datasets` folder; the others stay as they are."""
    whole: Any = rows.whole
    places = [place for place in range(len(whole)) if cut.stays(place)]
    chosen = whole.select(places)
    if cut.weights is not None:
        _require_free(rows.columns)
        chosen = chosen.add_column(WEIGHT, [float(cut.weight(place)) for place in places])
    path, split = parse(source).place, rows.name.rpartition("#")[2]
    if (path / "dataset_dict.json").is_file():
        import datasets

        every = datasets.load_from_disk(str(path))
        every[split] = chosen
        chosen = every
    chosen.save_to_disk(str(temporary))
    return len(places)
