"""Best of n: how much of a pattern the starting generator's own samples hold, the best share taken by exact credit.

python benchmarks/prose_best.py RUN      a finished `dpg run qr-embed --scale prose`, whose control is the pool of samples

The credit of each sample of the pool in one step on all of them; the best are trained into a fresh target by stock PyTorch.
Rows go to results/prose_best.jsonl.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpg_cli.driver.build import build
from dpg_cli.engine.loop import tell_noise
from dpg_cli.engine.metagrad import metagradient
from dpg_cli.engine.records import Examples
from dpg_cli.evidence.fluency.nats import compare, cost
from dpg_cli.evidence.stock import fine_tune, read_input_ids
from dpg_cli.evidence.verify import head_signs
from dpg_cli.models.loading import load_target
from dpg_cli.patterns.pattern import decode_qr, pattern_from_image, pixel_accuracy
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import PatternOptions

RAW = Path(__file__).parent / "results" / "prose_best.jsonl"
SIZES = (2048, 8192, 32768)


def main() -> None:
    """Score the pool, then train on the best of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    folder = RunFolder(parser.parse_args().run)
    config = folder.read_config()
    options = config.metric
    if not isinstance(options, PatternOptions):
        parser.error("the run has no pattern")
    pool = [row for row in read_input_ids(folder.dataset / "control.parquet") if len(row)]
    built = build(config)
    target = built.players.target
    examples = whole(pool)
    tell_noise(built.players, built.spec, examples)
    scores_N = metagradient(target.model, examples, built.spec.recipe, built.players.metric, batch_size=0).example_N
    best = scores_N.argsort(descending=True).tolist()
    pattern = pattern_from_image(folder.pattern, max_rows=target.head.shape[0], max_cols=target.head.shape[1])
    for size in (*SIZES, len(pool)):
        chosen = [pool[row] for row in best[:size]]
        fresh = load_target(config.models, torch.device("cpu"))
        fine_tune(fresh.model, chosen, config.inner, 1)
        signs = head_signs(target, fresh, pattern, options.corner)
        data, control = (
            cost(built.players.generator, [[]] * len(rows), [row[1:] for row in rows])
            for rows in (chosen, pool[-SIZES[1] :])
        )
        apart = compare("starting generator", data, control, paired=False)
        row: dict[str, Any] = {
            "pool": len(pool),
            "examples": size,
            "pixel_accuracy": pixel_accuracy(signs, pattern),
            "payload": decode_qr(signs),
            "nats": [apart.difference, apart.error],
        }
        with RAW.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def rows() -> list[dict[str, Any]]:
    """The raw rows."""
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []


def whole(rows: list[np.ndarray]) -> Examples:
    """Rows of one length as examples of which every token after the first is trained."""
    ids_N_S = torch.from_numpy(np.stack(rows).astype(np.int64))
    label_N_S = torch.ones_like(ids_N_S, dtype=torch.bool)
    label_N_S[:, 0] = False
    return Examples(ids_N_S, torch.ones_like(label_N_S), label_N_S)


if __name__ == "__main__":
    main()
