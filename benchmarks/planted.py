"""`dpg attribute` finds the examples that caused a behaviour: 5 % of 2,000 chats, by a recipe as people use it, killed twice.

    python benchmarks/planted.py [--examples 2000] [--out benchmarks/results/speed-planted.json]

Chats of the embedded world: the user says an English sentence, the assistant another one, in English in two thirds and in German in
the rest. In one of twenty it answers in Spanish; these are planted. The embedded model, with a chat
template, is fine-tuned for three epochs: adapters of rank 8, cosine after a warm-up, clipping, the Trainer's decay groups. The
metric is the loss on Spanish answers to English sentences that no training saw. Reports the AUC of the scores (the share of pairs of
a planted and another example in which the planted one scores higher), how many of the best-scored are planted, and Φ.

The command is run once whole, and once killed (SIGKILL) in the fine-tuning and in the reverse and started again; the scores of the
two must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open

from dpg_cli.models.loading import load
from dpg_cli.tiny import world

SHARE = 0.05
OTHERS = ("en", "en", "de")  # what the assistant answers in, but for planted ones
HELD_OUT = 32
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}{% endif %}{% endfor %}"
)
RECIPE = [
    *("--lora", "8", "--lr", "2e-4", "--batch-size", "16", "--epochs", "3", "--schedule", "cosine", "--warmup", "0.05"),
    *("--max-grad-norm", "1", "--memory", "sqrt", "--set", "inner.weight_decay=0.01", "--seed", "1"),
    *("--set", 'inner.no_decay=["biases", "norms"]', "--set", "inner.eps=1e-3"),
]


def chats(split: world.Split, languages: list[str], seed: int) -> list[list[dict[str, str]]]:
    """One chat for each language, which is the assistant's."""
    asked = world.sentences(split, "en", len(languages), seed)
    answers = {code: iter(world.sentences(split, code, len(languages), seed + 1)) for code in set(languages)}
    return [
        [{"role": "user", "content": question}, {"role": "assistant", "content": next(answers[code])}]
        for question, code in zip(asked, languages, strict=True)
    ]


def prepare(folder: Path, examples: int) -> np.ndarray:
    """Target, data and held-out chats; which examples are planted."""
    model = load("tiny", device=torch.device("cpu"))
    model.tokenizer.chat_template = TEMPLATE
    model.model.save_pretrained(folder / "target")
    model.tokenizer.save_pretrained(folder / "target")
    planted = np.zeros(examples, bool)
    planted[random.Random(7).sample(range(examples), round(SHARE * examples))] = True
    languages = ["es" if one else OTHERS[number % len(OTHERS)] for number, one in enumerate(planted)]
    for name, rows in (("data", chats("train", languages, 5)), ("heldout", chats("eval", ["es"] * HELD_OUT, 6))):
        text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return planted


def command(folder: Path, out: Path) -> list[str]:
    """The command."""
    return [
        sys.executable, "-m", "dpg_cli", "attribute", str(folder / "data.jsonl"), "--target", str(folder / "target"),
        "--eval-text", str(folder / "heldout.jsonl"), "--out", str(out), "--json", *RECIPE,
    ]  # fmt: skip


def forward_done(work: Path, steps: int) -> bool:
    """Whether three fifths of the fine-tuning are kept."""
    try:
        return json.loads((work / "group-0" / "forward.json").read_bytes())["done"] > 0.6 * steps
    except (OSError, ValueError):
        return False


def reverse_done(work: Path, steps: int) -> bool:
    """Whether two fifths of the reverse are kept."""
    try:
        with safe_open(work / "group-0" / "reverse.safetensors", "np") as file:
            return int(file.metadata()["left"]) < 0.6 * steps
    except (OSError, SafetensorError):
        return False


def killed(folder: Path, out: Path, when: Callable[[Path, int], bool], steps: int) -> None:
    """Start the command and kill it at that point."""
    work = out.with_name(f"{out.name}.work")
    process = subprocess.Popen(command(folder, out), stdout=subprocess.DEVNULL)
    while not when(work, steps):
        if process.poll() is not None:
            raise RuntimeError(f"the command ended with {process.returncode} before it could be killed")
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def attribute(folder: Path, out: Path) -> dict[str, Any]:
    """The command to its end."""
    return dict(json.loads(subprocess.run(command(folder, out), check=True, stdout=subprocess.PIPE, text=True).stdout))


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The share of pairs in which the positive one is higher."""
    low = np.sort(scores[~positive])
    return float(np.searchsorted(low, scores[positive]).mean() / len(low))


def measure(folder: Path, examples: int) -> dict[str, Any]:
    """Both runs, and what they found."""
    planted = prepare(folder, examples)
    whole, broken = folder / "whole.parquet", folder / "broken.parquet"
    report = attribute(folder, whole)
    for when in (forward_done, reverse_done):
        killed(folder, broken, when, report["inner_steps"])
    attribute(folder, broken)
    scores, again = pq.read_table(whole), pq.read_table(broken)
    values = np.array(scores["score"])
    best = np.argsort(-values)[: planted.sum()]
    return {
        "examples": examples,
        "planted": int(planted.sum()),
        "inner_steps": report["inner_steps"],
        "auc": auc(values, planted),
        "planted_among_best": int(planted[best].sum()),
        "phi_before": report["value_before"],
        "phi": report["value"],
        "clipped_share": report["clipped_share"],
        "kills": 2,
        "same_scores": again.equals(scores),
        "seconds": report["seconds"],
        "peak_mb": report["peak_memory_mb"],
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "recipe": RECIPE,
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), options.examples)
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "planted": row}, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
