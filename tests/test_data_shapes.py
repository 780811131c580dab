"""Shapes of rows: one table of what is accepted, and what each row of it means; pools of prompts; pairs of two sources.

A new shape adds a row to `SHAPES`.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpg_cli.data.prepared import gather
from dpg_cli.data.prompts import PromptSampler, load_prompts
from dpg_cli.data.shapes import ACCEPTED, Asked, Chat, Item, Pair, Text, trained_text
from dpg_cli.data.texts import ListedTexts
from dpg_cli.errors import UsageError

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
TALK = [USER, ASSISTANT]

SHAPES: dict[str, tuple[dict[str, Any], Item, str]] = {  # shape -> (a row, what it means, its prompt in a pool)
    "text": ({"text": "a b"}, Text("a b"), "a b"),
    "completion alone": ({"completion": "a b", "id": 1}, Text("a b"), ""),
    "prompt + completion": ({"prompt": "a", "completion": " b"}, Pair("a", " b"), "a"),
    "prompt + response": ({"prompt": "a", "response": " b"}, Pair("a", " b"), "a"),
    "prompt + completion and text": ({"text": "x", "prompt": "a", "completion": " b"}, Pair("a", " b"), "a"),
    "prompt + text": (
        {"prompt": "a", "text": "b"},
        Text("b"),
        "a",
    ),  # the dataset of a run: texts without their prompts
    "prompt + completion, messages": ({"prompt": [USER], "completion": [ASSISTANT]}, Chat(TALK, 1), "hi"),
    "messages": ({"messages": TALK}, Chat(TALK), "hi"),
    "messages and text": ({"text": "x", "messages": TALK}, Chat(TALK), "hi"),
    "messages with tools": (
        {"messages": TALK, "tools": '[{"name": "f"}]', "chat_template_kwargs": {"thinking": False, "x": None}},
        Chat(TALK, None, [{"name": "f"}], {"thinking": False}),
        "hi",
    ),
    "conversations": ({"conversations": TALK}, Chat(TALK), "hi"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        Chat(TALK),
        "hi",
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "h"}, {"text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "ho"}]},
            ]
        },
        Chat(TALK),
        "hi",
    ),
    "null keys": (
        {"messages": [{"role": "user", "content": "hi", "tool_calls": None}, {**ASSISTANT, "name": None}]},
        Chat(TALK),
        "hi",
    ),
    "a tool's call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        Chat([USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]),
        "hi",
    ),
    "columns of messages": (
        {"messages": {"role": ["user", "assistant"], "content": ["hi", "ho"]}},  # of older `datasets`
        Chat(TALK),
        "hi",
    ),
    "Alpaca": ({"instruction": "do", "input": "it", "output": "done"}, Asked("do\n\nit", "done"), "do\n\nit"),
    "Alpaca without input": ({"instruction": "do", "input": "", "output": "done"}, Asked("do", "done"), "do"),
    "Alpaca with null input": ({"instruction": "do", "input": None, "output": "done"}, Asked("do", "done"), "do"),
    "question + answer": ({"question": "what?", "answer": "that"}, Asked("what?", "that"), "what?"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def meant(source: str, **options: Any) -> list[Item]:
    return [item for _, item in gather(source, **options).items]


@pytest.mark.parametrize("name", SHAPES)
def test_what_rows_mean(name: str, tmp_path: Path) -> None:
    row, item, prompt = SHAPES[name]
    source = write(tmp_path / "a.jsonl", [row, row])
    assert meant(source) == [item, item]
    if prompt:
        assert list(load_prompts(source)) == [prompt, prompt]
    else:
        with pytest.raises(UsageError, match="no shape of examples"):
            load_prompts(source)
    if not {"tools", "tool_calls"} & set(str(row).replace("'", " ").split()):  # structs of one kind alone
        pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "a.parquet")
        assert meant(str(tmp_path / "a.parquet")) == [item, item]


NAMED: dict[str, tuple[dict[str, Any], str, Item]] = {  # a column that is named is taken alone
    "a completion": ({"prompt": "a", "completion": "b"}, "completion", Text("b")),
    "any other": ({"text": "x", "odd name": "b"}, "odd name", Text("b")),
    "messages": ({"text": "x", "chosen": TALK}, "chosen", Chat(TALK)),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_column_is_taken_alone(name: str, tmp_path: Path) -> None:
    row, column, item = NAMED[name]
    source = write(tmp_path / "a.jsonl", [row])
    assert meant(f"{source}:{column}") == [item]
    with pytest.raises(UsageError, match=r"has no column 'title'; it has .*Name one: .*a\.jsonl:COLUMN"):
        meant(f"{source}:title")


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no known columns": ([{"a": 1, "b": 2}], f"a.jsonl has the columns a, b, which are no shape of examples. Accepted: {ACCEPTED}"),
    "preferences": ([{"prompt": "a", "chosen": "b", "rejected": "c"}], f"Accepted: {ACCEPTED}"),
    "a number": ([{"text": "a"}, {"text": 3}], f"line 2: `text` is a number where a text or a list of messages is needed; accepted: {ACCEPTED}"),
    "null": ([{"text": "a"}, {"text": None}], "line 2: there is no `text`"),
    "a missing column": ([{"prompt": "a", "completion": "b"}, {"completion": "b"}], "line 2: there is no `prompt`"),
    "a later column": ([{"completion": "b"}, {"prompt": "a", "completion": "b"}], "line 1: there is no `prompt`"),
    "two kinds": ([{"text": "a"}, {"messages": TALK}], "line 1: there is no `messages`"),
    "text and messages": ([{"prompt": "a", "completion": [ASSISTANT]}], "one is a text and the other is not"),
    "an output that is a list": ([{"instruction": "a", "output": ["b"]}], "`output` is a list where a text is needed"),
    "half a character": ([{"text": "a\ud800"}], "`text` holds half a character (\\ud800, a lone surrogate)"),
    "half a character in a message": (
        [{"messages": [USER, {"role": "assistant", "content": "\udcff"}]}],
        "`messages` holds half a character (\\udcff",
    ),
    "half a character in a part": (
        [{"messages": [{"role": "user", "content": [{"text": "\ud83d"}, {"text": "x"}]}, ASSISTANT]}],
        "`messages` holds half a character",
    ),
    "a message without a role": ([{"messages": [{"content": "a"}]}], "a message without a role"),
    "a message without a content": ([{"messages": [{"role": "user"}]}], "or without a text as its content"),
    "no message": ([{"messages": ["a"]}], "`messages` holds a text where a message with role and content is needed"),
    "a picture": (
        [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
        "a content part (image) that is no text",
    ),
    "tools that are no JSON": ([{"messages": TALK, "tools": "{"}], "`tools` is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_rows_of_no_shape_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    rows, words = REFUSED[name]
    with pytest.raises(UsageError) as caught:
        meant(write(tmp_path / "a.jsonl", rows))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n')
    assert meant(str(tmp_path / "a.jsonl")) == [Text("😀")]


def test_empty_rows_are_told_apart_and_keep_their_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": ""}, {"prompt": "a", "completion": ""}, {"prompt": "", "completion": "b"}]
    found = gather(write(tmp_path / "a.jsonl", rows))
    assert (found.items, found.empty) == ([(1, Pair("a", "")), (2, Pair("", "b"))], [0])
    (tmp_path / "a.txt").write_text("one\n\n  \ntwo\n")
    found = gather(str(tmp_path / "a.txt"))
    assert (found.items, found.empty) == ([(0, Text("one")), (3, Text("two"))], [1, 2])
    talks = [{"messages": []}, {"messages": [{"role": "user", "content": ""}]}, {"messages": TALK}]
    assert gather(write(tmp_path / "b.jsonl", talks)).empty == [0, 1]
    with pytest.raises(UsageError, match=r"All rows of .* are empty"):
        gather(write(tmp_path / "c.jsonl", [{"text": ""}] * 3))


def test_trained_texts(tmp_path: Path) -> None:
    found = {name: trained_text(item) for name, (_, item, _) in SHAPES.items()}
    assert (found["text"], found["prompt + completion"], found["Alpaca"]) == ("a b", " b", "done")
    assert (found["messages"], found["prompt + completion, messages"]) == ("ho", "ho")


# Two sources, paired row by row


def lines(*texts: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.with_suffix(".txt").write_text("".join(text + "\n" for text in texts))
        return str(path.with_suffix(".txt"))

    return make


def objects(column: str, *values: Any) -> Callable[[Path], str]:
    return lambda path: write(path.with_suffix(".jsonl"), [{column: value} for value in values])


PAIRS: dict[str, tuple[Callable[[Path], str], Callable[[Path], str], list[tuple[int, Item]]]] = {
    "lines": (lines("b", "d"), lines("a", "c"), [(0, Pair("a", "b")), (1, Pair("c", "d"))]),
    "a blank prompt": (lines("b", "d"), lines("", "c"), [(0, Pair("", "b")), (1, Pair("c", "d"))]),
    "blank in both": (lines("b", "", "d"), lines("a", "", "c"), [(0, Pair("a", "b")), (2, Pair("c", "d"))]),
    "blank lines at an end": (lines("b", "", ""), lines("a"), [(0, Pair("a", "b"))]),
    "lines and objects": (objects("completion", "b", "d"), lines("a", ""), [(0, Pair("a", "b")), (1, Pair("", "d"))]),
    "columns of their own": (objects("output", "b"), objects("question", "a"), [(0, Pair("a", "b"))]),
    "messages": (objects("messages", [ASSISTANT]), objects("prompt", [USER]), [(0, Chat(TALK, 1))]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_two_sources_are_paired_by_row(name: str, tmp_path: Path) -> None:
    data, prompts, wanted = PAIRS[name]
    assert gather(data(tmp_path / "data"), contexts=prompts(tmp_path / "prompts")).items == wanted


UNPAIRED: dict[str, tuple[Callable[[Path], str], Callable[[Path], str], str]] = {
    "a line left out": (lines("a1", "a2", "a3"), lines("p1", "", "p2", "p3"), "data.txt, line 2 against line 2 of .*prompts.txt"),
    "a blank line too many": (lines("a1", "", "a2", "a3"), lines("p1", "p2", "p3"), "data.txt, line 2 against line 2"),
    "one too few": (lines("a1", "a2"), lines("p1"), "data.txt, line 2 against the end of .*prompts.txt"),
    "one too many": (lines("a1"), lines("p1", "p2"), "prompts.txt, line 2 against the end of .*data.txt"),
    "objects": (objects("text", "a1", "a2", "a3"), objects("prompt", "p1", "p2"), "data.jsonl, line 3 against the end"),
    "a text for messages": (lines("b"), objects("prompt", [USER]), "not both texts, nor both lists of messages"),
    "no prompts": (lines("b"), objects("number", 1), "none that holds prompts"),
    "a number as prompt": (lines("b"), objects("prompt", 1), "`prompt` is a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPAIRED)
def test_sources_that_are_no_pairs_are_refused(name: str, tmp_path: Path) -> None:
    data, prompts, words = UNPAIRED[name]
    with pytest.raises(UsageError, match=words) as caught:
        gather(data(tmp_path / "data"), contexts=prompts(tmp_path / "prompts"))
    assert "\n" not in str(caught.value)


# Pools of prompts


def test_pools_leave_blank_lines_out_and_refuse_a_bad_row_when_they_are_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\n\n  \nzwölf\n")
    pool = load_prompts(str(tmp_path / "a.txt"))
    assert (list(pool), pool[1], pool[-1], pool[0:1]) == (["one", "zwölf"], "zwölf", "zwölf", ["one"])
    assert pool.about == f"{tmp_path / 'a.txt'}: 4 rows (lines of text), prompt: text, 2 blank ones left out"  # type: ignore[attr-defined]
    for rows in (
        [{"prompt": "a"}, {"prompt": 1}],
        [{"prompt": "a"}, {"text": "b"}],
        [{"prompt": [USER, ASSISTANT, USER]}],
    ):
        with pytest.raises(UsageError, match=r"a\.jsonl, line \d: "):
            load_prompts(write(tmp_path / "a.jsonl", rows))
    (tmp_path / "blank.txt").write_text("\n  \n")
    with pytest.raises(UsageError, match="are all blank"):
        load_prompts(str(tmp_path / "blank.txt"))
    with pytest.raises(UsageError, match="--prompts tiny, prose, empty, a file"):
        load_prompts("none.txt")


def test_held_out_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join("abcdef"))
    path = str(tmp_path / "a.txt")
    assert list(load_prompts(path, holdout=2)) == list("abcd")
    assert list(load_prompts(path, split="eval", holdout=2)) == list("ef")
    assert list(load_prompts(path, limit=4, holdout=1)) == list("abc")
    assert list(load_prompts(path, split="eval")) == list("abcdef")
    with pytest.raises(UsageError, match="leaves none to train on"):
        load_prompts(path, holdout=6)
    assert not set(load_prompts("tiny")) & set(load_prompts("tiny", split="eval"))


def test_the_sampler_draws_each_prompt_once_an_epoch() -> None:
    texts = [str(number) for number in range(10)]
    sampler = PromptSampler(texts, 4, seed=3)
    steps = [sampler.at(step) for step in range(5)]
    drawn = [text for step in steps for text in step]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == sorted(texts)
    assert drawn[:10] != drawn[10:]
    assert PromptSampler(ListedTexts(texts), 4, seed=3).at(2) == steps[2]
    order = random.Random("prompts 3 0").sample(range(10), 10)
    assert drawn[:10] == [texts[place] for place in order]
    assert PromptSampler(["only"], 3, seed=0).at(7) == ["only"] * 3


@pytest.mark.parametrize("kind", ["lines", "JSON lines"])
def test_a_large_file_stays_on_disk(kind: str, tmp_path: Path) -> None:
    """100,000 prompts of 240 bytes, 24 MB: the pool and a step's draw hold a few of them."""
    line, path = "x" * 230, tmp_path / ("large.txt" if kind == "lines" else "large.jsonl")
    with path.open("w") as file:
        for number in range(100_000):
            text = f"{number:08d} {line}"
            file.write(f"{text}\n" if kind == "lines" else f'{{"prompt": "{text}"}}\n')
    tracemalloc.start()
    try:
        sampler = PromptSampler(load_prompts(str(path)), 256, seed=0)
        drawn = sampler.at(0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(sampler.prompts) == 100_000
    assert len(set(drawn)) == 256
    assert held < 5_000_000
