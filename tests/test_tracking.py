"""Trackers and the log: the same figures everywhere, each explained, and no tracker can end a run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dpg_cli.cli import main
from dpg_cli.driver.execute import execute
from dpg_cli.errors import UsageError
from dpg_cli.report.curves import measures
from dpg_cli.report.gather import gather
from dpg_cli.runs import tracking
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.tracking import Trackers, check_names, flattened
from dpg_cli.settings.presets import find, resolve

DOCUMENTED = set(
    re.findall(
        r"^\| `(\w+)` \|",
        (Path(__file__).parent.parent / "docs" / "metrics-log.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
)
TINY = ["steps=2", "dataset.examples=8", "prompts.per_step=4", "rollout.group_size=2", "rollout.max_tokens=12"]


class Recorder:
    """A tracker that keeps what it is told; it raises at a step of choice."""

    def __init__(self, fails_at: int = -1) -> None:
        self.told: list[Any] = []
        self.fails_at = fails_at

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        print("noise on stdout")  # noqa: T201 - as trackers' libraries do
        if step == self.fails_at:
            raise RuntimeError("the server is gone\nsecond line")
        self.told.append((step, dict(numbers)))

    def finish(self, results: Mapping[str, float], ok: bool) -> None:
        self.told.append((dict(results), ok))


def with_recorder(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    monkeypatch.setattr(tracking, "_Tensorboard", lambda folder, settings, start: recorder)


def test_names() -> None:
    assert check_names([]) == []
    with pytest.raises(UsageError, match="tensorboard, wandb, trackio"):
        check_names(["mlflow"])


def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else known(name))
    monkeypatch.setattr(sys, "argv", ["dpg", "run", "qr-embed", "--report-to", "wandb", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "dpg: --report-to wandb: wandb is not installed. pip install 'dpg-cli[wandb]'\n"
    assert not (tmp_path / "run").exists()


def test_a_failing_tracker_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recorder = Recorder(fails_at=1)
    with_recorder(monkeypatch, recorder)
    troubles: list[str] = []
    with Trackers(["tensorboard"], troubles.append) as trackers:
        trackers.open(tmp_path, {})
        for step in range(4):
            trackers.log({"step": step, "phi": 1.0})
    assert troubles == ["tracking by tensorboard stopped: the server is gone"]
    assert recorder.told == [(0, {"phi": 1.0})]
    assert capsys.readouterr().out == ""  # stdout is for results


def test_results_and_the_way_it_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder()
    with_recorder(monkeypatch, recorder)
    with Trackers(["tensorboard"]) as trackers:
        trackers.open(tmp_path, {})
        trackers.result({"phi": 2.0}, {"phi": 1.0})
    assert recorder.told == [({"result/phi": 2.0, "control/phi": 1.0}, True)]
    with pytest.raises(KeyboardInterrupt), Trackers(["tensorboard"]) as trackers:
        trackers.open(tmp_path, {})
        raise KeyboardInterrupt
    assert recorder.told[-1] == ({}, False)


def test_settings_become_flat() -> None:
    assert flattened({"a": {"b": {"c": 1.5}, "d": [1, 2]}, "e": True, "f": None}) == {
        "a.b.c": 1.5, "a.d": "[1, 2]", "e": True, "f": "None",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "also"), [("sgd", {"sgd_lr", "phi_runs_std"}), ("naive", {"phi_runs_mean"}), ("language-id", set())]
)
def test_controls_log_what_is_documented(method: str, also: set[str], tmp_path: Path) -> None:
    settings = [*TINY, f"attribution.method={method}", "attribution.inner_runs=2", "credit.mode=sequence"]
    config = resolve(find("language-rephrase.tiny").data(), settings, {})
    folder = RunFolder.free(tmp_path / "run")
    execute(config, folder)
    keys = set(json.loads(folder.metrics.read_text().splitlines()[0]))
    assert also <= keys <= DOCUMENTED
    assert measures(gather(folder).rows) == [
        "loss",
        "perplexity",
    ]  # whatever else is logged is no measure of the target


@pytest.mark.parametrize("task", ["qr-embed", "l2-shrink", "language-rephrase"])
def test_a_run_logs_what_is_documented(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    with_recorder(monkeypatch, recorder)
    config = resolve(find(f"{task}.tiny").data(), [*TINY, "rollout.min_tokens=2", "policy.kl=0.01"], {})
    folder = RunFolder.free(tmp_path / "run")
    with Trackers(["tensorboard"]) as trackers:
        outcome = execute(config, folder, trackers=trackers)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    keys = set(rows[0])
    assert len(keys) > 20
    assert keys <= DOCUMENTED
    assert {"phi", "reward_std", "entropy", "policy_kl", "well_formed"} <= keys
    assert ("well_formed_asked" in keys) == (task == "language-rephrase")
    assert 0 <= rows[0]["well_formed"] <= 1
    # The tracker was told the same, and the outcome.
    assert recorder.told[:2] == [(row["step"], {k: v for k, v in row.items() if k != "step"}) for row in rows]
    results, ok = recorder.told[2]
    assert ok
    assert results["result/phi"] == outcome.measures["phi"]
    assert outcome.control is not None
    assert results["control/phi"] == outcome.control["phi"]
    # The page is there, with the effect in words.
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Distance from the start" in page
    assert json.loads(folder.info.read_text())["effect"].split("'")[0] in page


def test_fluency_counts_sentences() -> None:
    import torch
    from transformers import AutoTokenizer

    from dpg_cli.driver.fluency import fluency
    from dpg_cli.engine.records import Rollout
    from dpg_cli.tiny import MODEL_DIR, world

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    texts = [*world.sentences("train", "es", 3, 0), *world.sentences("train", "de", 1, 0), "no no no", "x", "", "el el"]
    rows = tokenizer(texts)["input_ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    rollout = Rollout([""] * 8, ids[:, :1], mask[:, :1], ids, mask, ids.float(), 4, 0.0)
    language = resolve(find("language-rephrase.tiny").data(), [], {})
    assert fluency(language, rollout, tokenizer) == {"well_formed": 4 / 8, "well_formed_asked": 3 / 8}
    pattern = resolve(find("qr-embed.tiny").data(), ["models.generator=tiny"], {})
    assert fluency(pattern, rollout, tokenizer) == {"well_formed": 4 / 8}
    foreign = resolve(find("qr-embed.tiny").data(), ["models.generator=/some/folder"], {})
    assert fluency(foreign, rollout, tokenizer) == {}


def test_tensorboard_holds_the_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(check_names(["tensorboard"])) as trackers:
        trackers.open(tmp_path, {"inner": {"lr": 0.5}})
        for step in range(3):
            trackers.log({"step": step, "phi": step / 4})
        trackers.result({"phi": 0.75}, None)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("phi")] == [(0, 0.0), (1, 0.25), (2, 0.5)]
    assert events.Scalars("result/phi")[0].value == 0.75


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_work_offline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip(name)
    troubles: list[str] = []
    with Trackers(check_names([name]), troubles.append) as trackers:
        trackers.open(tmp_path, {"steps": 2})
        trackers.log({"step": 0, "phi": 0.5})
    assert troubles == []
    assert any(path.suffix in (".wandb", ".db") for path in tmp_path.rglob("*"))
