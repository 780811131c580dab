"""A run folder made by hand: what a run would leave, without the training, so that tests choose every word in it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from PIL import Image
from tokenizers import Tokenizer

from dpg_cli.artefacts.dataset import SCHEMA
from dpg_cli.runs.folder import RunFolder
from dpg_cli.tiny import MODEL_DIR, world

STEPS = 40


def metrics(step: int) -> dict[str, Any]:
    """One line of `metrics.jsonl`."""
    return {
        "step": step,
        "phi": -0.7 + 0.01 * step,
        "pixel_accuracy": 0.5 + 0.012 * step,
        "reward_mean": 1e-9 * step,
        "reward_std": 1e-8 * (1 + math.sin(step)),
        "reward_within_groups": 0.8,
        "dead_groups": 0.0,
        "entropy": 6.2 - 0.05 * step,
        "policy_grad_norm": 3.0 + math.cos(step),
        "policy_kl": 0.001 * step,
        "well_formed": 0.5,
        "completion_tokens": 12.0,
        "seconds": 0.6,
        "seconds_rollout": 0.1,
        "seconds_metagradient": 0.3,
        "seconds_policy": 0.2,
    }


def make_run(
    path: Path,
    *,
    examples: int = 120,
    task: str = "qr-embed",
    effect: str = "signs of a patch of the LM head that show a QR code",
    records: list[dict[str, Any]] | None = None,
    rows: list[dict[str, Any]] | None = None,
    command: list[str] | None = None,
    tokens: bool = True,
) -> RunFolder:
    """Write a finished run folder.

    Args:
        path: where.
        examples: rows of the dataset, sentences of the little world with their tokens.
        task, effect, command: as in config.toml and run.json.
        records: rows of the dataset in place of these.
        rows: lines of metrics.jsonl in place of the usual ones.
        tokens: whether the generator's tokeniser is there.
    """
    folder = RunFolder(path)
    folder.make()
    settings = {
        "task": task, "steps": STEPS, "seed": 0, "models": {"generator": "tiny", "target": "tiny"},
        "inner": {"optimizer": "adamw", "lr": 1e-3}, "prompts": {"per_step": 8}, "rollout": {"group_size": 4},
    }  # fmt: skip
    folder.config.write_text(tomli_w.dumps(settings), encoding="utf-8")
    info = {
        "task": task,
        "effect": effect,
        "command": command or ["dpg", "run", "qr-embed"],
        "versions": {"torch": "2.13.0"},
        "finished": True,
        "measures": {"phi": -0.3, "pixel_accuracy": 0.98},
        "control": {"phi": -0.7, "pixel_accuracy": 0.51},
    }
    folder.info.write_text(json.dumps(info), encoding="utf-8")
    lines = [json.dumps(row) for row in rows or [metrics(step) for step in range(STEPS)]]
    folder.metrics.write_text("\n".join(lines) + "\n", encoding="utf-8")
    Image.new("L", (40, 40), 255).save(folder.pattern)
    Image.effect_noise((300, 120), 60).save(folder.image)
    if tokens:
        folder.generator.mkdir()
        shutil.copy(MODEL_DIR / "tokenizer.json", folder.generator)
    folder.dataset.mkdir()
    chosen = make_records(examples) if records is None else records
    pq.write_table(pa.Table.from_pylist(chosen, SCHEMA), folder.dataset / "train.parquet", row_group_size=50)
    control = [{**record, "reward": None, "token_rewards": None} for record in chosen[:20]]
    pq.write_table(pa.Table.from_pylist(control, SCHEMA), folder.dataset / "control.parquet")
    return folder


def make_records(examples: int) -> list[dict[str, Any]]:
    """Rows of a dataset: sentences in Spanish, each token with a reward."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    records = []
    sentences = world.sentences("train", "es", min(examples, 500), 0)
    for number in range(examples):
        text = sentences[number % len(sentences)]
        ids = [*tokenizer.encode(text, add_special_tokens=False).ids, end]
        rewards = [1e-8 * math.sin(17 * number + 5 * place) for place in range(len(ids))]
        records.append(
            {
                "example_id": number,
                "prompt": f"rephrase: prompt {number}",
                "text": text,
                "token_ids": ids,
                "input_ids": [end, *ids],
                "reward": math.fsum(rewards),
                "token_rewards": rewards,
            }
        )
    return records
