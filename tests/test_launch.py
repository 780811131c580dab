"""The launchers as users call them: Accelerate starts two processes, and what they leave is verified by stock PyTorch."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from test_ranks import started

from dpg_cli.driver import launch
from dpg_cli.engine.ranks import ALONE
from dpg_cli.errors import UsageError

EIGHT_PIXELS = [
    "pattern-67", "--set", 'metric.rows=["##.#",".#.#"]', "--set", "steps=10", "--set", "rollout.portable=true",
]  # fmt: skip


def accelerate(*command: str, processes: int = 2) -> tuple[int, str, str]:
    """`accelerate launch` with so many processes: exit code, stdout, stderr."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    answer = started(
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
        "-m", "dpg_cli", *command, timeout=400,
    )  # fmt: skip
    return answer.returncode, answer.stdout, answer.stderr


@pytest.mark.slow
def test_two_processes_reach_a_verified_result(tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = accelerate("run", *EIGHT_PIXELS, "--out", str(run), "--json")
    assert code == 0, err
    assert json.loads(out)["measures"]["pixel_accuracy"] == 1.0  # one outcome, of rank 0
    assert err.count("training the generator") == 1
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 10
    assert json.loads((run / "run.json").read_text())["hardware"]["processes"] == 2
    answer = started("-m", "dpg_cli", "verify", str(run), "--trainer", "plain", "--json")
    assert answer.returncode == 0, answer.stderr
    figures = json.loads(answer.stdout)
    assert figures["verified"] is True
    assert figures["control"]["pixel_accuracy"] < 0.9


@pytest.mark.slow
def test_an_error_of_all_is_said_once(tmp_path: Path) -> None:
    code, _, err = accelerate("run", "qr-embed", "--patch-origin", "9999,0", "--out", str(tmp_path / "run"))
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("dpg:")]
    assert len(said) == 1 and "9999" in said[0]
    assert not (tmp_path / "run").exists()


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in launch.SIZE_NAMES:
        monkeypatch.delenv(name, raising=False)
    assert launch.processes() == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert launch.processes() == 3
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.processes() == 1


def test_accelerate_that_started_one_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without GPUs, `accelerate launch --num_processes 2` starts a single process, silently."""
    for name in launch.SIZE_NAMES:
        monkeypatch.delenv(name, raising=False)
    with launch.joined("cpu") as ranks:
        assert ranks is ALONE
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with launch.joined("cpu"):
        pass
    assert "--multi_gpu" in capsys.readouterr().err


def test_a_device_of_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 were started"), launch.joined("cuda:1"):
        pass
