"""The cost model against the clock: predicted and measured seconds of an outer step, and memory, for several tasks on this machine.

    python benchmarks/cost_model.py [--steps 8] [--only WORDS] [--json] [--out FILE]

Each case is a real run in a process of its own, and a `--dry-run` of the same settings just before it. Seconds are medians over the
outer steps after the first two. The last column is the efficiency that would have made the prediction right.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from dpg_cli.planning.cost import EFFICIENCY

SKIPPED = 2  # outer steps that warm up
CASES = {  # name: threads, task and settings
    "pattern-67, N = 128, T = 2, 1 thread": (1, "pattern-67", ("prompts.per_step=32", "inner.batch_size=64")),
    "pattern-67, N = 256, T = 1": (2, "pattern-67", ()),
    "pattern-67, N = 256, T = 8": (2, "pattern-67", ("inner.batch_size=32",)),
    "l2-shrink": (2, "l2-shrink", ()),
    "language-rephrase": (2, "language-rephrase", ()),
    "qr-embed by natural steps": (1, "qr-embed.prose", ("dataset.examples=8192", "policy.kl_budget=0.1")),
    "l2-shrink by natural steps": (1, "l2-shrink.prose", ("prompts.per_step=1024", "inner.batch_size=1024")),
    "pattern-67 by natural steps, 8,192 tokens": (
        1,
        "pattern-67.prose",
        ("prompts.per_step=256", "inner.batch_size=256", "dataset.examples=4096"),
    ),
}


def measure(threads: int, task: str, settings: tuple[str, ...], steps: int) -> dict[str, float]:
    """Predicted and measured figures of one case."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    name, _, scale = task.partition(".")
    command = [sys.executable, "-m", "dpg_cli", "run", name, "--scale", scale or "tiny"]
    for setting in ("dataset.examples=16", *settings, f"steps={steps}", "dataset.control=false"):
        command += ["--set", setting]
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True, env=environment)
    cost = json.loads(dry.stdout)["cost"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True, env=environment)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        info = json.loads((folder / "run.json").read_text())
    seconds = statistics.median(row["seconds"] for row in rows[SKIPPED:])
    written = statistics.median(row["tokens"] for row in rows[SKIPPED:]) / cost["tokens_per_step"]
    return {
        "predicted_s": cost["seconds_per_step"],
        "measured_s": seconds,
        "predicted_mb": cost["memory_mb"],
        "measured_mb": info["peak_memory_mb"],
        "tokens_share": written,
        "efficiency": EFFICIENCY["natural" if scale == "prose" else "adamw"] * cost["seconds_per_step"] / seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", help="cases that have these words")
    parser.add_argument("--out", type=Path, help="also write the JSON here, as it comes")
    arguments = parser.parse_args()
    found = {}
    for case, parts in CASES.items():
        if arguments.only in case:
            found[case] = measure(*parts, arguments.steps)
            if arguments.out:
                arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(
        "| case | predicted | measured | memory predicted | measured | tokens of the longest | efficiency |\n|---"
        + "|---" * 6
        + "|"
    )
    for case, row in found.items():
        print(
            f"| {case} | {row['predicted_s']:.2f} s | {row['measured_s']:.2f} s | {row['predicted_mb']:.0f} MB "
            f"| {row['measured_mb']:.0f} MB | {row['tokens_share']:.0%} | {row['efficiency']:.2f} |"
        )


if __name__ == "__main__":
    main()
