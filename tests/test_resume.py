"""Checkpoints, resume and interruption: whatever ends a run, going on gives what an uninterrupted run gives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kill_resume import contents, unequal
from PIL import Image

from dpg_cli.cli import main
from dpg_cli.cli.session import stopping
from dpg_cli.driver import checkpoint as checkpoints
from dpg_cli.driver.build import build
from dpg_cli.driver.execute import StopRequest, execute, finished
from dpg_cli.driver.state import capture, restore
from dpg_cli.engine.loop import StepReport
from dpg_cli.errors import DegenerateError, InterruptedRunError, UsageError
from dpg_cli.runs.files import replacing
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import CheckpointConfig, Config
from dpg_cli.settings.presets import find, resolve

STEPS = 4
SMALL = [
    f"steps={STEPS}", "prompts.per_step=2", "rollout.group_size=2", "rollout.max_tokens=6", "rollout.min_tokens=2",
    "inner.batch_size=2", "policy.minibatch=2", "dataset.examples=6", "checkpoint.every_steps=1",
]  # fmt: skip


def small(*more: str, task: str = "pattern-67.tiny") -> Config:
    return resolve(find(task).data(), [*SMALL, *more])


def raising_after(steps: int, what: Callable[[], Any]) -> Callable[[StepReport], None]:
    """An `on_step` that calls `what` after so many outer steps."""

    def on_step(report: StepReport) -> None:
        if report.step + 1 == steps:
            what()

    return on_step


def throw(error: BaseException) -> Any:
    raise error


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    execute(small(), RunFolder(folder))
    found = contents(folder)
    assert {"dataset/train.parquet", "generator/model.safetensors", f"checkpoints/step-{STEPS}/state.json"} <= set(
        found
    )
    assert len(found) == 28
    assert found["report.html"][0]
    return found


@pytest.fixture
def stopped(tmp_path: Path) -> RunFolder:
    """A run that was stopped after two outer steps."""
    folder, stop = RunFolder(tmp_path / "run"), StopRequest()
    with pytest.raises(InterruptedRunError, match=r"Stopped after outer step 2 of 4.*dpg resume "):
        execute(small(), folder, stop=stop, on_step=raising_after(2, lambda: setattr(stop, "asked", True)))
    assert [step for step, _ in checkpoints.found(folder)] == [2, 1]
    assert len(folder.read_metrics()) == 2
    assert not folder.generator.exists()
    return folder


def test_the_state_goes_out_and_back_whole() -> None:
    """Sampling, training and the order of mini-batches go on as they would have."""
    from dpg_cli.engine.loop import outer_step

    first, second = build(small("policy.kl=0.1")), build(small("policy.kl=0.1"))
    outer_step(first.players, first.spec, first.prompts.at(0), 0)
    state = {part: {name: t.clone() for name, t in tensors.items()} for part, tensors in capture(first.players).items()}
    torch.rand(3)
    expected = [outer_step(first.players, first.spec, first.prompts.at(step), step) for step in (1, 2)]
    torch.manual_seed(99)
    restore(second.players, state)
    for step, report in zip((1, 2), expected, strict=True):
        again = outer_step(second.players, second.spec, second.prompts.at(step), step)
        assert torch.equal(again.rollout.ids_N_K, report.rollout.ids_N_K)
        assert again.result.value == report.result.value
        assert again.numbers["policy_kl"] == report.numbers["policy_kl"] > 0
    for part, tensors in capture(first.players).items():
        for name, tensor in capture(second.players)[part].items():
            assert torch.equal(tensor, tensors[name]), (part, name)
    assert float(capture(second.players)["optimizer"]["step/lm_head.weight"]) == 6  # three outer steps of two


def test_a_stopped_run_goes_on_to_the_same_end(stopped: RunFolder, reference: dict[str, Any]) -> None:
    outcome = execute(small(), stopped, resume=True)
    assert unequal(stopped.path, reference) == []
    info = json.loads(stopped.info.read_text())
    assert [session["ended"] for session in info["sessions"]] == ["interrupted", "finished"]
    assert [session["first_step"] for session in info["sessions"]] == [0, 2]
    assert info["sessions"][0]["steps_lost"] == 0
    assert info["seconds"] == pytest.approx(sum(session["seconds"] for session in info["sessions"]), abs=0.1)
    assert 0 < info["seconds_training"] < info["seconds"]
    assert outcome.sessions == 2
    known = finished(stopped, small())
    assert known is not None
    assert known.measures == outcome.measures


@pytest.mark.parametrize(
    "stage",
    ["going on", "final_data", "write_model", "write_target", "write_png"],
    ids=lambda stage: stage.replace(" ", "_"),
)
def test_any_stage_can_be_repeated(
    stage: str, stopped: RunFolder, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end within a step, or after the training while the results are written."""
    with monkeypatch.context() as patch:
        on_step: Any = lambda report: None  # noqa: E731
        if stage == "going on":
            on_step = raising_after(4, lambda: throw(KeyboardInterrupt()))  # logged, but in no checkpoint yet
        else:
            where = "dpg_cli.artefacts.models" if stage == "write_png" else "dpg_cli.driver.execute"
            patch.setattr(f"{where}.{stage}", lambda *arguments: throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            execute(small(), stopped, resume=True, on_step=on_step)
    assert [step for step, _ in checkpoints.found(stopped)] == ([3, 2] if stage == "going on" else [4, 3])
    execute(small(), stopped, resume=True)
    assert unequal(stopped.path, reference) == []
    history = json.loads(stopped.info.read_text())["sessions"]
    assert [session["ended"] for session in history] == ["interrupted", "interrupted", "finished"]
    assert history[1]["steps_lost"] == (1 if stage == "going on" else 0)


def test_what_a_run_is_for_is_told_by_the_next_session(
    tmp_path: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end between the settings and the first words of run.json."""
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("dpg_cli.driver.execute.describe", lambda *arguments: throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            execute(small(), folder)
    assert "effect" not in json.loads(folder.info.read_text())
    execute(small(), folder, resume=True)
    assert json.loads(folder.info.read_text())["effect"].startswith("signs of a patch of the LM head")
    assert unequal(folder.path, reference) == []


@pytest.mark.parametrize(
    "end", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"]
)
def test_the_page_of_a_finished_run_is_made_up_for(
    end: BaseException, stopped: RunFolder, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An end after the run is finished, before its page stands: going on writes the page and trains no more."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("dpg_cli.driver.execute.write_report", lambda folder: throw(end))
        with pytest.raises(KeyboardInterrupt) if isinstance(end, KeyboardInterrupt) else contextlib.nullcontext():
            execute(small(), stopped, resume=True, on_stage=said.append)
    (stopped.path / ".report.html.77.tmp").write_text("half")
    assert unequal(stopped.path, reference) == [".report.html.77.tmp", "report.html"]
    assert any("dpg report" in line for line in said) == isinstance(end, OSError)
    before = stopped.info.read_bytes()
    assert finished(stopped, small()) is not None
    assert unequal(stopped.path, reference) == []
    assert stopped.info.read_bytes() == before


def test_a_full_disk_at_any_write_leaves_the_run_whole(
    tmp_path: Path, reference: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th thing that should reach the disk does not: one line, no half-written file, and the run goes on."""
    real, calls, fails_at = os.fsync, 0, 0

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    folder, failures = RunFolder(tmp_path / "run"), 0
    for number in (1, 4, 9, 25, 30, 12, 37, 5, 33, 40, 0):  # counted from the start of each session
        calls, fails_at = 0, number
        begun = folder.config.is_file()
        try:
            execute(small(), folder, resume=begun)
        except UsageError as error:
            failures += 1
            assert error.exit_code == 2
            assert "No space left on device" in error.cause
            assert "Make room on that disk" in error.remedy
            assert ("dpg resume" in error.remedy) == folder.config.is_file()
            assert [path.name for path in folder.path.rglob("*.tmp")] == []
    assert failures >= 6
    assert unequal(folder.path, reference) == []


def test_a_damaged_checkpoint_is_passed_over(stopped: RunFolder, reference: dict[str, Any]) -> None:
    path = stopped.checkpoints / "step-2" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    said: list[str] = []
    execute(small(), stopped, resume=True, on_stage=said.append)
    assert any("step-2 is damaged (optimizer.safetensors was changed or cut off" in line for line in said)
    assert any("going on after outer step 1 of 4" in line for line in said)
    assert unequal(stopped.path, reference) == []
    assert json.loads(stopped.info.read_text())["sessions"][0]["steps_lost"] == 1


def test_what_a_kill_left_of_an_old_checkpoint_goes(stopped: RunFolder) -> None:
    """A kill while the oldest of three was removed; no later checkpoint may come that would remove it."""
    old = stopped.checkpoints / "step-0"
    old.mkdir()
    (old / "rng.safetensors").write_bytes(b"left")
    assert [step for step, _ in checkpoints.found(stopped)] == [2, 1, 0]
    checkpoints.forget_after(stopped, 2)
    assert [step for step, _ in checkpoints.found(stopped)] == [2, 1]


def test_without_any_good_checkpoint(stopped: RunFolder, reference: dict[str, Any]) -> None:
    for step, path in checkpoints.found(stopped):
        (path / "state.json").write_text(f"{step}")
    before = tree(stopped.path)
    with pytest.raises(UsageError, match=r"No checkpoint .* step-2 is damaged .* step-1 is damaged .*Remove .*anew"):
        execute(small(), stopped, resume=True)
    assert tree(stopped.path) == before
    shutil.rmtree(stopped.checkpoints)
    said: list[str] = []
    execute(small(), stopped, resume=True, on_stage=said.append)
    assert any("beginning anew" in line for line in said)
    assert unequal(stopped.path, reference) == []


def test_what_is_refused(stopped: RunFolder, tmp_path: Path) -> None:
    def refuses(fault: str, config: Config | None = None) -> None:
        before = tree(stopped.path)
        with pytest.raises(UsageError, match=fault):
            execute(config or small(), stopped, resume=True)
        assert tree(stopped.path) == before

    refuses(r"inner.lr is 0.002 there and 0.1 here; credit.discount", small("inner.lr=0.1", "credit.discount=1.0"))
    refuses("seed is 0 there and 1 here", small("seed=1"))
    with stopped.locked():
        refuses("Another process is at work")
    text = stopped.config.read_text()
    stopped.config.write_text(text.replace("eps = 0.003", "eps = 0.004"))
    refuses("begun with other settings: inner.eps is 0.003 there and 0.004 here.*config.toml", small("inner.eps=0.004"))
    stopped.config.write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    stopped.dataset.symlink_to(elsewhere)
    with pytest.raises(UsageError, match="dataset is a link"):
        execute(small(), stopped, resume=True)
    assert list(elsewhere.iterdir()) == []
    stopped.dataset.unlink()
    stopped.info.write_text("{")
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        execute(small(), stopped, resume=True)


def test_how_often_checkpoints_are_written_may_change(stopped: RunFolder, reference: dict[str, Any]) -> None:
    execute(small("checkpoint.every_steps=0", "checkpoint.every_seconds=1000"), stopped, resume=True)
    assert [step for step, _ in checkpoints.found(stopped)] == [4, 2]  # the end always writes one
    assert {"dataset/train.parquet", "metrics.jsonl"}.isdisjoint(unequal(stopped.path, reference))


def test_other_prompts_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    config = small(f"prompts.source={tmp_path / 'prompts.txt'}", "models.generator_init=pretrained")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        execute(config, folder, on_step=raising_after(2, lambda: throw(KeyboardInterrupt())))
    (tmp_path / "prompts.txt").write_text("the dog\nthe cat\n")
    with pytest.raises(UsageError, match=r"are not those that .* was begun with"):
        execute(config, folder, resume=True)


@pytest.mark.parametrize("name", ["inner.replay", "metric.file"])
def test_other_rows_of_the_users_own_are_noticed(tmp_path: Path, name: str) -> None:
    """Tokens count, not bytes: the same rows written otherwise are the same."""
    file = tmp_path / "own.jsonl"

    def write(*texts: str, indent: str = "") -> None:
        file.write_text("".join(json.dumps({"text": text}) + indent + "\n" for text in texts), encoding="utf-8")

    write("the cat", "the dog")
    config = {
        "inner.replay": small(f"inner.replay={file}", "inner.replay_share=0.5"),
        "metric.file": small("metric.name=text-loss", f"metric.file={file}"),
    }[name]
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        execute(config, folder, on_step=raising_after(2, lambda: throw(KeyboardInterrupt())))
    write("the cat", "the cow")
    with pytest.raises(UsageError, match=rf"rows of {re.escape(name)} are not those that .* was begun with"):
        execute(config, folder, resume=True)
    write("the cat", "the dog", indent="  ")
    execute(config, folder, resume=True)
    assert folder.generator.is_dir()


def test_a_picture_run_goes_on_where_it_is_moved(tmp_path: Path) -> None:
    """The run's own copy of the picture stands for the user's, which may be gone."""
    rng = np.random.default_rng(0)
    Image.fromarray((rng.random((5, 7)) > 0.5).astype(np.uint8) * 255).save(tmp_path / "mine.png")
    config = small(f"metric.image={tmp_path / 'mine.png'}", task="qr-embed.tiny")
    execute(config, RunFolder(tmp_path / "whole"))
    folder, stop = RunFolder(tmp_path / "begun"), StopRequest()
    with pytest.raises(InterruptedRunError):
        execute(config, folder, stop=stop, on_step=raising_after(1, lambda: setattr(stop, "asked", True)))
    Image.fromarray((rng.random((5, 7)) > 0.5).astype(np.uint8) * 255).save(tmp_path / "other.png")
    with pytest.raises(UsageError, match=r"metric\.image shows another pattern"):
        execute(small(f"metric.image={tmp_path / 'other.png'}", task="qr-embed.tiny"), folder, resume=True)
    (tmp_path / "mine.png").unlink()
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    execute(moved.read_config(), moved, resume=True)
    differing = unequal(moved.path, contents(tmp_path / "whole"))
    assert [name for name in differing if not name.endswith("state.json")] == []  # which names the picture's place


def test_degenerate_training_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DegenerateError, match=r"inner run diverged: it moved .* times their own size"):
        execute(small("inner.lr=1e12", "inner.batch_size=4"), RunFolder(tmp_path / "inner"))
    folder = RunFolder(tmp_path / "policy")
    with pytest.raises(DegenerateError, match="diverged"):
        execute(small("policy.lr=1e12", "policy.minibatch=4"), folder)
    assert [step for step, _ in checkpoints.found(folder)] == [1]
    assert json.loads(folder.info.read_text())["sessions"][-1]["ended"] == "failed"
    assert len(folder.read_metrics()) == 1


def test_when_checkpoints_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    by_time = checkpoints.Schedule(CheckpointConfig(every_seconds=10.0))
    assert not by_time.due(1)
    now += 10
    assert by_time.due(2)
    by_time.wrote(3.0)  # seconds that writing took: the next is a twentieth of the time at most
    now += 59
    assert not by_time.due(3)
    now += 1
    assert by_time.due(4)
    by_steps = checkpoints.Schedule(CheckpointConfig(every_steps=3))
    assert [step for step in range(1, 10) if by_steps.due(step)] == [3, 6, 9]


def test_signals(tmp_path: Path, reference: dict[str, Any]) -> None:
    """The first ends after the outer step, the second at once; neither loses what was saved."""
    folder, stop, said = RunFolder(tmp_path / "run"), StopRequest(), []
    before = signal.getsignal(signal.SIGTERM)
    with stopping(stop, said.append), pytest.raises(InterruptedRunError):
        execute(small(), folder, stop=stop, on_step=raising_after(1, lambda: signal.raise_signal(signal.SIGTERM)))
    assert said == ["finishing this outer step, then saving; once more leaves at once"]
    assert [step for step, _ in checkpoints.found(folder)] == [1]

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop = StopRequest()
    with stopping(stop, said.append), pytest.raises(KeyboardInterrupt):
        execute(small(), folder, resume=True, stop=stop, on_step=raising_after(3, twice))
    assert len(folder.read_metrics()) == 3
    assert [step for step, _ in checkpoints.found(folder)] == [2, 1]
    stop = StopRequest()
    with stopping(stop, said.append), pytest.raises(KeyboardInterrupt):  # no outer step is under way
        execute(small(), folder, resume=True, stop=stop, on_built=lambda built: signal.raise_signal(signal.SIGINT))
    assert signal.getsignal(signal.SIGTERM) is before
    execute(small(), folder, resume=True)
    assert unequal(folder.path, reference) == []


def test_files_follow_the_umask_and_reach_their_place_whole(tmp_path: Path, stopped: RunFolder) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in stopped.path.rglob("*") if path.is_file()}
    mask = os.umask(0o027)
    try:
        assert modes == {0o666 & ~mask}
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("x")
            temporary.chmod(0o600)
        assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    finally:
        os.umask(mask)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as temporary:
        temporary.write_text("y")
        _ = 1 / 0
    assert (tmp_path / "x").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the last rename fails, the folder that stood there stands again."""
    place = tmp_path / "x"
    for number in (1, 2):
        with replacing(place) as temporary:
            temporary.mkdir()
            (temporary / f"file-{number}").write_text("x")
        assert [path.name for path in tmp_path.rglob("*")] == ["x", f"file-{number}"]
    real = Path.replace

    def replace(path: Path, to: Path) -> Path:
        if to == place and "old" not in path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, to)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UsageError, match="Input/output error"), replacing(place) as temporary:
        temporary.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file-2"]


def test_a_disk_that_fills_up(stopped: RunFolder, reference: dict[str, Any]) -> None:
    """In a process of its own that may let no file grow past 100 kB: libraries' own writing fails half-way."""

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "dpg_cli", "resume", str(stopped.path)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=little_room)
    assert answer.returncode == 2, answer.stderr
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("dpg: ")
    assert "step-3 cannot be written" in last
    assert f"dpg resume {stopped.path}" in last
    assert "Traceback" not in answer.stderr
    assert sorted(path.name for path in stopped.checkpoints.iterdir()) == ["step-1", "step-2"]
    execute(small(), stopped, resume=True)
    assert {"metrics.jsonl", "dataset/train.parquet", "target/model.safetensors"}.isdisjoint(
        unequal(stopped.path, reference)
    )


def test_the_commands(
    stopped: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def dpg(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpg", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    again = ["run", "pattern-67", *(part for item in SMALL for part in ("--set", item)), "--out", stopped.path]
    for arguments, fault in (
        (again, f"holds a run. Give another --out, or go on with it: dpg resume {stopped.path}"),
        ([*again, "--resume", "--seed", "9"], "seed is 0 there and 9 here"),
        (["run", "pattern-67", "--resume"], "--out RUN"),
        (["resume", tmp_path / "none"], "holds no run"),
        (["resume", tmp_path], "no config.toml"),
        (["resume", stopped.path, "--report-to", "nothing"], "There are tensorboard, wandb, trackio"),
    ):
        code, out, err = dpg(*arguments)
        assert (code, out) == (2, ""), err
        assert err.splitlines()[-1].startswith("dpg: ")
        assert fault in err.splitlines()[-1]

    opened = []
    monkeypatch.setattr("dpg_cli.runs.tracking.Trackers.open", lambda trackers, *rest: opened.append(trackers))
    monkeypatch.setattr("dpg_cli.runs.tracking.importlib.util.find_spec", lambda name: name)
    code, out, err = dpg("resume", stopped.path, "--json", "--report-to", "tensorboard")
    assert code == 0, err
    assert [(trackers.names, trackers.start) for trackers in opened] == [(["tensorboard"], 2)]
    assert json.loads(out)["sessions"] == 2
    assert "going on after outer step 2 of 4" in err
    assert "step 4/4" in err
    code, out, err = dpg(*again, "--resume")
    assert code == 0
    assert "is finished" in err
    assert "in 2 sessions" in out
    code, out, err = dpg(*again, "--resume", "--set", "steps=9")
    assert code == 2
    assert "steps is 4 there and 9 here" in err


def test_a_signal_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 130 and one line that says how to go on; `--resume` on a folder that holds no run yet begins one."""
    real = RunFolder.append_metrics

    def interrupting(folder: RunFolder, numbers: dict[str, float]) -> None:
        real(folder, numbers)
        for _ in range(int(os.environ.get("SIGNALS", "1"))):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "append_metrics", interrupting)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.toml.77.tmp").write_text("half")
    arguments = ["run", "pattern-67", *(part for item in SMALL for part in ("--set", item))]
    monkeypatch.setattr(sys, "argv", ["dpg", *arguments, "--out", str(tmp_path / "run"), "--resume"])
    for number, signals, line in (
        (1, "1", "dpg: Stopped after outer step 1 of 4; all of it is saved."),
        (2, "2", "dpg: Left at once; the last checkpoint is of outer step 1 of 4."),
        (3, "1", "dpg: Stopped after outer step 2 of 4; all of it is saved."),
    ):
        monkeypatch.setenv("SIGNALS", signals)
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 130
        err = capsys.readouterr().err
        assert err.splitlines()[-1] == f"{line} Go on with: dpg resume {tmp_path / 'run'}", number
    assert list((tmp_path / "run").rglob("*.tmp")) == []


@pytest.mark.slow
def test_kill_and_resume(tmp_path: Path) -> None:
    """A short version of the kill test: SIGKILL, also while a checkpoint is written."""
    script = Path(__file__).parent / "kill_resume.py"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, script, "--kills", "3", "--seed", "0"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(answer.stdout)
    assert figures["faults"] == []
    assert sum(figures["kills"].values()) == 3
    assert figures["runs_compared"] >= 1
    assert figures["files_compared"] >= 28
