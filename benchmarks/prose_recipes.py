"""One dataset, trained under recipes that it was never made for: what each reads back. Figures of docs/results.md.

python benchmarks/prose_recipes.py RUN      a finished `dpg run qr-embed --scale prose`; rows go to results/prose_recipes.jsonl

Stock PyTorch trains the pretrained target on the run's data, and on its control, and the signs of the head's change are
read by zxing-cpp.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpg_cli.evidence.stock import fine_tune, read_input_ids
from dpg_cli.evidence.verify import head_signs
from dpg_cli.models.loading import LanguageModel, load_target
from dpg_cli.patterns.pattern import decode_qr, pattern_from_image, pixel_accuracy
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import PatternOptions
from dpg_cli.settings.inner import InnerConfig

RAW = Path(__file__).parent / "results" / "prose_recipes.jsonl"
NOISE = 0.01  # of each tensor's root mean square
STOCK = {"optimizer": "adamw", "eps": 1e-8, "beta2": 0.999}  # torch's defaults

Prepare = Callable[[LanguageModel, list[Any]], None]


@torch.no_grad()
def perturbed(target: LanguageModel, control: list[Any]) -> None:
    """Normal noise on every weight."""
    generator = torch.Generator().manual_seed(0)
    for parameter in target.model.parameters():
        scale = NOISE * parameter.square().mean().sqrt()
        parameter += scale * torch.randn(parameter.shape, generator=generator)


def trained_on(target: LanguageModel, control: list[Any]) -> None:
    """64 steps of stock AdamW at 1e-4 on texts of the starting generator."""
    own = InnerConfig.model_validate(STOCK | {"lr": 1e-4})
    fine_tune(target.model, control[-16384:], own, 64)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning.

    Attributes:
        batch: examples of a step; 0: all of them.
        inner: settings, those of the run where None.
        prepare: done to the target before.
    """

    batch: int
    inner: dict[str, Any] | None = field(default_factory=dict)
    prepare: Prepare | None = None


RECIPES = {
    "its own: AdamW, ε 1e-2, 1 step": Recipe(0, None),
    "AdamW, ε 1e-8, 1 step, lr 1e-4": Recipe(0, STOCK | {"lr": 1e-4}),
    "AdamW, ε 1e-8, 64 steps of 512, lr 1e-5": Recipe(512, STOCK | {"lr": 1e-5}),
    "AdamW, ε 1e-8, 64 steps of 512, lr 1e-4": Recipe(512, STOCK | {"lr": 1e-4}),
    "AdamW, ε 1e-8, 256 steps of 128, lr 1e-5": Recipe(128, STOCK | {"lr": 1e-5}),
    "AdamW, ε 1e-8, 128 steps of 256, lr 1e-4, weight decay 0.1": Recipe(
        256, STOCK | {"lr": 1e-4, "weight_decay": 0.1}
    ),
    "AdamW, ε 1e-8, 64 steps of 512, lr 1e-4, cosine, 5 % warm-up, clipping 1": Recipe(
        512, STOCK | {"lr": 1e-4, "schedule": "cosine", "warmup": 0.05, "max_grad_norm": 1.0}
    ),
    "AdamW, ε 1e-8, two shuffled epochs, 64 steps of 1,024, lr 1e-5, linear": Recipe(
        1024, STOCK | {"lr": 1e-5, "schedule": "linear", "epochs": 2, "order": "shuffled"}
    ),
    "SGD, 64 steps of 512, lr 0.1": Recipe(512, {"optimizer": "sgd", "lr": 0.1}),
    "SGD with momentum 0.9, 128 steps of 256, lr 0.01": Recipe(256, {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}),
    "its own, the target's weights with 1 % of noise": Recipe(0, None, perturbed),
    "its own, the target trained further, 64 steps at 1e-4": Recipe(0, None, trained_on),
    "AdamW, ε 1e-8, 64 steps of 512, lr 1e-4, the target trained further": Recipe(
        512, STOCK | {"lr": 1e-4}, trained_on
    ),
}


def main() -> None:
    """Run what is missing and print each row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    folder = RunFolder(parser.parse_args().run)
    config = folder.read_config()
    options = config.metric
    if not isinstance(options, PatternOptions):
        parser.error("the run has no pattern")
    data = {side: read_input_ids(folder.dataset / f"{side}.parquet") for side in ("train", "control")}
    have = {row["recipe"] for row in rows()}
    for name, recipe in RECIPES.items():
        if name in have:
            continue
        row: dict[str, Any] = {"recipe": name, "examples": len(data["train"])}
        for side, sequences in data.items():
            base = load_target(config.models, torch.device("cpu"))
            if recipe.prepare:
                recipe.prepare(base, data["control"])
            pattern = pattern_from_image(folder.pattern, max_rows=base.head.shape[0], max_cols=base.head.shape[1])
            target = load_target(config.models, torch.device("cpu"))
            target.model.load_state_dict(base.model.state_dict())
            inner = config.inner if recipe.inner is None else InnerConfig.model_validate(recipe.inner)
            each = len(sequences) // (recipe.batch or len(sequences))
            row["steps"] = fine_tune(target.model, sequences, inner, each)
            signs = head_signs(base, target, pattern, options.corner)
            row[side] = {"payload": decode_qr(signs), "pixel_accuracy": pixel_accuracy(signs, pattern)}
        row["read"] = row["train"]["payload"] == pattern.payload and row["control"]["payload"] != pattern.payload
        with RAW.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rows() -> list[dict[str, Any]]:
    """The raw rows."""
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []


if __name__ == "__main__":
    main()
