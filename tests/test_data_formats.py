"""Source formats: one table of them, read back row by row, plain, compressed and through a pipe; refusals in one line.

A new format adds a row to `CASES`.
"""

from __future__ import annotations

import gzip
import json
import os
import runpy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpg_cli.data import formats
from dpg_cli.data.formats.base import Format, ListedRows, Rows
from dpg_cli.data.formats.parquet import ParquetRows
from dpg_cli.data.sources import Source, absolute, open_rows, parse
from dpg_cli.errors import UsageError

ROWS = [
    {"text": "one", "label": "x"},
    {"text": "zwölf  Boxkämpfer 😀", "label": "y"},
    {"text": 'a, "b"\tc\nsecond line', "label": ""},
    {"text": "", "label": "z"},
]
LINES = [row["text"].replace("\n", " ") for row in ROWS]


@pytest.fixture(autouse=True)
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of CONTRIBUTING, registered as a format of the house is."""
    own = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "examples" / "asv.py"))["ASV"]
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, own))


def opened(source: object, *, split: str = "train", limit: int = 0) -> Rows:
    return open_rows(str(source), split=split, what="examples", flag="DATA", limit=limit)


def taken(rows: Rows) -> list[dict[str, Any]]:
    return [row for _, row in rows.walk()]


def quoted(rows: list[dict[str, str]], sign: str, end: str = "\n") -> str:
    cells = [list(rows[0]), *(row.values() for row in rows)]
    return "".join(sign.join('"' + cell.replace('"', '""') + '"' for cell in row) + end for row in cells)


def parquet(kind: Any) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {name: pa.array([row[name] for row in ROWS], pa.string()).cast(kind) for name in ROWS[0]}
    pq.write_table(pa.table(columns), sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {  # format -> (suffix, the bytes of ROWS)
    "JSON lines": (".jsonl", lambda: "".join(json.dumps(row) + "\n" for row in ROWS).encode()),
    "JSON lines, raw": (".ndjson", lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()),
    "JSON lines in .json": (".json", lambda: "\n\n".join(json.dumps(row) for row in ROWS).encode()),
    "JSON array": (".json", lambda: json.dumps(ROWS, indent=1).encode()),
    "CSV": (".csv", lambda: quoted(ROWS, ",").encode()),
    "TSV": (".tsv", lambda: quoted(ROWS, "\t").encode()),
    "ASV": (
        ".asv",
        lambda: "".join("\x1f".join(cells) + "\x1e" for cells in [ROWS[0], *map(dict.values, ROWS)]).encode(),
    ),
    "parquet": (".parquet", lambda: parquet(pa.string())),
    "parquet, large": (".parquet", lambda: parquet(pa.large_string())),
    "parquet, views": (".parquet", lambda: parquet(pa.string_view())),
    "parquet, dictionary": (".parquet", lambda: parquet(pa.dictionary(pa.int32(), pa.string()))),
}
TOLD = {suffix for known in formats.FORMATS if known.sniff for suffix in known.suffixes}
SNIFFED = {name for name, (suffix, _) in CASES.items() if suffix in TOLD}  # told by their content where no name tells
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),  # two members
    ".zst": lambda data: bytes(pa.Codec("zstd").compress(data)),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", CASES)
def test_rows_come_back(name: str, packed: str, tmp_path: Path) -> None:
    suffix, data = CASES[name]
    path = tmp_path / f"some rows{suffix}{packed}"
    path.write_bytes(PACKED[packed](data()))
    rows = opened(path)
    assert (rows.name, rows.columns, rows.named, len(rows)) == (str(path), ("text", "label"), True, 4)
    assert taken(rows) == ROWS
    assert rows.take([3, 0, 3]) == [ROWS[3], ROWS[0], ROWS[3]]
    assert taken(opened(path, limit=3)) == ROWS[:3]
    if "parquet" in name:
        rows.only(["label"])
        assert rows.take([2]) == [{"label": ""}]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("kind", ["lines", *sorted(SNIFFED)])
def test_rows_come_through_a_pipe(kind: str, packed: str, tmp_path: Path) -> None:
    """A pipe has no name that tells its format, and can be read once; it may be named twice all the same."""
    data = "".join(f"{line}\n" for line in LINES).encode() if kind == "lines" else CASES[kind][1]()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(PACKED[packed](data)))
    writer.start()
    rows = opened(pipe)
    writer.join()
    assert taken(rows) == ([{"text": line} for line in LINES] if kind == "lines" else ROWS)
    assert taken(opened(pipe)) == taken(rows)
    assert absolute(str(pipe)) == str(pipe)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["lines", "JSON lines", "JSON array", "CSV", "TSV"])
def test_byte_order_marks_and_line_ends_change_nothing(kind: str, mark: str, end: str, tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "x"}, {"text": "zwei ", "label": ""}]
    suffix, text = {
        "lines": (".txt", end.join(row["text"] for row in rows) + end),
        "JSON lines": (".jsonl", end.join(json.dumps(row) for row in rows)),
        "JSON array": (".json", json.dumps(rows, indent=1).replace("\n", end)),
        "CSV": (".csv", quoted(rows, ",", end)),
        "TSV": (".tsv", quoted(rows, "\t", end)),
    }[kind]
    (tmp_path / f"a{suffix}").write_bytes((mark + text).encode())
    wanted = [{"text": row["text"]} for row in rows] if kind == "lines" else rows
    assert taken(opened(tmp_path / f"a{suffix}")) == wanted


def test_lines_are_rows_and_blank_lines_are_empty_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n \t\n{not json}\nlast")
    rows = opened(tmp_path / "a.txt")
    assert [row["text"] for row in taken(rows)] == ["one", "", "", "{not json}", "last"]
    assert (rows.where(3), rows.named, rows.columns) == ("line 4", False, ("text",))
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n\n\n{"text": "b", "more": 1}\n')
    rows = opened(tmp_path / "a.jsonl")
    assert [row["text"] for row in taken(rows)] == ["a", "b"]  # blank lines are no rows of JSON lines
    assert (rows.where(0), rows.where(1), rows.columns) == ("line 2", "line 5", ("text", "more"))


@pytest.mark.parametrize("keep", [1 << 20, 0])
def test_parquet_kept_or_read_by_row_groups(keep: int, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(100)]
    nested = [[{"role": "user", "content": text}] for text in texts]
    pq.write_table(pa.table({"messages": nested, "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    rows = ParquetRows(tmp_path / "a.parquet", "a", keep=keep)
    assert rows.small == (keep > 0)
    assert rows.take([99, 0, 50]) == [{"messages": nested[n], "text": texts[n]} for n in (99, 0, 50)]
    rows.only(["text"])
    assert [row["text"] for _, row in rows.walk()] == texts
    assert (rows.kept is None) == (keep == 0)


REFUSED: dict[str, tuple[str, bytes, str]] = {  # what is wrong -> (name, bytes, words of the refusal)
    "no file": ("none.txt", b"", "cannot be read: No such file"),
    "no hub name": ("nothing", b"", "cannot be read: No such file"),
    "no file in a folder": ("a/none.parquet", b"", "cannot be read: No such file"),
    "no compressed file": ("none.jsonl.gz", b"", "cannot be read: No such file"),
    "latin-1 lines": ("a.txt", b"ok\n\xe9\n", "a.txt, line 2: not UTF-8"),
    "UTF-16 lines": ("a.txt", "héllo".encode("utf-16"), "line 1: not UTF-8 (UTF-16)"),
    "latin-1 JSON": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "a.jsonl, line 2: not UTF-8"),
    "latin-1 CSV": ("a.csv", b"text\n\xe9\n", "no readable CSV file"),
    "latin-1 array": ("a.json", b'[{"text": "\xe9"}]', "not UTF-8"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "a.jsonl, line 3: no JSON"),
    "no object": ("a.jsonl", b'{"text": "a"}\n["b"]\n', "a.jsonl, line 2: no JSON object"),
    "nested JSON": ("a.jsonl", b"[" * 10**5, "begins as a JSON array and is none"),
    "deep object": ("a.jsonl", b'{"a":' * 10**5, "a.jsonl, line 1: no JSON (nested too deeply)"),
    "no array": ("a.json", b'[{"text": "a"}', "begins as a JSON array and is none"),
    "array of texts": ("a.json", b'[{"text": "a"}, "b"]', "a.json, row 1: a str, no JSON object"),
    "ragged CSV": ("a.csv", b"text,label\na\n", "Expected 2 columns, got 1"),
    "a column twice": ("a.csv", b"text,text\na,b\n", "names a column twice: text, text"),
    "no parquet": ("a.parquet", b"no parquet", "no readable parquet file"),
    "cut parquet": ("a.parquet", parquet(pa.string())[:-9], "no readable parquet file"),
    "no gzip": ("a.txt.gz", b"plain text", "cannot be read to its end"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"one\n" * 100)[:-9], "cannot be read to its end"),
    "cut zstd": ("a.txt.zst", bytes(pa.Codec("zstd").compress(b"one\n" * 100))[:-3], "cannot be read to its end"),
    "a NUL in the name": ("a\0.txt", b"", "cannot be read"),
    **{
        f"empty {suffix}": (f"a{suffix}", data, "are empty")
        for suffix, data in {
            ".txt": b"",
            ".jsonl": b"\n\n",
            ".json": b"[]",
            ".csv": b"text\n",
            ".tsv": b"",
            ".txt.gz": gzip.compress(b""),
            "": b"",
        }.items()
    },
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_read_gives_one_line(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, data, words = REFUSED[fault]
    monkeypatch.chdir(tmp_path)
    if data or fault.startswith("empty"):
        Path(name).write_bytes(data)
    with pytest.raises(UsageError) as caught:
        taken(opened(name))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_a_column_of_what_has_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    with pytest.raises(UsageError, match="asks for the column 'text', and lines of text have no columns"):
        opened(f"{tmp_path / 'a.txt'}:text")


def test_a_toy_format_takes_a_module_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of `key: value` lines, with a blank line between two."""

    def open_records(path: Path, name: str) -> Rows:
        blocks = path.read_text(encoding="utf-8").strip().split("\n\n")
        return ListedRows(
            [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks], name, "records"
        )

    toy = Format("records", (".rec",), open_records, lambda path: path.read_bytes().startswith(b"%rec"))
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, toy))
    (tmp_path / "a.rec").write_text("text: one\nlabel: x\n\ntext: two\nlabel: y\n")
    assert taken(opened(tmp_path / "a.rec")) == [{"text": "one", "label": "x"}, {"text": "two", "label": "y"}]
    (tmp_path / "b").write_text("%rec: 1\ntext: one\n")
    assert taken(opened(tmp_path / "b")) == [{"%rec": "1", "text": "one"}]
    (tmp_path / "a.rec.gz").write_bytes(gzip.compress(b"text: one\n"))
    assert taken(opened(tmp_path / "a.rec.gz")) == [{"text": "one"}]


def test_every_registered_format_is_in_the_table() -> None:
    covered = {suffix for suffix, _ in CASES.values()} | {".txt"}
    assert [known.name for known in formats.FORMATS if not covered & set(known.suffixes)] == []


def test_sources_are_taken_apart(tmp_path: Path) -> None:
    assert parse("wikimedia/wikipedia@20231101.en#train:text") == Source(
        "wikimedia/wikipedia", "20231101.en", "train", "text"
    )
    assert parse("a/b:c") == Source("a/b", column="c")
    assert parse("x.parquet:my column") == Source("x.parquet", column="my column")
    odd = tmp_path / "odd@name#1:2.txt"
    odd.write_text("one\n")
    assert parse(str(odd)) == Source(str(odd))
    assert parse(f"{odd}:col") == Source(str(odd), column="col")
    assert absolute("odd@name#1:2.txt:col", tmp_path) == f"{odd}:col"
    assert absolute("no/where#x:y", tmp_path) == "no/where#x:y"
    assert taken(opened(odd)) == [{"text": "one"}]


def test_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    chats = [[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]]
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "messages": chats, "number": [1, 2]})
    rows.save_to_disk(tmp_path / "one")
    found = opened(tmp_path / "one")
    assert (found.columns, found.kind) == (("text", "messages", "number"), "a dataset")
    assert taken(found) == [
        {"text": t, "messages": m, "number": n} for t, m, n in zip("ab", chats, (1, 2), strict=True)
    ]
    found.only(["text"])
    assert found.take([1, 0]) == [{"text": "b"}, {"text": "a"}]
    with pytest.raises(UsageError, match="has no splits; 'train' is asked for"):
        opened(f"{tmp_path / 'one'}#train")
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "both")
    assert [len(opened(tmp_path / "both")), len(opened(tmp_path / "both", split="test"))] == [2, 1]
    assert opened(f"{tmp_path / 'both'}#test:text").name == f"{tmp_path / 'both'}#test"
    for source, split in ((f"{tmp_path / 'both'}#dev", "train"), (tmp_path / "both", "validation")):
        with pytest.raises(UsageError, match=r"split.*; there are train, test\. Name one: .*both#train"):
            opened(source, split=split)
    datasets.DatasetDict({"only": rows}).save_to_disk(tmp_path / "single")
    assert len(opened(tmp_path / "single")) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is no datasets folder"):
        opened(tmp_path / "empty")


def test_the_hub_out_of_reach_and_the_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    for limit in (0, 5):
        with pytest.raises(UsageError, match=r"hub cannot be reached \(HF_HUB_OFFLINE is set\)") as caught:
            opened("nobody/no-such-dataset", limit=limit)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'dpg-cli\[datasets\]'"):
        opened("nobody/no-such-dataset")


def test_hub_datasets_are_streamed_under_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    asked: list[object] = []
    read = []

    def rows() -> Iterator[dict[str, Any]]:
        for number in range(10**9):
            read.append(number)
            yield {"id": number, "text": f"article {number}"}

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = opened("some/wiki@2023.en#dev:text", limit=12)
    assert [row["text"] for row in taken(found)] == [f"article {number}" for number in range(12)]
    assert asked == [(("some/wiki", "2023.en"), {"split": "dev", "streaming": True})]
    assert (read, found.name) == (list(range(12)), "some/wiki#dev")
