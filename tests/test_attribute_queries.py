"""`dpg attribute` with many questions: where they come from, what they leave, and that each is answered as if alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from dpg_cli.attribution.attribute import DEFAULTS, Request, attribute
from dpg_cli.attribution.queries import of_rows
from dpg_cli.attribution.work import work_folder
from dpg_cli.cli.app import app
from dpg_cli.errors import DpgError, UsageError
from dpg_cli.planning.memory import Need, widest
from dpg_cli.settings.presets import resolve
from dpg_cli.tiny import world

COUNT = 10
METRIC_FILE = """
[spanish]
name = "text-loss"
language = "es"
documents = 2

[small]
name = "norm"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data, and questions in two languages."""
    rows = [{"text": text} for code in ("en", "es") for text in world.sentences("train", code, COUNT // 2, seed=3)]
    asked = [
        {"id": f"{code}{number}", "text": text, "language": code}
        for code in ("en", "es")
        for number, text in enumerate(world.sentences("eval", code, 2, seed=1))
    ]
    for name, lines in (("data", rows), ("asked", asked)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def call(place: Path, *flags: object, out: str = "scores.parquet") -> dict[str, Any]:
    arguments = ["attribute", place / "data.jsonl", "--batch-size", "4", "--out", place / out, "--json", *flags]
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert answer.exit_code == 0, answer.output
    return dict(json.loads(answer.stdout))


def refusal(place: Path, *flags: object) -> str:
    arguments = ["attribute", place / "data.jsonl", "--out", place / "none.parquet", *flags]
    answer = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(answer.exception, DpgError), answer.output
    return str(answer.exception)


def near(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max() / np.abs(right).max())


def test_rows_are_queries_and_groups_of_them_too(place: Path) -> None:
    report = call(place, "--query", f"{place}/asked.jsonl:text", "--top", 2)
    assert [answer["name"] for answer in report["queries"]] == ["en0", "en1", "es0", "es1"]
    table = pq.read_table(place / "scores.parquet")
    assert table.column_names == ["query", "example_id", "text", "score"]
    scores = np.array(table["score"]).reshape(4, COUNT)
    assert table["example_id"].to_pylist() == list(range(COUNT)) * 4
    assert table["query"].to_pylist() == [name for name in ("en0", "en1", "es0", "es1") for _ in range(COUNT)]
    for number, answer in enumerate(report["queries"]):
        order = np.argsort(-scores[number])
        assert [row["example_id"] for row in answer["helpful"]] == order[:2].tolist()
        assert [row["example_id"] for row in answer["harmful"]] == order[::-1][:2].tolist()
        assert answer["value"] != answer["value_before"]
    record = json.loads((place / "scores.parquet.json").read_text(encoding="utf-8"))
    assert [query["name"] for query in record["queries"]] == ["en0", "en1", "es0", "es1"]
    assert record == json.loads(pq.read_schema(place / "scores.parquet").metadata[b"dpg"])
    # one of them alone, as held-out text
    alone = place / "alone.jsonl"
    alone.write_text((place / "asked.jsonl").read_text(encoding="utf-8").splitlines()[2], encoding="utf-8")
    call(place, "--eval-text", f"{alone}:text", out="alone.parquet")
    assert near(scores[2], np.array(pq.read_table(place / "alone.parquet")["score"])) < 1e-4
    # a language's two rows as one question: the mean of their losses, each by its own tokens
    grouped = call(place, "--query", f"{place}/asked.jsonl:text", "--query-by", "language", out="grouped.jsonl")
    assert [answer["name"] for answer in grouped["queries"]] == ["en", "es"]
    lines = [json.loads(line) for line in (place / "grouped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 2 * COUNT and set(lines[0]) == {"query", "example_id", "text", "score"}
    found = np.array([line["score"] for line in lines]).reshape(2, COUNT)
    assert np.all(found.min(0) >= -1) and not np.allclose(found[0], found[1])
    low, high = np.minimum(scores[2], scores[3]), np.maximum(scores[2], scores[3])
    assert np.all((low - 1e-9 <= found[1]) & (found[1] <= high + 1e-9))  # a weighted mean of the two


def test_tensors_and_tokens(place: Path) -> None:
    flags = ("--query", f"{place}/asked.jsonl:text", "--metric-file", place / "metrics.toml", "--metric", "norm")
    (place / "metrics.toml").write_text(METRIC_FILE, encoding="utf-8")
    call(place, *flags, out="scores.safetensors")
    with safe_open(place / "scores.safetensors", "np") as file:
        record = json.loads(file.metadata()["dpg"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    assert record["names"] == ["norm", "spanish", "small", "en0", "en1", "es0", "es1"]
    assert tensors["scores"].shape == (7, COUNT)
    assert tensors["token_scores"].shape == (7, *tensors["token_ids"].shape)
    assert near(tensors["token_scores"].sum(2), tensors["scores"]) < 1e-5
    assert tensors["example_ids"].tolist() == list(range(COUNT))
    assert near(tensors["scores"][0], tensors["scores"][2]) < 1e-5  # the norm is asked twice
    call(place, *flags, "--token-scores", out="tokens.parquet")
    table = pq.read_table(place / "tokens.parquet")
    first = table["token_scores"][0].as_py()
    assert len(first) == tensors["lengths"][0]
    assert near(np.array(first), tensors["token_scores"][0, 0, : len(first)]) < 1e-5


def test_in_groups_where_memory_is_short_and_killed_between_them(place: Path) -> None:
    queries = tuple(of_rows(f"{place}/asked.jsonl:text"))
    request = Request(str(place / "data.jsonl"), place / "scores.parquet", queries=queries)
    flags = {"inner": {"states": "sqrt", "batch_size": 4}}
    config = resolve({**DEFAULTS, "metric": {"name": "text-loss", "file": "x"}}, [], flags)
    together = attribute(config, request)
    assert together.width == 4
    from dataclasses import replace

    in_groups = replace(request, out=place / "groups.parquet", width=3)
    calls: list[tuple[str, int]] = []

    def killing(phase: str, done: int, total: int) -> None:
        calls.append((phase, done))
        assert total == 2 * together.inner_steps
        if calls[-1] == ("reverse", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute(config, in_groups, on_progress=killing)
    folder = work_folder(in_groups.out)
    assert (folder / "group-0.safetensors").is_file()
    assert not (folder / "group-0").exists() and (folder / "group-1").is_dir()
    begun = len(calls)
    result = attribute(config, in_groups, on_progress=lambda *step: calls.append(step[:2]))
    assert calls[begun][0] == "reverse"  # neither the first group nor the second's fine-tuning is made again
    assert result.width == 3 and len(result.answers) == 4
    assert not folder.exists()
    scores = [np.array(pq.read_table(one.out)["score"]) for one in (request, in_groups)]
    assert near(scores[1], scores[0]) < 1e-5


def test_the_planner_picks_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpg_cli.planning import memory

    cpu = __import__("torch").device("cpu")
    need = Need(10_000_000, 4, 100, "sqrt", 8, 64, 2, 64, 2, 512, 32)
    one = memory.peak_bytes(need, cpu)
    each = 3 * 10_000_000 * 4
    for room, width in ((100 * each, 16), (9 * each, 8), (5 * each, 4), (0, 1)):
        monkeypatch.setattr(memory, "machine_bytes", lambda device, room=room: one + room)
        assert widest(need, 16, cpu) == width


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--query-by", "language"], "--query-by groups the rows of --query"),
        (["--query", "{asked}", "--query-by", "languages"], "no column 'languages'. Did you mean language?"),
        (["--metric", "norm", "--metric", "norm"], "Two queries are called 'norm'"),
        (["--metric", "norm", "--metric", "pattern", "--language", "en"], "--language is for --metric text-loss"),
        (["--query", "{asked}", "--set", "metric.documents=3"], "--set metric.KEY is for one metric"),
        (["--metric-file", "{place}/bad.toml"], "[mine] text-loss.language"),
        (["--metric-file", "{place}/code.toml"], "Name it too: --metric mine.py:Mine"),
        (["--metric-file", "{place}/none.toml"], "has no query"),
        (["--query", "{place}/twice.jsonl"], "Two rows of"),
    ],
)
def test_refusals(flags: list[str], words: str, place: Path) -> None:
    (place / "bad.toml").write_text('[mine]\nname = "text-loss"\nlanguage = "xx"\n', encoding="utf-8")
    (place / "code.toml").write_text('[mine]\nname = "custom"\npath = "mine.py:Mine"\n', encoding="utf-8")
    (place / "none.toml").write_text("", encoding="utf-8")
    (place / "twice.jsonl").write_text('{"id": "a", "text": "a cat"}\n{"id": "a", "text": "a dog"}\n', encoding="utf-8")
    given = [flag.format(asked=f"{place}/asked.jsonl:text", place=place) for flag in flags]
    assert words in refusal(place, *given)


def test_a_row_that_cannot_name_a_query_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"id": "a", "text": "a cat"}\n{"id": [1], "text": "a dog"}\n', encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2: id is \[1\], no name of a query"):
        of_rows(str(path))


def test_the_screen_has_each_query(place: Path) -> None:
    arguments = ["attribute", place / "data.jsonl", "--query", f"{place}/asked.jsonl:text", "--top", "1"]
    answer = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--out", place / "s.parquet"]])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.count("Most helpful") == 4
    for name in ("en0", "es1"):
        assert f"{name}: a lower loss on" in answer.stdout
    assert "4 queries (4 at once)" in answer.stdout
