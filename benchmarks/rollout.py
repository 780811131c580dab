"""Tokens a second of our sampling against `transformers` generate at equal batch, and where an outer step's time goes.

    python benchmarks/rollout.py [--repeats 5] [--json] [--out FILE]

Both sample 256 completions of 32 tokens (64 prompts, four each) from the embedded model at temperature 1 without top-k, in turns.
`generate` gets each prompt four times; ours reads it once and repeats its cache, and also records log-probabilities and entropy.
The shares are medians over the outer steps, but the first, of `dpg run qr-embed` and `dpg run language-rephrase`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from transformers.utils import logging as transformers_logging

from dpg_cli.engine.generator.rollout import Sampling, encode_prompts, sample
from dpg_cli.models.loading import load
from dpg_cli.tiny import world

PROMPTS, GROUP, TOKENS = 64, 4, 32


def sampling(repeats: int) -> dict[str, Any]:
    """Medians of both, and of the ratio within each repeat."""
    generator = load("tiny", device=torch.device("cpu"))
    prompts = world.sentences("train", "en", PROMPTS, seed=3)
    settings = Sampling(GROUP, TOKENS, TOKENS, 1.0, generator.eos_id, generator.pad_id)
    ids, mask = encode_prompts(generator.tokenizer, [p for p in prompts for _ in range(GROUP)], generator.pad_id)
    rng = torch.Generator().manual_seed(0)

    def ours() -> int:
        rollout = sample(generator.model, generator.tokenizer, prompts, settings, rng)
        return int(rollout.mask_N_K.sum())

    @torch.no_grad()
    def theirs() -> int:
        out = generator.model.generate(
            input_ids=ids, attention_mask=mask.long(), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=TOKENS, min_new_tokens=TOKENS, pad_token_id=generator.pad_id,
        )  # fmt: skip
        return len(ids) * (out.shape[1] - ids.shape[1])

    def rate(call: Callable[[], int]) -> float:
        started = time.perf_counter()
        return call() / (time.perf_counter() - started)

    rates = [(rate(ours), rate(theirs)) for _ in range(repeats + 1)][1:]
    return {
        "batch": PROMPTS * GROUP,
        "tokens": TOKENS,
        "ours_tokens_s": statistics.median(a for a, _ in rates),
        "generate_tokens_s": statistics.median(b for _, b in rates),
        "ours_over_generate": statistics.median(a / b for a, b in rates),
    }


def shares(task: str, steps: int = 8) -> dict[str, Any]:
    """Share of an outer step of a task for each stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dpg_cli", "run", task, "--set", f"steps={steps}", "--out", f"{folder}/run"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()][1:]
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0] if name.startswith("seconds")}
    return {"task": task, "seconds": middle["seconds"]} | {
        name.removeprefix("seconds_"): middle[name] / middle["seconds"] for name in middle if name != "seconds"
    }


def main() -> None:
    """Print both."""
    transformers_logging.set_verbosity_error()
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "sampling": sampling(options.repeats)}
    found["shares"] = [shares(task) for task in ("qr-embed", "language-rephrase")]
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
        return
    row = found["sampling"]
    print(
        f"{row['batch']} completions of {row['tokens']} tokens: ours {row['ours_tokens_s']:,.0f} tokens/s, "
        f"generate {row['generate_tokens_s']:,.0f}, ratio {row['ours_over_generate']:.2f}"
    )
    for share in found["shares"]:
        print(
            f"{share['task']}: {share['seconds']:.2f} s an outer step: rollout {share['rollout']:.0%}, "
            f"metagradient {share['metagradient']:.0%}, policy {share['policy']:.0%}"
        )


if __name__ == "__main__":
    main()
