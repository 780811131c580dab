"""`dpg attribute` at its doors: where scores go and what lies beside them, own metrics, rows shown, any terminal, hints."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from dpg_cli.attribution.outcome import Attribution, against_gradient
from dpg_cli.attribution.scores import FORMATS, SCHEMA, check_place, record_of
from dpg_cli.cli import main
from dpg_cli.cli.app import app
from dpg_cli.errors import DpgError, UsageError
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import load
from dpg_cli.settings.config import InnerConfig, TextLossOptions
from dpg_cli.tiny import world

ROWS = [
    {"prompt": "the old cat", "completion": " sees a boat."},
    {"prompt": "", "completion": ""},
    {"prompt": "the small dog " * 12, "completion": "sleeps now."},
    {"prompt": "a king", "completion": " sells a map."},
]
EVAL = ("--language", "en", "--set", "metric.documents=4")
METRIC = """
from dpg_cli.metrics.base import Metric
class Smaller(Metric):
    def __init__(self, target, power=2):
        super().__init__(target)
        self.power = power
    def __call__(self, parameters, model):
        return -sum((value.abs() ** self.power).sum() for value in parameters.values())
    def describe(self):
        return f"smaller weights (power {self.power})"
"""


def call(*arguments: object, code: int = 0) -> str:
    answer = CliRunner().invoke(app, ["attribute", *map(str, arguments)])
    assert answer.exit_code == code, answer.output
    return answer.stdout


def refusal(*arguments: object) -> str:
    answer = CliRunner().invoke(app, ["attribute", *map(str, arguments)])
    assert isinstance(answer.exception, DpgError), answer.output
    assert answer.exception.exit_code == 2
    assert "\n" not in str(answer.exception)
    return str(answer.exception)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "my rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read_scores(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    rows = list(csv.DictReader(io.StringIO(path.read_text(), newline="")))
    plain = {"text"}
    return [{key: value if key in plain else json.loads(value) for key, value in row.items()} for row in rows]


def test_scores_go_by_their_ending_and_carry_how_they_were_made(data: Path, tmp_path: Path) -> None:
    """The same rows in every format; numbers of the source, what was cut, what counts; a record beside and inside."""
    found = {}
    for ending in (known for known in FORMATS if known != ".safetensors"):  # which has no rows
        out = tmp_path / f"scores{ending}"
        report = json.loads(call(data, *EVAL, "--out", out, "--max-length", 24, "--seed", 3, "--json"))
        found[ending] = read_scores(out)
        record = json.loads(record_of(out).read_text())
        assert record["data"] == report["data"]
        assert (record["seed"], record["phi"], record["phi_before"]) == (3, report["value"], report["value_before"])
        assert (record["recipe"]["max_length"], record["recipe"]["lr"], record["inner_steps"]) == (24, 1e-4, 1)
        assert record["metric"]["language"] == "en"
        assert {len(value) for value in (*record["fingerprint"].values(), record["examples_sha256"])} == {64}
        if ending == ".parquet":
            assert json.loads(pq.read_schema(out).metadata[b"dpg"]) == record
    assert list(found[".parquet"][0]) == SCHEMA.names
    for rows in found.values():
        assert [row["example_id"] for row in rows] == [0, 2, 3]  # the rows' own numbers: the empty one is left out
        assert [row["cut"] > 0 for row in rows] == [False, True, False]
        assert [row["trained_tokens"] for row in rows] == [n["trained_tokens"] for n in found[".csv"]]
        assert rows[1]["trained_tokens"] == 0
        assert rows[1]["score"] == 0.0
        assert set(rows[1]["token_scores"]) == {0.0}
        assert [len(row["tokens"]) for row in rows] == [len(row["token_ids"]) for row in rows]
        for row in (rows[0], rows[2]):
            assert row["score"] != 0
            assert sum(score != 0 for score in row["token_scores"]) == row["trained_tokens"]
    assert [row["score"] for row in found[".jsonl"]] == [row["score"] for row in found[".parquet"]]
    assert (report["examples"], report["data"]["rows"], report["data"]["empty"], report["data"]["untrained"]) == (
        2,
        4,
        [1],
        1,
    )


def test_a_row_without_a_trained_token_changes_nothing_but_its_own_place(data: Path, tmp_path: Path) -> None:
    """It takes no place in a batch, as stock fine-tuning drops it."""
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps(ROWS[n]) + "\n" for n in (0, 3)))
    scores = []
    for source in (data, kept):
        call(
            source,
            *EVAL,
            "--out",
            tmp_path / "s.jsonl",
            "--max-length",
            24,
            "--overwrite",
            "--set",
            "inner.batch_size=1",
        )
        scores.append([row["score"] for row in read_scores(tmp_path / "s.jsonl") if row["trained_tokens"]])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2


def test_scores_never_go_onto_what_is_read(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    heldout, folder = tmp_path / "heldout.jsonl", tmp_path / "a folder"
    heldout.write_text('{"text": "the cat"}\n')
    folder.mkdir()
    link, hard = tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    link.symlink_to(data)
    hard.hardlink_to(data)
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (data, heldout)}
    for out in (data, f"./{data.name}", link, hard, folder / ".." / data.name):
        words = refusal(data, *EVAL, "--out", out, "--overwrite")
        assert "which is read" in words
    assert "which is read" in refusal(data, "--eval-text", heldout, "--out", heldout, "--overwrite")
    assert "which is read" in refusal(heldout, "--prompts", data, *EVAL, "--out", data, "--overwrite")
    check_place(tmp_path / "new.jsonl", [data, folder], False)
    with pytest.raises(UsageError, match="which is read"):
        check_place(folder / "new.jsonl", [data, folder], True)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in before} == before


def test_what_is_there_is_replaced_only_if_asked(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.csv"
    out.write_text("mine")
    assert "exists already. Name another file with --out, or add --overwrite." in refusal(data, *EVAL, "--out", out)
    assert out.read_text() == "mine"
    call(data, *EVAL, "--out", out, "--overwrite")
    assert len(read_scores(out)) == 3
    out.unlink()  # the record alone stands in the way too
    assert "scores.csv.json exists already" in refusal(data, *EVAL, "--out", out)
    for name, words in (
        ("scores.txt", "ends in none of .parquet, .jsonl, .csv"),
        ("no/such/x.csv", "--out"),
        ("d.csv", "--out"),
    ):
        (tmp_path / "d.csv").mkdir(exist_ok=True)
        assert words in refusal(data, *EVAL, "--out", tmp_path / name)


def test_a_metric_of_ones_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(METRIC)
    report = json.loads(call(data, "--metric", "mine.py:Smaller", "--set", "metric.options.power=1", "--json"))
    assert report["metric"] == "smaller weights (power 1)"
    record = json.loads(Path("scores.parquet.json").read_text())
    assert record["metric"]["sha256"] == hashlib.sha256(METRIC.encode()).hexdigest()
    assert all(row["score"] != 0 for row in read_scores(Path("scores.parquet")) if row["trained_tokens"])
    installed = json.loads(call(data, "--metric", "steer-direction", "--json", "--overwrite"))
    assert "forget" not in installed["metric"]
    for flags, words in (
        (["--metric", "mine.py"], "Give one of: --metric mine.py:Smaller"),
        (["--metric", "mine.py:Smallr"], "Did you mean Smaller?"),
        (["--metric", "steer-directon"], "Did you mean steer-direction?"),
        (["--metric", "mine.py:Smaller", "--language", "en"], "--language is for --metric text-loss"),
        (["--metric", "mine.py:Smaller", "--set", "metric.options.powr=1"], "takes no option 'powr'"),
        (["--metric", "mine.py:Smaller", "--out", "mine.py"], "ends in none of"),
    ):
        assert words in refusal(data, *flags, "--overwrite")


def test_show_prints_tokens_with_their_mask_and_trains_nothing(data: Path, tmp_path: Path) -> None:
    text = call(data, "--show", 2, "--max-length", 24, "--set", "metric.documents=4")
    assert f"{data}: 4 rows (JSON lines), trained: completion, context: prompt, " in text
    assert "1 row is empty and left out; the first is row 1." in text
    assert "[trained on] (context)" in text
    first, second = re.findall(r"row (\d+): ([\d,]+) of ([\d,]+) tokens count, ([\d,]+) cut away\n(.*)", text)
    assert (first[0], second[0]) == ("0", "2")
    line = first[4]
    assert re.sub(r"[\[\]()]", "", line) == "the old cat sees a boat.<|endoftext|>"
    assert line.index("(") < line.index("[")
    assert line.count("[") == int(first[1])
    assert line.count("(") + line.count("[") == int(first[2])
    assert (second[1], "[" in second[4]) == ("0", False)
    assert not list(tmp_path.glob("scores*"))
    coloured = CliRunner(env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).invoke(
        app, ["attribute", str(data), "--show", "1"]
    )
    assert "green: trained on; grey: context" in coloured.stdout
    assert "\x1b[32m" in coloured.stdout
    assert "\x1b[90m" in coloured.stdout


def printed(encoding: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bytes:
    """What the program itself prints on a stdout of an encoding."""

    class Kept(io.BytesIO):
        def close(self) -> None:  # a wrapper that is thrown away takes nothing along
            pass

    raw = Kept()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["dpg", *arguments])
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, write_through=True))
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 0
    return raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_any_terminal_will_do(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"text": "Φ → 😀 \x1b[31m the cat"}) + "\n")
    for flags in (["--show", "1"], [*EVAL, "--overwrite"], [*EVAL, "--overwrite", "--json"]):
        shown = printed(encoding, ["attribute", "a.jsonl", *flags], monkeypatch)
        assert b"\x1b" not in shown
        if "--json" in flags:
            tokens = json.loads(shown.decode())["helpful"][0]["tokens"]
            assert "".join(tokens).endswith("the cat<|endoftext|>")
        else:
            assert b"at" in shown


def test_pipes_and_compressed_files_through_a_shell(data: Path, tmp_path: Path) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data.read_bytes()))
    program = f"{shlex.quote(sys.executable)} -m dpg_cli attribute"
    wanted = call(data, "--show", 9).split("count", 1)[1]
    for source in ("<(cat a.jsonl.gz)", "- < a.jsonl.gz"):
        answer = subprocess.run(
            ["bash", "-c", f"{program} {source} --show 9"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.split("count", 1)[1] == wanted


def test_one_file_means_the_same_wherever_it_is_named(data: Path) -> None:
    """DATA and --eval-text: the loss is on the completion given the prompt, and the screen says so."""
    target = load("tiny", device=torch.device("cpu"))
    metric = build_metric(TextLossOptions(name="text-loss", file=str(data)), target)
    documents = metric.documents  # type: ignore[attr-defined]
    lines = call(data, "--show", 1).splitlines()
    assert metric.notes[0] == lines[0]  # type: ignore[attr-defined]
    counted = int(documents.label_N_S.sum()), int(documents.attention_N_S.sum())
    assert f"{counted[0]} of {counted[1]} tokens count" in lines[0]
    named = build_metric(TextLossOptions(name="text-loss", file=f"{data}:prompt"), target)
    assert "trained: prompt," in named.notes[0]  # type: ignore[attr-defined]
    own = build_metric(
        TextLossOptions(name="text-loss", file="prose", documents=2), load("prose", device=torch.device("cpu"))
    )
    assert own.describe() == "a lower loss on 2 held-out passages of prose"
    beginning = load("tiny", device=torch.device("cpu")).bos_id
    world_metric = build_metric(TextLossOptions(name="text-loss", language="en", documents=2), target)
    assert world_metric.documents.ids_N_S[:, 0].tolist() == [beginning] * 2  # type: ignore[attr-defined]
    assert world.sentences("eval", "en", 2, seed=1)


def test_epsilon_is_held_against_the_gradient() -> None:
    near = against_gradient(InnerConfig(eps=1e-3), 1e-3)
    assert near == "median |g| of the first step 1.0e-03, ε 1.0e-03: an update answers to its gradient by 50%."
    far = against_gradient(InnerConfig(eps=1e-8), 3e-4)
    assert far.endswith("AdamW is nearly sign(g), and scores fade. Try --set inner.eps=3e-04")
    assert "50%" in against_gradient(InnerConfig(eps=0.0, eps_root=1e-6), 1e-3)
    assert against_gradient(InnerConfig(optimizer="sgd"), 1e-3).endswith("sgd is linear in it.")
    assert "epsilon" in Attribution.__dataclass_fields__


def test_the_summary_says_what_to_know(data: Path, tmp_path: Path) -> None:
    text = call(data, *EVAL, "--out", tmp_path / "s.csv", "--max-length", 24)
    assert "Median |g| of the first step" in text
    assert "an update answers to its gradient by" in text
    assert f"Scores: {tmp_path / 's.csv'}; how they were made: {tmp_path / 's.csv'}.json" in text
    answer = CliRunner().invoke(
        app, ["attribute", str(data), *EVAL, "--out", str(tmp_path / "t.csv"), "--max-length", "24"]
    )
    notes = answer.stderr
    assert "4 rows (JSON lines), trained: completion, context: prompt" in notes
    assert "1 row has nothing left to train on" in notes
    assert "1 row is cut to the longest length" in notes
    for flag, words in (("--keep", "middle"), ("--train-on", "first")):
        assert f"{flag} {words} is no choice" in refusal(data, *EVAL, flag, words)


def test_a_dry_run_says_how_rough_its_time_is() -> None:
    answer = CliRunner().invoke(app, ["run", "l2-shrink", "--dry-run", "--set", "prompts.per_step=4"])
    assert answer.exit_code == 0, answer.output
    assert "times are right to a factor of 2 either way" in answer.stdout
