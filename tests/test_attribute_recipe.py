"""`dpg attribute` by a recipe: flags, a file of another trainer, adapters, packing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dpg_cli.attribution.attribute import DEFAULTS
from dpg_cli.cli.app import app
from dpg_cli.driver.recipe import inner_recipe
from dpg_cli.errors import DpgError
from dpg_cli.settings.config import validate
from dpg_cli.settings.presets import merge
from dpg_cli.tiny import world

FLAGS = ["--epochs", "2", "--schedule", "cosine", "--warmup", "0.2", "--max-grad-norm", "0.1", "--batch-size", "4"]
FLAGS += ["--accumulation", "2", "--lr", "3e-4"]


def scores(folder: Path, *flags: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Scores of 20 sentences, and the printed report."""
    data, out = folder / "data.jsonl", folder / "scores.parquet"
    rows = [{"text": text} for text in world.sentences("train", "es", 20, seed=3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["attribute", str(data), "--language", "es", "--set", "metric.documents=8", "--out", str(out)]
    answer = CliRunner().invoke(app, [*arguments, "--overwrite", "--json", *flags])
    assert answer.exit_code == 0, answer.output
    return np.array(pq.read_table(out)["score"]), json.loads(answer.stdout)


def near(left: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(left - right).max() / np.abs(right).max())


def test_flags_are_settings_and_packing_and_states_change_nothing(tmp_path: Path) -> None:
    by_flags, report = scores(tmp_path, *FLAGS)
    assert report["inner_steps"] == 6  # 20 examples: 3 steps an epoch
    assert 0 < report["clipped_share"] <= 1
    keys = [
        "epochs=2.0",
        "schedule=cosine",
        "warmup=0.2",
        "max_grad_norm=0.1",
        "batch_size=4",
        "accumulation=2",
        "lr=3e-4",
    ]
    by_settings, _ = scores(tmp_path, *(part for key in keys for part in ("--set", f"inner.{key}")))
    assert np.array_equal(by_flags, by_settings)
    plain, _ = scores(tmp_path)
    assert near(plain, by_flags) > 0.01
    for more in (["--packing"], ["--memory", "sqrt"]):
        other, _ = scores(tmp_path, *FLAGS, *more)
        assert near(other, by_flags) < 1e-3


def test_a_file_of_trl(tmp_path: Path) -> None:
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(
        "learning_rate: 3e-4\nper_device_train_batch_size: 4\ngradient_accumulation_steps: 2\nnum_train_epochs: 2\n"
        "lr_scheduler_type: cosine\nwarmup_steps: 0.2\nmax_grad_norm: 0.1\nadam_epsilon: 1e-3\nbf16: false\nseed: 5\n"
        "logging_steps: 1\nmax_length: 200\n",
        encoding="utf-8",
    )
    by_file, report = scores(tmp_path, "--recipe", str(recipe))
    assert report["inner_steps"] == 6
    same = [
        "--seed",
        "5",
        "--set",
        "inner.beta2=0.999",
        "--set",
        "inner.no_decay=['biases', 'norms']",
        "--max-length",
        "200",
    ]
    by_flags, _ = scores(tmp_path, *FLAGS, *same)
    assert np.array_equal(by_file, by_flags)
    _, report = scores(tmp_path, "--recipe", str(recipe), "--epochs", "1")
    assert report["inner_steps"] == 3  # flags win over the file
    recipe.write_text("learning_rate: 3e-4\nlabel_smoothing_factor: 0.1\n", encoding="utf-8")
    answer = CliRunner().invoke(app, ["attribute", "x.txt", "--language", "es", "--recipe", str(recipe)])
    assert isinstance(answer.exception, DpgError) and "label_smoothing_factor" in str(answer.exception)


@pytest.mark.parametrize("metric", ["text-loss", "norm"])
def test_adapters(tmp_path: Path, metric: str) -> None:
    pytest.importorskip("peft")
    data, out = tmp_path / "data.txt", tmp_path / "scores.parquet"
    data.write_text("\n".join(world.sentences("train", "en", 9, seed=1)), encoding="utf-8")
    measured = ["--language", "en", "--set", "metric.documents=4"] if metric == "text-loss" else ["--metric", "norm"]
    lora = ["--lora", "2", "--batch-size", "3"] + (["--set", "lora.modules=['lm_head']"] if metric == "norm" else [])
    untied = ["--set", "models.untie_target=true"] if metric == "norm" else []
    answer = CliRunner().invoke(app, ["attribute", str(data), *measured, "--out", str(out), "--json", *lora, *untied])
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["value"] != report["value_before"]
    assert np.abs(np.array(pq.read_table(out)["score"])).max() > 0
    made = json.loads((tmp_path / "scores.parquet.json").read_text(encoding="utf-8"))
    assert made["lora"]["rank"] == 2


def test_defaults_use_each_example_once_in_the_order_of_the_trainer() -> None:
    inner = validate(merge(DEFAULTS, {"metric": {"name": "norm"}})).inner
    batches = inner_recipe(inner, 0).batches
    assert (batches.order, batches.epochs, batches.size) == ("shuffled", 1.0, 32)


def test_second_order_by_a_flag(tmp_path: Path) -> None:
    """Differences, through clipping, accumulation, adapters, packing and recomputed states; and what bf16 is told."""
    more = ["--lora", "2", "--packing", "--memory", "sqrt"]
    exact, report = scores(tmp_path, *FLAGS, *more)
    assert report["difference_error"] is None
    ours, report = scores(tmp_path, *FLAGS, *more, "--second-order", "difference")
    assert near(ours, exact) < 5e-3
    assert 0 < report["difference_error"] < 5e-3
    assert any(note.startswith("Differences: ") for note in report["notes"])
    arguments = ["attribute", str(tmp_path / "data.jsonl"), "--language", "es", "--precision", "bf16"]
    answer = CliRunner().invoke(app, [*arguments, "--second-order", "difference"])
    assert isinstance(answer.exception, DpgError) and "need precision = 'float32'" in str(answer.exception)
