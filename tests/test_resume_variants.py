"""Runs of every kind go on to the same end after a stop: redrawn targets, controls, two tokenisers, KL and epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import save_gpt2
from kill_resume import contents, unequal

from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine.loop import StepReport
from dpg_cli.errors import InterruptedRunError
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import settle
from dpg_cli.settings.presets import find, resolve

SMALL = [
    "steps=4", "prompts.per_step=4", "rollout.max_tokens=8", "rollout.min_tokens=2", "inner.batch_size=4",
    "policy.minibatch=4", "dataset.examples=8", "checkpoint.every_steps=1",
]  # fmt: skip
CASES = {
    "a target redrawn, a fresh UUID": ("uuid-emit", []),
    "naive": ("pattern-67", ["attribution.method=naive", "attribution.inner_runs=4", "credit.mode=sequence"]),
    "sgd": ("pattern-67", ["attribution.method=sgd", "credit.mode=sequence"]),
    "language-id": ("language-rephrase", ["attribution.method=language-id", "credit.mode=sequence"]),
    "two tokenisers": ("l2-shrink", ["models.target=gpt2", "credit.mode=token"]),
    "KL, two epochs, momentum": (
        "l2-shrink",
        ["policy.kl=0.1", "policy.epochs=2", "inner.optimizer=sgd", "inner.momentum=0.9"],
    ),
    "moments of eight bits": ("pattern-67", ["policy.optimizer_states=8bit"]),
    "a generator's adapters, checkpoints, bf16": (
        "pattern-67",
        [
            "policy.parameters=lora",
            "policy.kl=0.1",
            "policy.gradient_checkpointing=true",
            "policy.precision=bf16",
            "policy.micro_batch_tokens=64",
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_of_any_kind_goes_on_to_the_same_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the second of four outer steps and resumed: every file equals that of a run in one go."""
    monkeypatch.chdir(tmp_path)
    save_gpt2(tmp_path / "gpt2")
    task, more = CASES[name]
    config = settle(resolve(find(f"{task}.tiny").data(), [*SMALL, *more]))
    execute(config, RunFolder(tmp_path / "whole"))
    stop = StopRequest()

    def on_step(report: StepReport) -> None:
        stop.asked = report.step == 1

    folder = RunFolder(tmp_path / "resumed")
    with pytest.raises(InterruptedRunError):
        execute(config, folder, stop=stop, on_step=on_step)
    assert len(folder.read_metrics()) == 2
    execute(folder.read_config(), folder, resume=True)
    expected = contents(tmp_path / "whole")
    assert len(expected) > 20
    assert unequal(folder.path, expected) == []
