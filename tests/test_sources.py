"""Users' own texts: files, columns, datasets, the hub; read lazily, refused in one line."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpg_cli.data.prompts import PromptSampler, load_prompts
from dpg_cli.data.sources import Source, absolute, open_texts, parse
from dpg_cli.data.texts import LineTexts, ListedTexts, ParquetTexts, Part
from dpg_cli.errors import UsageError

KEYS = ("prompt", "text")


def opened(source: object, limit: int = 0, split: str = "train") -> list[str]:
    return list(open_texts(str(source), KEYS, split=split, what="prompts", flag="--prompts", limit=limit))


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
    assert opened(odd) == ["one"]


def test_lines_and_json_lines(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffone\r\n\n  \nzwölf  Boxkämpfer\nlast".encode())
    assert opened(text) == ["one", "zwölf  Boxkämpfer", "last"]
    rows = [{"prompt": "p1", "text": "t1"}, {"text": "t2\nx"}, {"prompt": "p3", "question": "q"}]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + json.dumps(rows[2]))
    assert opened(lines) == ["p1", "t2\nx", "p3"]
    with pytest.raises(UsageError, match=r"a\.jsonl, line 1: no JSON object with a `question` string"):
        opened(f"{lines}:question")
    pool = LineTexts(lines, ("prompt", "text"))
    assert (pool[2], pool[-1], pool[0:2]) == ("p3", "p3", ["p1", "t2\nx"])
    assert pool.take([2, 0, 2]) == ["p3", "p1", "p3"]
    with pytest.raises(IndexError):
        pool[3]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=8))
def test_any_lines_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("lines")
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert list(LineTexts(folder / "a.jsonl", ["text"])) == texts
    plain = [text.replace("\n", "").replace("\r", "") for text in texts]
    (folder / "a.txt").write_bytes("\n".join(["x", *plain]).encode())
    assert list(LineTexts(folder / "a.txt")) == ["x", *(text for text in plain if text.encode().strip())]


@pytest.mark.parametrize("keep", [1 << 20, 0])
def test_parquet_kept_or_read_by_row_groups(keep: int, tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(100)]
    table = pa.table({"nested": [{"text": 1, "b": 2}] * 100, "text": texts, "number": range(100)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    pool = ParquetTexts(tmp_path / "a.parquet", KEYS, keep=keep)
    assert (pool.kept is None) == (keep == 0)
    order = random.Random(0).sample(range(100), 100)
    assert pool.take(order) == [texts[place] for place in order]
    assert list(Part(pool, 90, 100)) == texts[90:]
    with pytest.raises(UsageError, match="holds int64, not text"):
        opened(f"{tmp_path / 'a.parquet'}:number")
    with pytest.raises(UsageError, match="has no column 'title'; it has nested, text, number"):
        opened(f"{tmp_path / 'a.parquet'}:title")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(UsageError, match="rows without text"):
        opened(tmp_path / "null.parquet")


def test_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "other": ["x", "y", "z"], "number": [1, 2, 3]})
    rows.save_to_disk(tmp_path / "one")
    assert opened(tmp_path / "one") == ["a", "b", "c"]
    assert opened(f"{tmp_path / 'one'}:other", limit=2) == ["x", "y"]
    both = datasets.DatasetDict({"train": rows, "test": rows.select([2])})
    both.save_to_disk(tmp_path / "both")
    assert opened(tmp_path / "both") == ["a", "b", "c"]
    assert opened(tmp_path / "both", split="test") == ["c"]
    assert opened(f"{tmp_path / 'both'}#test:other") == ["z"]
    with pytest.raises(UsageError, match="has no split 'dev'; it has train, test"):
        opened(f"{tmp_path / 'both'}#dev")
    with pytest.raises(UsageError, match="holds a int where text is needed"):
        opened(f"{tmp_path / 'one'}:number")
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

    def rows():
        for number in range(10**9):
            read.append(number)
            yield {"id": number, "text": f"article {number}"}

    def load_dataset(*arguments: object, **options: object) -> object:
        asked.append((arguments, options))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = load_prompts("some/wiki@2023.en#train:text", limit=12, holdout=2)
    assert list(prompts) == [f"article {number}" for number in range(10)]
    assert asked == [(("some/wiki", "2023.en"), {"split": "train", "streaming": True})]
    assert read == list(range(12))
    assert list(load_prompts("some/wiki@2023.en#train:text", split="eval", limit=12, holdout=2)) == [
        "article 10",
        "article 11",
    ]


def test_bad_sources_give_one_line_that_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"ok\n\xe9\n")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    for source, words in {
        "none.txt": "cannot be read: No such file",
        "nothing": "cannot be read: No such file",
        "a/none.parquet": "cannot be read: No such file",
        str(tmp_path / "blank.txt"): "are empty",
        str(tmp_path / "latin.txt"): "line 2: not UTF-8",
        str(tmp_path / "bad.parquet"): "no readable parquet file",
    }.items():
        with pytest.raises(UsageError, match=words) as caught:
            load_prompts(source)
        assert "\n" not in str(caught.value)
        assert caught.value.remedy
    with pytest.raises(UsageError, match="--prompts tiny, prose, empty, a text, JSONL or parquet file"):
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


def test_a_large_file_stays_on_disk(tmp_path: Path) -> None:
    """100,000 prompts of 240 bytes, 24 MB: the pool and a step's draw hold a few of them."""
    line = "x" * 230
    with (tmp_path / "large.txt").open("w") as file:
        for number in range(100_000):
            file.write(f"{number:08d} {line}\n")
    tracemalloc.start()
    try:
        sampler = PromptSampler(load_prompts(str(tmp_path / "large.txt")), 256, seed=0)
        drawn = sampler.at(0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(sampler.prompts) == 100_000
    assert len(set(drawn)) == 256
    assert held < 4_000_000
