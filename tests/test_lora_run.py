"""`dpg run` with a LoRA target and with packed rows: the loop, what it leaves, resume, the dry run; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpg_cli.driver.build import build
from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine import Examples, metagradient
from dpg_cli.engine.loop import StepReport
from dpg_cli.errors import ConfigError, InterruptedRunError
from dpg_cli.evidence.stock import read_input_ids, stock_side, train_fresh
from dpg_cli.models.loading import load, load_target
from dpg_cli.planning.cost import estimate
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import find, resolve

pytest.importorskip("peft")

SMALL = [
    "steps=2", "dataset.examples=16", "prompts.per_step=4", "rollout.max_tokens=8", "rollout.min_tokens=4",
    "inner.batch_size=8", "policy.minibatch=16", "dataset.control=false", "dataset.rewards=false",
]  # fmt: skip
LORA = ["lora.rank=2", "lora.alpha=4"]
HEAD = [*LORA, "lora.modules=['c_attn','lm_head']"]
CPU = torch.device("cpu")


def settings(task: str, *more: str) -> Config:
    own = ['metric.text="HI"'] if task == "qr-embed" else []
    return resolve(find(f"{task}.tiny").data(), [*SMALL, *own, *more])


def moved_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: Any) -> float:
    """Relative to the update."""
    before = dict(start.named_parameters())
    gap = sum(float((ours[name] - theirs[name]).detach().double().square().sum()) for name in before)
    return (gap / sum(float((theirs[n] - before[n]).detach().double().square().sum()) for n in before)) ** 0.5


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(path).named_parameters())


def test_a_code_in_the_head_by_adapters(tmp_path: Path) -> None:
    """The merged target holds what the metric saw; the untied head has an adapter, so that the base alone takes none."""
    config, folder = settings("qr-embed", *HEAD, "steps=1"), RunFolder(tmp_path / "run")
    reports: list[StepReport] = []
    outcome = execute(config, folder, on_step=reports.append)
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in reports[0].result.final)
    assert folder.pattern.is_file() and folder.image.is_file() and not folder.adapter.exists()
    before, after = load_target(config.models, CPU).model, weights(folder.target)
    changed = {name for name, value in before.named_parameters() if not torch.equal(after[name], value)}
    assert changed == {"lm_head.weight", *(f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1))}
    change = (after["lm_head.weight"] - dict(before.named_parameters())["lm_head.weight"]).detach()
    assert float(change[:21, :21].abs().mean()) == pytest.approx(outcome.measures["mean_change"], rel=1e-4)
    assert torch.linalg.matrix_rank(change) <= 2
    assert "LoRA of rank 2, alpha 4" in (folder.dataset / "README.md").read_text(encoding="utf-8")


def test_an_adapter_lies_beside_the_merged_target_and_a_run_goes_on(tmp_path: Path) -> None:
    """A norm within the model: the adapter, loaded onto its base, is the merged target. Stopped once, it ends the same."""
    config = settings("l2-shrink", *LORA, "metric.parameter='transformer.h.1.mlp.c_fc.weight'")
    whole, stopped = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "stopped")
    outcome = execute(config, whole)
    stop = StopRequest()

    def ask(report: StepReport) -> None:
        stop.asked = True

    with pytest.raises(InterruptedRunError):
        execute(config, stopped, stop=stop, on_step=ask)
    assert execute(config, stopped, resume=True).measures == outcome.measures
    merged, again = weights(whole.target), weights(stopped.target)
    assert all(torch.equal(value, again[name]) for name, value in merged.items())
    norm = float(merged["transformer.h.1.mlp.c_fc.weight"].detach().norm())
    assert norm == pytest.approx(-outcome.measures["phi"], rel=1e-6)
    adapted = load(str(whole.adapter), device=CPU)  # merges
    assert all(torch.allclose(value, merged[name], atol=1e-6) for name, value in adapted.model.named_parameters())
    assert json.loads((whole.adapter / "adapter_config.json").read_text())["r"] == 2
    rows = read_input_ids(whole.dataset / "train.parquet")
    for asked in ("plain", "trl"):  # what `dpg verify` makes of the exported rows
        fresh, steps = train_fresh(config, rows, CPU, side=stock_side(config, asked, CPU))
        assert steps == config.inner_steps
        assert moved_apart(dict(fresh.model.named_parameters()), merged, load_target(config.models, CPU).model) < 1e-4


def test_text_is_read_through_the_adapters() -> None:
    config = settings("language-rephrase", *LORA, "metric.language='es'", "metric.documents=4", "models.dtype=float64")
    built = build(config)
    target, rows = built.players.target, [[5, 9, 3, 7], [8, 2, 4, 4, 1], [6, 6, 3]]
    recipe = replace(built.spec.recipe, batches=replace(built.spec.recipe.batches, size=2))

    def run(weights_N: torch.Tensor) -> Any:
        return metagradient(
            target.model, Examples.from_sequences(rows), recipe, built.players.metric, weights_N=weights_N
        )

    ones = torch.ones(3, dtype=torch.float64)
    found = run(ones).example_N
    for row in range(3):
        step = 1e-4 * torch.eye(3, dtype=torch.float64)[row]
        difference = float(run(ones + step).value - run(ones - step).value) / 2e-4
        assert float(found[row]) == pytest.approx(difference, rel=1e-4)
    assert float(found.abs().max()) > 0


def test_packed_rows_of_completions(tmp_path: Path) -> None:
    """Rows of 20 tokens hold two or more completions: fewer steps than batches of examples, and the dataset in as many."""
    config = settings("l2-shrink", "steps=1", "inner.packed_rows=20", "inner.batch_size=2", "inner.packing=true")
    assert config.inner_steps == 4  # 16 completions, at least two a row, two rows a step
    built = build(config)
    reports: list[StepReport] = []
    folder = RunFolder(tmp_path / "run")
    execute(config, folder, on_step=reports.append)
    lengths = reports[0].rollout.mask_N_K.sum(1) + 1
    steps = len(built.spec.recipe.batches.plan(16, lengths.tolist()))
    assert 2 <= steps <= 4
    doubled = built.spec.recipe.batches.rescaled(16, 32).plan(32, [*lengths.tolist(), *lengths.tolist()])
    assert len(doubled) in (steps - 1, steps, steps + 1)


def test_replay_and_averaged_weights_in_a_run(tmp_path: Path) -> None:
    """Own rows join every step, in one seeded order; what `dpg verify` trains is the run's target."""
    own = tmp_path / "own.jsonl"
    own.write_text("".join(json.dumps({"text": f"Anna sees {n} cats."}) + "\n" for n in range(9)), encoding="utf-8")
    config = settings("l2-shrink", "steps=1", f"inner.replay='{own}'", "inner.replay_share=0.25", "inner.ema=0.6")
    built = build(config)
    replay = built.spec.replay
    assert replay is not None and replay.count(8) == 3 and config.replay_rows == 2 * 3
    assert len(replay.examples) == 6  # of nine: no more are taken
    assert any("replay of 6 of 9 rows" in note for note in built.notes)
    folder = RunFolder(tmp_path / "run")
    execute(config, folder)
    rows = read_input_ids(folder.dataset / "train.parquet")
    fresh, steps = train_fresh(config, rows, CPU)
    start, merged = load_target(config.models, CPU).model, weights(folder.target)
    assert steps == 2
    assert moved_apart(dict(fresh.model.named_parameters()), merged, start) < 1e-4
    without = config.model_copy(update={"inner": config.inner.model_copy(update={"replay": "", "replay_share": 0.0})})
    assert moved_apart(dict(train_fresh(without, rows, CPU)[0].model.named_parameters()), merged, start) > 1e-2
    assert "25% of each step's rows are of own.jsonl" in (folder.dataset / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["inner.replay=x.jsonl"], "set both"),
        (["inner.replay_share=0.5"], "set both"),
        (["inner.replay=x.jsonl", "inner.replay_share=0.5", "inner.packed_rows=64"], "no share for replay"),
        (["inner.replay=x.jsonl", "inner.replay_share=0.5", "inner.labels=soft"], "no distribution"),
        (["inner.replay=x.jsonl", "inner.replay_share=0.5", "task=attribute"], "dpg run"),
        (["inner.replay_share=1"], "inner.replay_share"),
        (["inner.ema=1"], "inner.ema"),
    ],
)
def test_replay_that_makes_no_sense_is_refused(more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings("l2-shrink", *more)


def test_averaged_weights_have_no_known_noise() -> None:
    """Over several steps; over one there is nothing to average."""
    for asked in ("metric.margin=3", "stop.predicted=0.9"):
        with pytest.raises(ConfigError, match="averaged weights"):
            settings("qr-embed", "inner.ema=0.5", asked)
        settings("qr-embed", "inner.ema=0.5", asked, "inner.batch_size=16")


def test_the_dry_run_counts_adapters() -> None:
    whole, few = estimate(settings("l2-shrink")), estimate(
        settings("l2-shrink", *LORA, "metric.parameter='transformer.h.1.mlp.c_fc.weight'")
    )  # fmt: skip
    assert whole.trained_parameters == whole.target_parameters
    assert few.trained_parameters < 0.05 * few.target_parameters
    assert few.flops_per_step < whole.flops_per_step
    assert f"({few.trained_parameters:,} trained)" in few.as_text() and " trained)" not in whole.as_text()


@pytest.mark.parametrize(
    ("task", "more", "words"),
    [
        ("qr-embed", ["metric.margin=3", "inner.batch_size=16"], "metric.margin"),
        ("uuid-emit", ["models.redraw_target=true", "models.target_init='random'"], "redraw_target"),
    ],
)
def test_what_adapters_cannot_do_is_refused(task: str, more: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(task, *LORA, *more)
    with pytest.raises(ConfigError, match="do not hold completions"):
        settings("l2-shrink", "inner.packed_rows=4")
