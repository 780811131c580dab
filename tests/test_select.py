"""From scores to data: the choice, every format written back byte for byte, refusals, and retraining beside the prediction."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import dpg

from dpg_cli.attribution.attribute import DEFAULTS, Request, attribute
from dpg_cli.attribution.page.gather import gather as page_facts
from dpg_cli.attribution.reading import Asked, Table
from dpg_cli.data.sources import open_rows
from dpg_cli.errors import UsageError
from dpg_cli.metrics.behaviour.answers import said_in
from dpg_cli.selection.choice import Wish, choose
from dpg_cli.selection.retrain import retrain
from dpg_cli.selection.select import home_of, place_of, read_selection, select
from dpg_cli.settings.presets import resolve

SCORES = [0.5, -2.0, 0.0, -1.0, 1.5, -1.0]  # of the rows 0, 1, 2, 4, 5, 6: row 3 is blank and has none
IDS = [0, 1, 2, 4, 5, 6]


def table(**other: Any) -> Table:
    made = {"path": Path("s"), "record": {}, "queries": [Asked("q")], "texts": [""] * 6}
    made |= {"ids_N": np.array(IDS), "scores_Q_N": np.array([SCORES])}
    return Table(**{**made, **other})


def test_the_choice_by_hand() -> None:
    worst = choose(table(), Wish(drop=2))
    assert worst.dropped == (1, 6)  # of the two at -1 the later one
    assert worst.predicted == {"q": 3.0}
    best = choose(table(), Wish(drop=2, side="helpful"))
    assert best.dropped == (0, 5)
    assert best.predicted == {"q": -2.0}
    kept = choose(table(), Wish(keep=2))
    assert kept.dropped == (1, 2, 4, 6)
    assert kept.only
    weighed = choose(table(), Wish(weight=1.0))
    assert weighed.weights == {0: 1.25, 1: 0.0, 2: 1.0, 4: 0.5, 5: 1.75, 6: 0.5}
    assert weighed.dropped == ()
    assert weighed.predicted["q"] == pytest.approx(0.125 + 2.0 + 0.5 + 1.125 + 0.5)


def test_one_query_of_several_chooses_and_all_are_predicted() -> None:
    two = table(queries=[Asked("a"), Asked("b")], scores_Q_N=np.array([SCORES, SCORES[::-1]]))
    found = choose(two, Wish(drop=1, query="b"))
    assert found.dropped == (5,)
    assert found.predicted == {"a": -1.5, "b": 2.0}
    with pytest.raises(UsageError, match="of 2 queries"):
        choose(two, Wish(drop=1))
    with pytest.raises(UsageError, match="no query 'c'"):
        choose(two, Wish(drop=1, query="c"))


@pytest.mark.parametrize("wish", [Wish(), Wish(drop=1, keep=1), Wish(drop=6), Wish(keep=6)])
def test_what_is_no_choice_is_refused(wish: Wish) -> None:
    with pytest.raises(UsageError):
        choose(table(), wish)
    with pytest.raises(UsageError, match="All scores are 0"):
        choose(table(scores_Q_N=np.zeros((1, 6))), Wish(drop=1))


ROWS = [{"text": "ä first", "n": 0}, {"text": "se,cond \"x\"\nline", "n": 1}, {"text": "third", "n": 2}, {"text": "", "n": 3},
        {"text": "fourth", "n": 4}, {"text": "fi\u2028fth", "n": 5}, {"text": "sixth", "n": 6}]  # fmt: skip


def written(place: Path, kind: str) -> tuple[Path, list[bytes]]:
    """The rows as a file, and its pieces: what stands before the rows, each row, what stands after them."""
    path = place / f"data.{kind}"
    if kind == "txt":
        parts = [
            b"",
            *(row["text"].replace("\n", " ").encode() + (b"\r\n" if row["n"] % 2 else b"\n") for row in ROWS),
            b"",
        ]
    elif kind in ("jsonl", "jsonl.gz"):
        parts = [
            b"\xef\xbb\xbf",
            *(f'{{ "n":{r["n"]},  "text": {json.dumps(r["text"])}}}\n'.encode() for r in ROWS),
            b"",
        ]
    elif kind == "json":
        rows = [json.dumps(row, indent=1).encode() for row in ROWS]
        parts = [b"[\n", *rows, b"\n]\n"]
    elif kind in ("csv", "tsv"):
        sign = "," if kind == "csv" else "\t"
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in ROWS]
        parts = [
            f"n{sign}text\r\n".encode(),
            *(f"{r['n']}{sign}{q}\r\n".encode() for r, q in zip(ROWS, quoted, strict=True)),
            b"",
        ]
    data = b"".join(parts) if kind != "json" else parts[0] + b" ,\n".join(parts[1:-1]) + parts[-1]
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path, parts


def scored(place: Path, source: Path, scores: list[float] = SCORES, ids: list[int] = IDS) -> Path:
    path = place / "scores.jsonl"
    path.write_text(
        "".join(json.dumps({"example_id": n, "score": s, "text": ""}) + "\n" for n, s in zip(ids, scores, strict=True))
    )
    path.with_name("scores.jsonl.json").write_text(json.dumps({"request": {"data": str(source)}, "about": "q"}))
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "json", "csv", "tsv"])
def test_what_stays_is_there_byte_for_byte(kind: str, tmp_path: Path) -> None:
    source, parts = written(tmp_path, kind)
    before = source.read_bytes()
    found = select(scored(tmp_path, source), Wish(drop=2), out=tmp_path / f"out.{kind}")
    stays = [parts[0], *(parts[1 + row["n"]] for row in ROWS if row["n"] not in (1, 6)), parts[-1]]
    want = b"".join(stays) if kind != "json" else stays[0] + b" ,\n".join(stays[1:-1]) + stays[-1]
    data = found.out.read_bytes()
    assert (gzip.decompress(data) if kind.endswith(".gz") else data) == want
    assert (found.kept, found.rows) == (5, 7)
    assert source.read_bytes() == before
    rows = open_rows(str(found.out), split="train", what="rows", flag="DATA")
    assert len(rows) == 5
    only = select(scored(tmp_path, source), Wish(keep=1), out=tmp_path / f"only.{kind}")
    assert only.kept == 1
    assert b"fi" in (gzip.decompress(only.out.read_bytes()) if kind.endswith(".gz") else only.out.read_bytes())


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_weights_are_a_column(kind: str, tmp_path: Path) -> None:
    source, _ = written(tmp_path, kind)
    found = select(scored(tmp_path, source), Wish(weight=1.0), out=tmp_path / f"out.{kind}")
    rows = [row for _, row in open_rows(str(found.out), split="train", what="rows", flag="DATA").walk()]
    assert [float(row["weight"]) for row in rows] == [1.25, 0.0, 1.0, 1.0, 0.5, 1.75, 0.5]
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    again = scored(tmp_path, found.out)
    with pytest.raises(UsageError, match="column 'weight' already"):
        select(again, Wish(weight=1.0), out=tmp_path / f"twice.{kind}")
    assert not (tmp_path / f"twice.{kind}").exists()


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    schema = pa.schema([("n", pa.int16()), ("text", pa.large_string())], metadata={b"mine": b"1"})
    source = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS, schema=schema), source, row_group_size=3, compression="gzip")
    found = select(scored(tmp_path, source), Wish(drop=2), out=tmp_path / "out.parquet")
    got = pq.ParquetFile(found.out)
    assert got.schema_arrow.equals(schema, check_metadata=True)
    assert got.metadata.row_group(0).column(0).compression == "GZIP"
    assert got.read()["n"].to_pylist() == [0, 2, 3, 4, 5]
    weighed = select(scored(tmp_path, source), Wish(weight=1.0), out=tmp_path / "w.parquet")
    assert pq.read_table(weighed.out)["weight"].to_pylist() == [1.25, 0.0, 1.0, 1.0, 0.5, 1.75, 0.5]


def test_a_datasets_folder_keeps_its_other_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
    whole.save_to_disk(str(tmp_path / "data"))
    found = select(scored(tmp_path, tmp_path / "data"), Wish(drop=2), out=tmp_path / "out")
    got = datasets.load_from_disk(str(found.out))
    assert got["train"]["n"] == [0, 2, 3, 4, 5]
    assert got["test"]["n"] == [0, 1]
    assert got["train"].features == whole["train"].features


def test_refusals_write_nothing(tmp_path: Path) -> None:
    source, _ = written(tmp_path, "jsonl")
    scores = scored(tmp_path, source)
    (tmp_path / "there.jsonl").write_text("mine")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"out": tmp_path / "out.csv"}, "does not end so"),
        ({"out": tmp_path / "there.jsonl"}, "exists already"),
        ({"out": source, "overwrite": True}, "would write onto"),
        ({"out": scores, "overwrite": True}, "would write onto"),
        ({"out": tmp_path / "no" / "out.jsonl"}, "no folder"),
        ({"data": str(tmp_path / "gone.jsonl"), "out": tmp_path / "x.jsonl"}, "cannot be read"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for options, words in cases:
        with pytest.raises(UsageError, match=words):
            select(scores, Wish(drop=1), **options)
    short = tmp_path / "short.jsonl"
    short.write_bytes(b"".join(source.read_bytes().splitlines(True)[:4]))
    with pytest.raises(UsageError, match="has changed"):
        select(scores, Wish(drop=1), data=str(short), out=tmp_path / "x.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "short.jsonl"])
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    lines, _ = written(tmp_path, "txt")
    with pytest.raises(UsageError, match="no room for a weight"):
        select(scored(tmp_path, lines), Wish(weight=1.0), out=tmp_path / "w.txt")
    assert not (tmp_path / "w.txt").exists()


@pytest.fixture(scope="module")
def attributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of a fine-tuning on prompts answered in English and in German, for German answers."""
    place = tmp_path_factory.mktemp("attributed")
    pairs = zip(said_in("en", 80)[32:], said_in("de", 80)[32:], strict=True)
    rows = [{"prompt": prompt, "completion": answer} for pair in pairs for prompt, answer in pair]
    (place / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**DEFAULTS, "metric": {"name": "custom", "path": "answer-probability"}}
    config = resolve({**settings, "inner": {**DEFAULTS["inner"], "batch_size": 16, "lr": 3e-4, "epochs": 2.0}}, [], {})
    attribute(config, Request(data=str(place / "sft.jsonl"), out=place / "scores.parquet"))
    return place


def test_retraining_stands_beside_the_prediction(attributed: Path) -> None:
    """Without the German rows German answers are less likely, as predicted; the record and the page say both."""
    scores = attributed / "scores.parquet"
    found = select(scores, Wish(drop=32, side="helpful"), out=attributed / "kept.jsonl")
    german = sum(number % 2 for number in found.choice.dropped)
    assert german >= 30  # every other row is German
    assert next(iter(found.choice.predicted.values())) < 0
    result = retrain(attributed / "kept.jsonl")
    assert result.verified
    assert result.examples == (96, 64)
    assert result.steps == (12, 8)
    change = result.changes[0]
    made = read_selection(attributed / "kept.jsonl")
    assert made is not None
    record = made["scores_record"]
    assert change.whole == pytest.approx(record["phi"], rel=1e-5)  # stock PyTorch ends where the attributed run did
    assert change.before == pytest.approx(record["phi_before"], rel=1e-6)
    done = dpg("verify", attributed / "kept.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["queries"][0]["measured"] == pytest.approx(change.measured, rel=1e-5)
    shown = page_facts(scores).selections
    assert [(one["name"], one["kept"]) for one in shown] == [("kept.jsonl", 64)]
    assert shown[0]["changes"][0][2] == pytest.approx(change.measured, rel=1e-5)


def test_changed_data_and_foreign_selections_are_refused(attributed: Path, tmp_path: Path) -> None:
    scores = attributed / "scores.parquet"
    changed = tmp_path / "sft.jsonl"
    changed.write_text((attributed / "sft.jsonl").read_text().replace("er", "ER"))
    with pytest.raises(UsageError, match="has changed"):
        select(scores, Wish(drop=3), data=str(changed), out=tmp_path / "kept.jsonl")
    with pytest.raises(UsageError, match="is no selection"):
        retrain(changed)
    select(scores, Wish(weight=1.0), out=tmp_path / "w.jsonl")
    with pytest.raises(UsageError, match="needs a trainer"):
        retrain(tmp_path / "w.jsonl")
    place_of(changed).write_text("[1]")
    with pytest.raises(UsageError, match="no record of a selection"):
        retrain(changed)


def test_the_command(attributed: Path, tmp_path: Path) -> None:
    done = dpg("select", attributed / "scores.parquet", "--drop", "5", "--out", tmp_path / "kept.jsonl")
    assert done.returncode == 0, done.stderr
    assert "91 of 96 rows, the 5 lowest-scored, whose weight lowers phi, left out" in done.stdout
    assert f"Next: dpg verify {tmp_path / 'kept.jsonl'}" in done.stdout
    wrong = dpg("select", attributed / "scores.parquet", "--drop", "5", "--side", "bad")
    assert wrong.returncode == 2
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_relative_paths_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of the working folder that the selection was made in, unless this one has some of that name."""
    source, _ = written(tmp_path, "jsonl")
    scores = scored(tmp_path, source)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    found = select(scores, Wish(drop=2), data=source.name, out=Path("out") / "kept.jsonl")
    assert home_of(found.out) == tmp_path
    place = found.out.absolute()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert home_of(place).resolve() == tmp_path.resolve()
    (tmp_path / "elsewhere" / source.name).write_text("")
    assert home_of(place) == tmp_path / "elsewhere"
