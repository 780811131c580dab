"""The page of an attribution: its facts from every format, folding, and what a reader meets in headless Chromium."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import Browser, find_browser
from test_cli import dpg

from dpg_cli.attribution.page import write_page
from dpg_cli.attribution.page.fold import folded
from dpg_cli.attribution.page.gather import gather
from dpg_cli.attribution.reading import read_scores
from dpg_cli.errors import UsageError

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'{{7*7}}"
WORDS = (
    "the",
    "king",
    "sold",
    "an",
    "old",
    "map",
    "to",
    "a",
    "merchant",
    "who",
    "sails",
    "at",
    "night",
    "and",
    "sings",
)
browsed = pytest.mark.skipif(find_browser() is None, reason="no Chromium here (Debian: apt-get install chromium)")


def make(path: Path, count: int = 60, queries: int = 1, texts: list[str] | None = None) -> Path:
    """A scores file of random rows, as `dpg attribute` writes it; the first and the last row are equal."""
    rng, numbers = random.Random(0), np.random.default_rng(0)
    said = texts or [" ".join(rng.choices(WORDS, k=rng.randint(6, 20))) for _ in range(count)]
    said[-1] = said[0]
    rows = []
    for query in range(queries):
        for row, text in enumerate(said):
            tokens = [text[at : at + 5] for at in range(0, len(text), 5)]
            scores = numbers.standard_normal(len(tokens)).tolist()
            entry: dict[str, Any] = {"query": f"question {query}"} if queries > 1 else {}
            entry |= {"example_id": 2 * row, "text": text, "score": sum(scores), "tokens": tokens}
            rows.append({**entry, "token_scores": scores})
    record: dict[str, Any] = {"about": "a lower loss", "phi_before": -2.0, "phi": -1.5, "seed": 3, "notes": ["a note"]}
    if queries > 1:
        record["queries"] = [{"name": f"question {q}", "phi_before": -2.0, "phi": -1.0 - q} for q in range(queries)]
    path.with_name(f"{path.name}.json").write_text(json.dumps(record))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("queries", [1, 3])
def test_every_format_is_read_alike(ending: str, queries: int, tmp_path: Path) -> None:
    facts = gather(make(tmp_path / f"scores.{ending}", queries=queries))
    assert facts.scores_Q_N.shape == (queries, 60)
    assert facts.ids_N.tolist() == list(range(0, 120, 2))
    assert [query.after for query in facts.queries] == ([-1.5] if queries == 1 else [-1.0, -2.0, -3.0])
    for scores_N, query in zip(facts.scores_Q_N, facts.queries, strict=True):
        assert set(query.tokens) == set(range(60))
        for row, pieces in query.tokens.items():
            assert "".join(text for text, _, _ in pieces) == facts.texts[row]
            assert sum(score for _, score, _ in pieces) == pytest.approx(scores_N[row], rel=1e-5)
            assert all(-5 <= shade <= 5 for _, _, shade in pieces)
    assert facts.stands_N[-1] == 0
    assert facts.stands_N[1] == 1


def test_only_the_ends_of_a_ranking_have_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOST", "LEAST"):
        monkeypatch.setitem(gather.__globals__, name, 4)
    facts = gather(make(tmp_path / "scores.parquet", queries=2))
    for scores_N, query in zip(facts.scores_Q_N, facts.queries, strict=True):
        order = np.argsort(scores_N).tolist()
        assert set(query.tokens) == {*order[:4], *order[-4:]}


def test_what_says_the_same_is_folded() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    texts = ["A  map", "a map", long, long + " sixteen", long.replace("two", "2"), "", "!", "other words here"]
    assert folded(texts, range(len(texts))).tolist() == [
        0,
        0,
        2,
        2,
        4,
        5,
        6,
        7,
    ]  # 13 of 14 shingles shared; then 11 of 15
    assert folded(texts, []).tolist() == [0, 0, 2, 3, 4, 5, 6, 7]


def test_what_is_no_scores_file_is_refused_in_one_line(tmp_path: Path) -> None:
    good = make(tmp_path / "scores.parquet", queries=2)
    (tmp_path / "torn.parquet").write_bytes(good.read_bytes()[:900])
    rows = pq.read_table(good)
    pq.write_table(rows.slice(0, 70), tmp_path / "half.parquet")
    (tmp_path / "odd.jsonl").write_text('{"text": "no score"}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "none.csv").write_text("example_id,score\n")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "t.safetensors").write_bytes(b"")
    cases = {
        "torn.parquet": "cannot be read", "half.parquet": "no whole scores file", "odd.jsonl": "no scores file",
        "list.jsonl": "cannot be read", "none.csv": "no whole scores file", "notes.txt": "ends in none",
        "t.safetensors": "without texts", "missing.csv": "There are no scores",
    }  # fmt: skip
    for name, words in cases.items():
        with pytest.raises(UsageError, match=words) as refused:
            read_scores(tmp_path / name)
        assert "\n" not in refused.value.cause


def test_the_command_writes_it_beside_the_scores(tmp_path: Path) -> None:
    scores = make(tmp_path / "scores.parquet")
    done = dpg("report", str(scores), "--json")
    assert done.returncode == 0, done.stdout
    page = tmp_path / "scores.html"
    assert json.loads(done.stdout)["bytes"] == page.stat().st_size
    before = page.read_bytes()
    again = dpg("report", str(scores))
    assert again.returncode == 2
    assert "exists already" in again.stderr
    assert page.read_bytes() == before
    onto = dpg("report", str(scores), "--out", str(scores), "--overwrite")
    assert onto.returncode == 2
    assert "onto the scores" in onto.stderr
    assert dpg("report", str(scores), "--overwrite").returncode == 0


@browsed
def test_a_reader_finds_the_examples(tmp_path: Path) -> None:
    """Ranks, tokens, search, folding, the prediction, the other question, keys; nothing from outside, no complaint."""
    scores = make(tmp_path / "scores.parquet", queries=2)
    facts = gather(scores)
    page = write_page(scores)
    ready = (
        "new Promise(done => {const look = () => document.body.dataset.ready ? done(1) : setTimeout(look, 20); look()})"
    )
    with Browser(tmp_path / "profile") as browser:
        browser.look(1300, 900)
        browser.open(page)
        browser.evaluate(ready)
        order = np.argsort(-facts.scores_Q_N[0], kind="stable")
        first = "document.querySelector('#helpful .text').textContent"
        assert browser.evaluate(first) == facts.texts[order[0]]
        assert browser.evaluate("document.querySelector('#harmful .text').textContent") == facts.texts[order[-1]]
        assert f"row {2 * order[0]}" in browser.evaluate("document.querySelector('#helpful .meta').textContent")
        assert browser.evaluate("document.querySelectorAll('#helpful > li').length") == 10
        colours = browser.evaluate(
            "new Set([...document.querySelectorAll('#helpful .text span')].map(s => getComputedStyle(s).backgroundColor)).size"
        )
        assert colours >= 4
        assert browser.evaluate("document.querySelectorAll('#histogram rect').length") == 60
        # the sum of the five lowest scores, with its sign turned
        browser.evaluate(
            "{const top = document.getElementById('top'); top.value = 5; top.dispatchEvent(new Event('input'))}"
        )
        lowest = -np.sort(facts.scores_Q_N[0])[:5].sum()
        said = browser.evaluate("document.getElementById('predicted').textContent")
        assert f"changes by +{float(f'{lowest:.4g}'):g}" in said
        # the first and the last row are equal: searched for, they come once or twice
        seek = "{const box = document.getElementById('search'); box.value = %s; box.dispatchEvent(new Event('input'))}"
        browser.evaluate(seek % json.dumps(facts.texts[0]))
        browser.settle()
        assert browser.evaluate("document.getElementById('status').textContent") == "2 examples"
        total = "[...document.querySelectorAll('#helpful > li, #harmful > li')].filter(e => e.querySelector('.text')).length"
        together = np.sign(facts.scores_Q_N[0][0]) == np.sign(facts.scores_Q_N[0][-1])
        assert browser.evaluate(total) == (1 if together else 2)
        browser.evaluate(
            "{const fold = document.getElementById('fold'); fold.value = 'no'; fold.dispatchEvent(new Event('change'))}"
        )
        browser.settle()
        assert browser.evaluate(total) == 2
        browser.evaluate(seek % '""')
        # keys
        browser.evaluate("document.activeElement.blur()")
        for key in ("]", "j"):
            event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}})"
            browser.evaluate(f"document.body.dispatchEvent({event})")
            browser.settle()
        assert browser.evaluate("document.getElementById('question').textContent") == "question 1"
        best = facts.texts[int(np.argmax(facts.scores_Q_N[1]))]
        assert browser.evaluate(first) == best
        assert browser.evaluate("document.activeElement === document.querySelector('#helpful > li')")
        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith("data:") and url != page.as_uri()] == []
        browser.look(360, 800, "dark")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"


@browsed
def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    page = write_page(make(tmp_path / "scores.parquet", texts=[HOSTILE, HOSTILE + " and more", HOSTILE]))
    with Browser(tmp_path / "profile") as browser:
        browser.look(1300, 900)
        browser.open(page)
        browser.settle()
        assert browser.evaluate("window.hacked") is None
        shown = browser.evaluate("[...document.querySelectorAll('.rows .text')].map(e => e.textContent)")
        assert HOSTILE in shown
        assert browser.complaints == []
