"""`dpg attribute` killed at planned points, forward and in reverse: the same command goes on to the same scores, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from optimizers_table import OPTIMIZERS
from typer.testing import CliRunner

from dpg_cli.attribution import work as work_module
from dpg_cli.attribution.attribute import DEFAULTS, Request, attribute
from dpg_cli.attribution.pace import Pace
from dpg_cli.attribution.work import WorkFolder, most_bytes, work_folder
from dpg_cli.cli.app import app
from dpg_cli.engine import Batches, Metagradients, Recipe, metagradients
from dpg_cli.engine.inner.tape import Memory, segment_length
from dpg_cli.errors import DegenerateError, InterruptedRunError, UsageError
from dpg_cli.settings.presets import resolve
from dpg_cli.tiny import world

LASTING = ("sqrt", "offload")
METRICS = [HeldOutLoss(make_examples(4, seed=9)), HeldOutLoss(make_examples(3, seed=12))]


class Killed(BaseException):
    """Nothing catches it."""


def run_with(
    place: Path, optimizer: str, memory: Memory, metrics: list[Any], kill: tuple[str, int] | None
) -> tuple[Metagradients | None, tuple[str, int]]:
    """A run of 17 steps that ends at (phase, done); its result, and the first step that it made."""
    calls: list[tuple[str, int]] = []

    def progress(phase: str, done: int, total: int) -> None:
        calls.append((phase, done))
        assert total == 17
        if (phase, done) == kill:
            raise Killed

    recipe = Recipe(OPTIMIZERS[optimizer].spec, max_grad_norm=0.4, batches=Batches(2, max_steps=17, order="shuffled"))
    try:
        with WorkFolder(place).journal(0) as journal:
            found = metagradients(
                make_target("gpt2", tied=True), make_examples(9), recipe, metrics, memory=memory, progress=progress,
                journal=journal, visits=True,
            )  # fmt: skip
    except Killed:
        return None, calls[0]
    return found, calls[0]


@pytest.mark.parametrize(
    ("optimizer", "queries", "memory"),
    [("adamw-eps_root", 1, "sqrt"), ("adamw-eps_root", 2, "offload"), ("sgd", 1, "offload"), ("muon", 2, "sqrt")],
)
def test_killed_anywhere_it_goes_on_to_the_same_bits(
    optimizer: str, queries: int, memory: Memory, tmp_path: Path
) -> None:
    """T = 17 in segments of 5: a kill within a segment, at its seams, at the turn, and within the last segment."""
    plan = {  # where it is killed -> the step that the next attempt makes first
        ("forward", 1): ("forward", 1),
        ("forward", 6): ("forward", 6),
        ("forward", 13): ("forward", 11),
        ("forward", 17): ("forward", 16),
        ("reverse", 2): ("reverse", 1),  # the point is kept after the progress is told: no step is lost but this
        ("reverse", 7): ("reverse", 3),
        ("reverse", 8): ("reverse", 8),
        ("reverse", 16): ("reverse", 13),
    }
    (whole := tmp_path / "whole").mkdir()
    reference, _ = run_with(whole, optimizer, memory, METRICS[:queries], None)
    assert reference is not None
    (place := tmp_path / "killed").mkdir()
    begins = []
    for kill in plan:
        found, first = run_with(place, optimizer, memory, METRICS[:queries], kill)
        assert found is None
        begins.append(first)
    found, first = run_with(place, optimizer, memory, METRICS[:queries], None)
    assert found is not None
    assert [*begins[1:], first] == list(plan.values())
    assert torch.equal(found.token_Q_N_S, reference.token_Q_N_S)
    assert float(found.token_Q_N_S.abs().max()) > 0
    assert torch.equal(found.value_Q, reference.value_Q)
    assert found.measures == reference.measures
    assert found.stats == reference.stats
    assert found.gradient_median == reference.gradient_median
    assert all(torch.equal(found.final[name], value) for name, value in reference.final.items())
    assert found.visits is not None and reference.visits is not None
    assert all(torch.equal(a.credit_M, b.credit_M) for a, b in zip(found.visits, reference.visits, strict=True))


@pytest.mark.parametrize("memory", LASTING)
def test_the_disk_is_bounded_and_given_back(memory: Memory, tmp_path: Path) -> None:
    most, least = 0, 1 << 60
    model, examples = make_target("gpt2", tied=True), make_examples(9)

    def progress(phase: str, done: int, total: int) -> None:
        nonlocal most, least
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        most, least = max(most, used), used

    recipe = Recipe(OPTIMIZERS["adamw"].spec, batches=Batches(2, max_steps=17))
    with WorkFolder(tmp_path).journal(0) as journal:
        metagradients(model, examples, recipe, METRICS, memory=memory, progress=progress, journal=journal)
    count = sum(parameter.numel() for parameter in model.parameters())
    bound = most_bytes(memory, 17, count, 8, 2, examples.ids_N_S.numel())
    states = 8 * count * (17 * 4 if memory == "offload" else 3 * -(-17 // segment_length(17)))
    assert 0.9 * states < most < bound
    assert least < most - 0.4 * states


def request_of(folder: Path, **changes: Any) -> Request:
    """A request for the scores of 24 sentences."""
    data = folder / "data.jsonl"
    rows = [{"text": text} for code in ("en", "es") for text in world.sentences("train", code, 12, seed=3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return replace(Request(str(data), folder / "scores.parquet"), **changes)


def config_of(memory: str, *more: str) -> Any:
    flags = {"inner": {"states": memory, "batch_size": 2, "schedule": "cosine", "max_grad_norm": 0.5}}
    return resolve({**DEFAULTS, "metric": {"name": "text-loss", "language": "es", "documents": 2}}, list(more), flags)


def forked(config: Any, request: Request, log: Path, fatal: str) -> int:
    """Attribute in a process of its own that kills itself, as SIGKILL does, at a step or in the midst of a file's writing.

    Args:
        log: takes the first step that it made.
        fatal: "forward 5": after that step; "write reverse.safetensors": when half of it is there; "": never.

    Returns:
        0, or the signal that ended it.
    """
    child = os.fork()
    if child:
        return -os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        saved = work_module.save_file

        def save(tensors: Any, path: Path, about: Any = None) -> None:
            saved(tensors, path, about)
            if fatal == f"write {path.name.removeprefix('.').partition('.safetensors')[0]}.safetensors":
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def progress(phase: str, done: int, total: int) -> None:
            if not log.exists():
                log.write_text(f"{phase} {done}")
            if fatal == f"{phase} {done}":
                os.kill(os.getpid(), signal.SIGKILL)

        work_module.save_file = save  # type: ignore[attr-defined]
        attribute(config, request, on_progress=progress)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


@pytest.mark.parametrize("memory", LASTING)
def test_sigkill_in_steps_and_in_the_midst_of_writing(memory: str, tmp_path: Path) -> None:
    """T = 12 in segments of 4; adapters where states are recomputed."""
    lora = ["lora.rank=2"] if memory == "sqrt" else []
    config, out = config_of(memory, *lora), tmp_path / "scores.parquet"
    reference = tmp_path / "reference.parquet"
    attribute(config, request_of(tmp_path, out=reference))
    middle = "write state-4.safetensors" if memory == "sqrt" else "forward 6"
    plan = {"forward 3": "forward 1", middle: "forward 1",
            "write final.safetensors": "forward 1" if memory == "sqrt" else "forward 5",
            "reverse 3": "forward 9", "write reverse.safetensors": "reverse 1", "reverse 11": "reverse 1"}  # fmt: skip
    first = []
    for number, fatal in enumerate(plan):
        log = tmp_path / f"{number}.log"
        assert forked(config, request_of(tmp_path), log, fatal) == signal.SIGKILL, fatal
        assert not out.exists()
        first.append(log.read_text())
        half = [path for path in work_folder(out).rglob("*") if path.name.endswith(".tmp")]
        assert bool(half) == fatal.startswith("write"), fatal  # the next attempt tidies it
    assert first == list(plan.values())
    notes: list[str] = []
    attribute(config, request_of(tmp_path), on_note=notes.append)
    assert any(line.startswith(f"Goes on from {work_folder(out)}, at most ") for line in notes)
    assert not work_folder(out).exists()
    again, once = pq.read_table(out), pq.read_table(reference)
    assert again.equals(once)
    assert max(map(abs, once["score"].to_pylist())) > 0
    records = [json.loads((tmp_path / f"{name}.parquet.json").read_text()) for name in ("scores", "reference")]
    assert records[0] == records[1]


@pytest.mark.slow
def test_several_questions_validated_and_selected_killed_at_random(tmp_path: Path) -> None:
    """A short version of the kill test: the same files as from commands that were never interrupted."""
    script = Path(__file__).parent / "kill_attribution.py"
    environment = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, script, "--kills", "2"], capture_output=True, text=True, env=environment, timeout=900
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    figures = json.loads(answer.stdout)
    assert (figures["faults"], sum(figures["kills"].values())) == ([], 2)
    assert figures["files"] >= 7


def test_another_command_is_refused_and_a_hopeless_one_leaves_nothing(tmp_path: Path) -> None:
    stop = (_ for _ in ()).throw

    def interrupt(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("forward", 6):
            stop(Killed())

    config, request = config_of("sqrt"), request_of(tmp_path)
    with pytest.raises(Killed):
        attribute(config, request, on_progress=interrupt)
    folder = work_folder(request.out)
    assert folder.is_dir()
    for changed, words in (
        (config_of("sqrt", "inner.lr=2e-4"), "inner.lr is 0.0001 there and 0.0002 here"),
        (config_of("keep"), "inner.states is 'sqrt' there and 'keep' here"),
        (config_of("sqrt", "models.target_init=random"), "the target's weights is another"),
        (config_of("sqrt", "metric.documents=3"), "metric.documents is 2 there and 3 here"),
    ):
        with pytest.raises(UsageError, match=words):
            attribute(changed, request)
    with pytest.raises(UsageError, match="the data is another"):
        attribute(config, replace(request, limit=20))
    about = folder / "work.json"
    known = json.loads(about.read_text())
    about.write_text(json.dumps({**known, "the code of dpg": "0" * 64}))
    with pytest.raises(UsageError, match="the code of dpg is another"):
        attribute(config, request)
    about.write_text(json.dumps(known))
    with work_module.locked(folder), pytest.raises(UsageError, match="Another process is at work"):
        attribute(config, request)
    state = folder / "group-0" / "state-4.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(UsageError, match=r"state-4.safetensors is damaged. Remove .*group-0 to begin anew"):
        attribute(config, request)
    hopeless = replace(request, out=tmp_path / "other.parquet")
    with pytest.raises(DegenerateError):
        attribute(config_of("sqrt", "inner.lr=1e12", "inner.max_grad_norm=0"), hopeless)
    assert not work_folder(hopeless.out).exists()


def test_ctrl_c_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(tmp_path)
    arguments = ["attribute", request.data, "--language", "es", "--set", "metric.documents=2", "--batch-size", "2"]
    arguments += ["--out", str(request.out)]
    from dpg_cli.cli.attribution import AttributionDisplay

    shown = AttributionDisplay.progress

    def progress(self: Any, phase: str, done: int, total: int) -> None:
        shown(self, phase, done, total)
        if (phase, done) == ("reverse", 2):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(AttributionDisplay, "progress", progress)
    answer = CliRunner().invoke(app, [*arguments, "--memory", "offload"])
    assert isinstance(answer.exception, InterruptedRunError)
    assert str(answer.exception) == (
        f"Interrupted (attributing: step 2 of 12); what is done is kept in {request.out}.work. The same command goes on with it."
    )
    answer = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "kept.parquet")])
    assert isinstance(answer.exception, InterruptedRunError)
    assert "nothing is kept. With --memory sqrt or offload" in str(answer.exception)
    monkeypatch.setattr(AttributionDisplay, "progress", shown)
    answer = CliRunner().invoke(app, [*arguments, "--memory", "offload"])
    assert answer.exit_code == 0, answer.output
    assert "Goes on from" in answer.stderr
    assert not work_folder(request.out).exists()


def test_a_small_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match=r"take up to 0.1 GB of disk; .* has 0.0. Name an --out on a larger disk"):
        attribute(config_of("offload"), request_of(tmp_path))
    assert not work_folder(tmp_path / "scores.parquet").exists()


@pytest.mark.parametrize("memory", ["keep", "sqrt"])
@pytest.mark.parametrize("ratio", [2.0, 8 / 3, 3.5])
def test_the_time_left_is_honest(memory: Memory, ratio: float) -> None:
    """Steps of a made-up clock, dearer or cheaper in reverse than counted, with segments computed again at once."""
    now, total = 0.0, 400
    pace = Pace(memory, clock=lambda: now)
    times: list[tuple[float, float | None, str, int]] = []
    for done in range(1, total + 1):
        now += 1.0
        times.append((now, pace.left("forward", done, total), "forward", done))
    length = segment_length(total)
    for done in range(1, total + 1):
        left = total - done + 1
        if memory == "sqrt" and left % length == 0 and left < total:
            now += length
        now += ratio
        times.append((now, pace.left("reverse", done, total), "reverse", done))
    end = now
    for at, left, phase, done in times:
        if phase == "forward" and done > 5:
            assert left is not None
            assert abs(left / (end - at) - 1) < 0.35
        if phase == "reverse" and 0.1 * total < done < total - 5:
            assert left is not None
            assert abs(left - (end - at)) < 0.05 * (end - at) + 2 * length
    assert times[0][1] is None
    assert times[-1][1] == pytest.approx(0.0, abs=1e-6)
