"""The cost model against the clock: predicted and measured seconds of an outer step, and memory, for several tasks on this machine.

    python benchmarks/cost_model.py [--steps 8] [--json]

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

CASES = {  # name: threads, task and settings
    "pattern-67, N = 128, T = 2, 1 thread": (1, "pattern-67", ("prompts.per_step=32", "inner.batch_size=64")),
    "pattern-67, N = 256, T = 1": (2, "pattern-67", ()),
    "pattern-67, N = 256, T = 8": (2, "pattern-67", ("inner.batch_size=32",)),
    "l2-shrink": (2, "l2-shrink", ()),
    "language-rephrase": (2, "language-rephrase", ()),
}


def measure(threads: int, task: str, settings: tuple[str, ...], steps: int) -> dict[str, float]:
    """Predicted and measured figures of one case."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "dpg_cli", "run", task]
    for setting in (*settings, f"steps={steps}", "dataset.examples=16", "dataset.control=false"):
        command += ["--set", setting]
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True, env=environment)
    cost = json.loads(dry.stdout)["cost"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True, env=environment)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        info = json.loads((folder / "run.json").read_text())
    seconds = statistics.median(row["seconds"] for row in rows[2:])
    written = statistics.median(row["tokens"] for row in rows[2:]) / cost["tokens_per_step"]
    return {
        "predicted_s": cost["seconds_per_step"],
        "measured_s": seconds,
        "predicted_mb": cost["memory_mb"],
        "measured_mb": info["peak_memory_mb"],
        "tokens_share": written,
        "efficiency": EFFICIENCY * cost["seconds_per_step"] / seconds,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {case: measure(*parts, arguments.steps) for case, parts in CASES.items()}
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
