"""JSON: an object a line, or one array of objects. Blank lines are no rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from pathlib import Path

from dpg_cli.data.formats.base import Format, ListedRows, Row, Rows, decoded
from dpg_cli.errors import UsageError

BOM = b"\xef\xbb\xbf"
BLANK = b" \t\r\n"
HEAD = 1 << 16  # bytes in which the first sign of a file is looked for


class JsonLineRows(Rows):
    """The objects of a JSON-lines file; two numbers a row are kept in memory.

    Args:
        path: the file; it is read once through, to learn where each row begins and which columns there are.
        name: see `Rows`.

    Raises:
        UsageError: naming the line that is not UTF-8 or holds no JSON object.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name, self.kind = path, name, "JSON lines"
        starts, numbers, place = array("q"), array("q"), 0
        columns: dict[str, None] = {}
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip() not in (b"", BOM):
                    starts.append(place)
                    numbers.append(number)
                    columns |= dict.fromkeys(self._row(line, number))
                place += len(line)
        self.starts, self.numbers = starts, numbers
        self.columns = tuple(columns)

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, places: Sequence[int]) -> list[Row]:
        """See `Rows`."""
        found: dict[int, Row] = {}
        with self.path.open("rb") as file:
            for place in sorted(set(places)):
                file.seek(self.starts[place])
                found[place] = self._row(file.readline(), self.numbers[place])
        return [found[place] for place in places]

    def _row(self, line: bytes, number: int) -> Row:
        """The object of one line."""
        try:
            row = json.loads(decoded(line, self.name, number))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "nested too deeply")
            raise UsageError(f"{self.name}, line {number}: no JSON ({reason}).", "Correct that line.") from None
        if not isinstance(row, dict):
            raise UsageError(f"{self.name}, line {number}: no JSON object.", "Correct that line.")
        return row

    def where(self, place: int) -> str:
        """See `Rows`."""
        return f"line {self.numbers[place]}"


def first_sign(path: Path) -> bytes:
    """The first byte of a file that is no blank and no byte order mark."""
    with path.open("rb") as file:
        return file.read(HEAD).removeprefix(BOM).lstrip(BLANK)[:1]


def is_json(path: Path) -> bool:
    """Whether a file holds JSON objects: its first line is one, or it begins as an array of them."""
    with path.open("rb") as file:
        begin = file.read(HEAD).removeprefix(BOM).lstrip(BLANK)
    if begin.startswith(b"["):
        return begin[1:].lstrip(BLANK).startswith(b"{")
    with path.open("rb") as file:
        line = next((line for line in file if line.removeprefix(BOM).strip()), b"")
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def open_json(path: Path, name: str) -> Rows:
    """The rows of a JSON file, an array or lines; an array is held in memory.

    Raises:
        UsageError: if it is neither.
    """
    if first_sign(path) != b"[":
        return JsonLineRows(path, name)
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 ({error.reason}).", "Save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UsageError(f"{name} begins as a JSON array and is none: {reason}.", "Correct it.") from None
    wrong = next((place for place, row in enumerate(rows) if not isinstance(row, dict)), None)
    if wrong is not None:
        kind = type(rows[wrong]).__name__
        raise UsageError(f"{name}, row {wrong}: a {kind}, no JSON object.", "Give an array of objects.")
    return ListedRows(rows, name, "a JSON array")


JSON = Format("JSON, an object a line or an array of objects", (".jsonl", ".ndjson", ".json"), open_json, is_json)
