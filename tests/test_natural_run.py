"""Natural steps and soft labels through a whole run: what it leaves, its resume, its early end, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from short_run import call
from transformers import AutoModelForCausalLM

from dpg_cli.driver.build import build
from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine.loop import outer_step, train
from dpg_cli.errors import ConfigError, InterruptedRunError, UsageError
from dpg_cli.models.loading import load
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

NATURAL = [
    "models.generator_init=pretrained", "models.target_init=pretrained", "metric.rows=['##.#','.#..','#.##']",
    "metric.origin=frequent", "metric.margin=3.0", "metric.sharpness=2.0", "inner.labels=soft", "inner.eps=1e-2",
    "inner.batch_size=100000", "credit.discount=0.0", "policy.step=natural", "policy.parameters=head",
    "policy.trust=5e-3", "policy.kl_budget=0.02", "prompts.per_step=32", "rollout.group_size=2", "rollout.max_tokens=10",
    "rollout.min_tokens=2", "steps=4", "dataset.examples=600", "checkpoint.every_steps=1",
]  # fmt: skip


def natural(*more: str) -> Config:
    return resolve(find("pattern-67.tiny").data(), [*NATURAL, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run that aims at moments."""
    folder = RunFolder(tmp_path_factory.mktemp("natural") / "run")
    execute(natural("metric.aim=moments"), folder)
    return folder


def test_a_run_moves_the_head_alone_within_its_budget(run: RunFolder) -> None:
    rows = run.read_metrics()
    assert len(rows) == 4
    assert all(0 < row["policy_kl"] <= 0.02 for row in rows)
    assert rows[-1]["phi"] > rows[0]["phi"] + 0.2
    assert rows[0]["z_mean"] == pytest.approx(0, abs=0.1)
    assert rows[-1]["z_mean"] > 1.0
    assert 0.7 < rows[-1]["predicted_accuracy"] <= 1
    trained, start = AutoModelForCausalLM.from_pretrained(run.generator), load("tiny", device=torch.device("cpu")).model
    assert not trained.config.tie_word_embeddings
    before = dict(start.named_parameters())
    changed = {
        name
        for name, value in trained.named_parameters()
        if not torch.equal(value, before.get(name, before["transformer.wte.weight"]))
    }
    assert changed == {"lm_head.weight"}


def test_the_place_of_frequent_rows_is_recorded(run: RunFolder) -> None:
    options = run.read_config().metric
    row, column = options.origin  # type: ignore[union-attr]
    assert (isinstance(row, int), column) == (True, 0)
    patch = load_file(run.target / "patch.safetensors")["after"]
    assert patch.shape == (3, 4)
    target = AutoModelForCausalLM.from_pretrained(run.target)
    assert torch.equal(patch, target.lm_head.weight[row : row + 3, :4])


def test_checkpoints_hold_the_head_and_the_trust_region(run: RunFolder) -> None:
    newest = run.checkpoints / "step-4"
    assert set(load_file(newest / "generator.safetensors")) == {"lm_head.weight"}
    policy = load_file(newest / "optimizer.safetensors")
    assert policy.keys() == {"trust", "phi"}
    assert float(policy["phi"]) == pytest.approx(run.read_metrics()[-1]["phi"])


def test_a_stopped_run_goes_on_to_the_same_end(run: RunFolder, tmp_path: Path) -> None:
    folder, stop = RunFolder(tmp_path / "run"), StopRequest()

    def ask(report: Any) -> None:
        stop.asked = report.step == 1

    with pytest.raises(InterruptedRunError):
        execute(natural("metric.aim=moments"), folder, stop=stop, on_step=ask)
    execute(folder.read_config(), folder, resume=True)
    for part in ("generator", "target"):
        name = Path(part) / "model.safetensors"
        assert (folder.path / name).read_bytes() == (run.path / name).read_bytes()
    ours, theirs = (
        [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in f.read_metrics()]
        for f in (folder, run)
    )
    assert ours == theirs


def test_a_run_ends_when_its_prediction_holds(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    execute(natural("metric.aim=moments", "stop.predicted=0.8", "steps=30"), folder)
    rows = folder.read_metrics()
    assert 1 < len(rows) < 20
    assert rows[-1]["predicted_accuracy"] >= 0.8
    assert all(row["predicted_accuracy"] < 0.8 for row in rows[:-1])
    assert "policy_kl" not in rows[-1]  # the generator stayed as it was measured
    # a run that goes on from there does not begin another step
    built = build(folder.read_config())
    seen: list[Any] = []
    train(built.players, built.spec, built.prompts.at, seen.append, len(rows), rows)
    assert seen == []


@pytest.mark.parametrize(
    ("labels", "credit"),
    [
        ("drawn", "expected"),
        ("drawn", "token"),
        ("drawn", "sequence"),
        ("soft", "token"),
        ("soft", "sequence"),
        ("soft", "expected"),
    ],
)
def test_every_credit_takes_natural_steps(labels: str, credit: str) -> None:
    built = build(natural(f"inner.labels={labels}", f"credit.mode={credit}", "credit.discount=0.9"))
    start = built.players.generator.head.detach().clone()
    report = outer_step(built.players, built.spec, built.prompts.at(0), 0)
    assert report.numbers["policy_step_kl"] == pytest.approx(5e-3, rel=0.5)
    # the first step is all that there is: two ways to one number in float32, by the head before and by the change
    assert report.numbers["policy_kl"] == pytest.approx(report.numbers["policy_step_kl"], rel=1e-4)
    assert not torch.equal(start, built.players.generator.head)


@pytest.mark.parametrize("credit", ["expected", "token", "sequence"])
def test_adamw_learns_from_soft_labels(credit: str) -> None:
    settings = [
        "policy.step=adamw",
        "policy.parameters=all",
        "metric.margin=0",
        "metric.sharpness=5000",
        f"credit.mode={credit}",
    ]
    built = build(natural(*settings))
    reports = [outer_step(built.players, built.spec, built.prompts.at(step), step) for step in range(2)]
    assert all(report.numbers["policy_grad_norm"] > 0 for report in reports)
    assert reports[1].numbers["phi"] != reports[0].numbers["phi"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("policy.kl_budget=0", "policy.kl_budget: .*greater than 0"),
        ("policy.lora_modules=[]", "policy.lora_modules: .*at least 1"),
        ("policy.epochs=2", "one step on each rollout"),
        ("trainer=trl", "trainer: 'trl'"),
        ("inner.max_grad_norm=1", "metric.margin: with inner.max_grad_norm the noise"),
        ("stop.predicted=1", "less than 1"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        natural(setting, *(["credit.mode=sequence"] if setting == "trainer=trl" else []))


def test_soft_labels_need_one_tokeniser(tmp_path: Path) -> None:
    from builders import save_gpt2

    save_gpt2(tmp_path / "other")
    config = natural(
        f"models.target={tmp_path / 'other'}", "metric.origin=[3,0]", "credit.mode=token", "metric.margin=0"
    )
    with pytest.raises(UsageError, match="soft labels need one"):
        build(config)


def test_a_budget_that_cannot_reach_the_pattern_says_so_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = [part for setting in [*NATURAL, "policy.kl_budget=1e-5"] for part in ("--set", setting)]
    dry = call(capsys, monkeypatch, "run", "pattern-67", *flags, "--dry-run", "--json")
    seen = json.loads(dry.out)["cost"]["prospect"]
    assert (dry.code, seen["within"], seen["occurs"]) == (0, False, True)
    assert seen["least_nats"] == pytest.approx(
        9 * 12 * seen["kappa"] / 2 / (600 * 9), rel=0.3
    )  # about 9 tokens an example
    text = call(capsys, monkeypatch, "run", "pattern-67", *flags, "--dry-run")
    assert "policy.kl_budget = 1e-05 cannot reach the pattern" in text.out
    checked = call(capsys, monkeypatch, "check", "pattern-67", *flags, "--completions", "32", "--json")
    finding = next(one for one in json.loads(checked.out)["checks"] if one["name"] == "nats")
    assert (checked.code, finding["verdict"], finding["setting"]) == (3, "fail", "policy.kl_budget")


def test_rows_that_never_occur_are_refused_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UsageError, match="hardly ever writes"):
        execute(natural("metric.origin=[0,0]", "dataset.examples=8"), folder)
    assert not folder.path.exists()
