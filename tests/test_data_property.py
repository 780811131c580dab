"""Whatever rows a user brings, in whatever shape, format and encoding, for whatever tokeniser: the examples' token ids are
those of stock fine-tuning with the same mask, or there is one line and exit code 2."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from stock_sft import prepared
from tokenisers import TOKENISERS, reader, tokeniser

from dpg_cli.data.examples import RowEncoder
from dpg_cli.data.prepared import Prepared, gather, prepare
from dpg_cli.errors import UsageError, one_line

Row = dict[str, Any]
SIGNS = "ab é\u0301ß😀\n\r\t\"',<>{}|\x00\u2028"
texts = st.one_of(
    st.text(SIGNS, max_size=12),
    st.lists(st.sampled_from(["the cat", " sees", " a ", "boat", "</s>", "<|end|>", "\n"]), max_size=4).map("".join),
)
contents = texts.filter(lambda text: text.strip() == text and text)  # what templates and marks leave as it is
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=2)
messages = turns.map(
    lambda pairs: [
        message
        for asked, answer in pairs
        for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    ]
)


def shape(name: str) -> st.SearchStrategy[Row]:
    """Rows of a shape as TRL names it."""
    return {
        "text": st.fixed_dictionaries({"text": texts}),
        "pair": st.fixed_dictionaries({"prompt": texts, "completion": texts}),
        "messages": st.fixed_dictionaries({"messages": messages}),
        "message pair": messages.map(lambda talk: {"prompt": talk[:1], "completion": talk[1:]}),
    }[name]


def spelt(rows: list[Row], how: str) -> list[Row]:
    """The same rows as another habit writes them."""
    if how == "ShareGPT":
        roles = {"user": "human", "assistant": "gpt"}
        talks = [[{"from": roles[m["role"]], "value": m["content"]} for m in row["messages"]] for row in rows]
        return [{"conversations": talk} for talk in talks]
    if how == "parts":
        return [
            {
                key: [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
                for key, talk in row.items()
            }
            for row in rows
        ]
    return rows


def written(rows: list[Row], kind: str, place: Path, mark: str, end: str) -> Path:
    """The rows as a file of a format."""
    path = place / f"rows.{kind}"
    if kind in ("jsonl", "jsonl.gz", "jsonl.zst"):
        data = (mark + end.join(json.dumps(row, ensure_ascii=bool(end == "\r\n")) for row in rows) + end).encode()
        packed = {
            "jsonl": bytes,
            "jsonl.gz": gzip.compress,
            "jsonl.zst": lambda raw: bytes(pa.Codec("zstd").compress(raw)),
        }
        path.write_bytes(packed[kind](data))
    elif kind == "json":
        path.write_bytes((mark + json.dumps(rows, indent=1)).encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    else:
        sign = {"csv": ",", "tsv": "\t"}[kind]
        names = list(rows[0])
        cells = [names, *([row[name] for name in names] for row in rows)]
        lines = (sign.join('"' + cell.replace('"', '""') + '"' for cell in row) + end for row in cells)
        path.write_bytes((mark + "".join(lines)).encode())
    return path


def encoded(path: Path, tokenizer: Any) -> Prepared:
    return prepare(gather(str(path)), RowEncoder(reader(tokenizer)))


@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.data())
def test_examples_are_the_stock_ones(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(TOKENISERS)), "tokeniser")
    kind = data.draw(st.sampled_from(["text", "pair", "messages", "message pair"]), "shape")
    if name == "slow bytes" and kind == "messages":
        return  # stock marks need offsets
    tokenizer = tokeniser(name)
    rows = data.draw(st.lists(shape(kind), min_size=1, max_size=4), "rows")
    habits = {"messages": ["plain", "ShareGPT", "parts"], "message pair": ["plain", "parts"]}.get(kind, ["plain"])
    habit = data.draw(st.sampled_from(habits), "habit")
    plain = ["csv", "tsv"] if kind in ("text", "pair") else []
    ending = data.draw(st.sampled_from(["jsonl", "jsonl.gz", "jsonl.zst", "json", "parquet", *plain]), "format")
    mark, end = data.draw(st.sampled_from(["", "\ufeff"])), data.draw(st.sampled_from(["\n", "\r\n"]))
    path = written(spelt(rows, habit), ending, tmp_path_factory.mktemp("rows"), mark, end)
    full = [n for n, row in enumerate(rows) if any(row.values())]
    if not full:
        with pytest.raises(UsageError, match="are empty"):
            encoded(path, tokenizer)
        return
    found = encoded(path, tokenizer)
    assert (list(found.numbers), list(found.understood.empty)) == (full, [n for n in range(len(rows)) if n not in full])
    stock = prepared([rows[n] for n in full], tokenizer)
    for row, mine, (ids, label) in zip((rows[n] for n in full), found.rows, stock, strict=True):
        note(f"{row!r} {ids} {label} {mine}")
        assert mine.ids == ids
        if (
            mine.straddles and tokenizer.is_fast
        ):  # TRL goes by tokens that are alike; here by the token of the completion's first character
            first = mine.label.index(True)
            assert mine.label == [place >= first for place in range(len(ids))]
            if kind == "pair":
                text = row["prompt"] + row["completion"]
                place = tokenizer(text).char_to_token(len(row["prompt"]))
                assert first == (
                    first if place is None else max(place, 1)
                )  # None: a blank that trimmed offsets leave out
        else:
            assert mine.label == label
    assert found.understood.trained_tokens == sum(sum(row.label) for row in found.rows)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text"]), inner)
    ),
    max_leaves=6,
)
columns = st.sampled_from(
    ["text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "x"]
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.dictionaries(columns, anything, max_size=3), min_size=1, max_size=3),
    st.sampled_from(["bytes", "slow bytes"]),
)
def test_anything_else_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Row], name: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    try:
        found = encoded(path, tokeniser(name))
    except UsageError as error:
        assert error.exit_code == 2
        line = one_line(str(error))
        assert 20 < len(line) < 3000
        line.encode()
    else:
        assert all(len(row.ids) == len(row.label) and not row.label[0] for row in found.rows)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(max_size=60),
    st.sampled_from(["txt", "jsonl", "json", "csv", "tsv", "parquet", "txt.gz", "jsonl.zst", "rows"]),
)
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, ending: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a.{ending}"
    path.write_bytes(data)
    try:
        encoded(path, tokeniser("bytes"))
    except UsageError as error:
        assert "\n" not in one_line(str(error))
