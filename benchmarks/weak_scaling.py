"""Weak scaling on the CPU: an outer step of 128 completions by one process, of 256 by two, each with one thread; for comparison
256 completions by one process with two threads, which is how a single process uses the same two cores.

    python benchmarks/weak_scaling.py [--steps 12] [--json]

Runs are real ones (`dpg run pattern-67`, T = 2, credit `expected`), started by torchrun where there are two processes, and
alternate over repeats; figures are medians over the outer steps after the first two, from `metrics.jsonl`.
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

CASES = {
    "1 process, 1 thread, 128": (1, 1, 32),
    "2 processes, 1 thread each, 256": (2, 1, 64),
    "1 process, 2 threads, 256": (1, 2, 64),
}
PARTS = ("seconds", "seconds_rollout", "seconds_metagradient", "seconds_policy")


def run(processes: int, threads: int, prompts: int, steps: int) -> list[dict[str, float]]:
    """The log of one run."""
    launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        settings = (
            f"steps={steps}", f"prompts.per_step={prompts}", f"inner.batch_size={prompts * 2}", "rollout.portable=true",
            f"policy.minibatch={prompts * 4}", "dataset.examples=16", "dataset.control=false",
        )  # fmt: skip
        command = [sys.executable, *launch, "-m", "dpg_cli", "run", "pattern-67", "--out", str(folder)]
        for setting in settings:
            command += ["--set", setting]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "passive",
        }
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    logs: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for _ in range(arguments.repeats):
        for case, (processes, threads, prompts) in CASES.items():
            logs[case] += run(processes, threads, prompts, arguments.steps)[2:]
    found = {
        case: {part: statistics.median(row[part] for row in rows) for part in PARTS} for case, rows in logs.items()
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print("| | an outer step | rollout | metagradient | policy |\n|---|---|---|---|---|")
    for case, parts in found.items():
        print(f"| {case} | " + " | ".join(f"{parts[part]:.3f} s" for part in PARTS) + " |")
    one, two = (found[case]["seconds"] for case in list(CASES)[:2])
    print(f"\nweak-scaling efficiency of two processes: {one / two:.2f}")


if __name__ == "__main__":
    main()
