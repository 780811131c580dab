"""The other presets at three seeds through `dpg run` and `dpg verify`: figures of docs/results.md.

python benchmarks/tasks.py [--workers 2] [--seeds 0,1,2]      runs what benchmarks/results/tasks.jsonl does not hold yet
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

RAW = Path(__file__).parent / "results" / "tasks.jsonl"
CASES = {
    "pattern-67": ["pattern-67"],
    "l2-shrink": ["l2-shrink"],
    "language-rephrase es": ["language-rephrase", "--language", "es"],
}


def summary(verdict: dict, side: str) -> str:
    """One side of a verdict in words."""
    value = verdict[side]
    if "measures" in value:
        norm = value["measures"]["norm"]
        return f"norm {norm:.4f} ({norm - verdict['before']['norm']:+.4f})"
    if "pixel_accuracy" in value:
        return f"pixel accuracy {value['pixel_accuracy']:.4f}"
    return f"{value['hits']:.1%} as asked, {value['well_formed']:.1%} of them well-formed"


def one(name: str, seed: int, folder: Path) -> dict[str, object]:
    """Run and verify one case."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    dpg = [sys.executable, "-m", "dpg_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [*dpg, "run", *CASES[name], "--seed", str(seed), "--out", str(out), "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    verify = subprocess.run([*dpg, "verify", str(out), "--json"], env=environment, capture_output=True, text=True)
    verdict = json.loads(verify.stdout)
    return {
        "task": name,
        "seed": seed,
        "verified": verdict["verified"],
        "data": summary(verdict, "data"),
        "control": summary(verdict, "control"),
        "seconds": json.loads(run.stdout)["seconds"],
        "verdict": verdict,
    }


def main() -> None:
    """Run what is missing and print each result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    done = [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []
    have = {(row["task"], row["seed"]) for row in done}
    lock = Lock()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.workers) as pool:

        def job(name: str, seed: int) -> None:
            row = one(name, seed, Path(place))
            with lock, RAW.open("a") as file:
                file.write(json.dumps(row) + "\n")
                print({key: value for key, value in row.items() if key != "verdict"}, flush=True)

        wanted = [(name, int(seed)) for seed in options.seeds.split(",") for name in CASES]
        for future in [pool.submit(job, name, seed) for name, seed in wanted if (name, seed) not in have]:
            future.result()


if __name__ == "__main__":
    main()
