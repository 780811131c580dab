"""Outer steps of `qr-embed --scale gpu` at GPT-2 small's size on a CPU: random weights, few completions, killed and resumed.

    python benchmarks/large_steps.py [--steps 3] [--completions 16] [--tokens 32] [--folder build/large-steps] [--out FILE]

Generator and target are one checkpoint of GPT-2 small's shape with random weights (`gpu_check/checkpoints.py`). The run is killed by
SIGKILL once its first outer step is saved, and goes on with `dpg resume`. Peaks are the system's count of each process (VmHWM), the
prediction that of the planner for these settings.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.gpu_check.checkpoints import save

ROOT = Path(__file__).parent.parent
EVERY = 0.2  # seconds between two looks
SHOWN = ("phi", "seconds", "seconds_rollout", "seconds_metagradient", "seconds_policy", "policy_kl", "policy_residual")


def peak_mb(pid: int) -> float:
    """The most that a process has held until now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 * 1.048576 for line in lines if line.startswith("VmHWM:")), 0.0)


def run(command: list[str], log: Path, until: Path | None = None) -> tuple[float, float, int]:
    """Run a command until it ends, or until a folder has something in it and the process is killed.

    Returns:
        Peak in MB, seconds, exit code.
    """
    started, most = time.perf_counter(), 0.0
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
        while process.poll() is None:
            most = max(most, peak_mb(process.pid))
            if until is not None and until.is_dir() and any(until.glob("step-*")):
                process.kill()
            time.sleep(EVERY)
    return most, time.perf_counter() - started, process.returncode


def main() -> None:
    """Make, run, kill, resume, tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--completions", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--shape", default="gpt2")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "large-steps")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = str(save(options.shape, options.folder / options.shape).resolve())
    place, log = options.folder / "run", options.folder / "log.txt"
    shutil.rmtree(place, ignore_errors=True)
    log.write_text("")
    sets = (
        f"steps={options.steps}", f"prompts.per_step={options.completions}", f"inner.batch_size={options.completions}",
        f"rollout.max_tokens={options.tokens}", f"rollout.min_tokens={options.tokens}", "dataset.examples=16", "dataset.control=false",
        "checkpoint.every_steps=1",
    )  # fmt: skip
    dpg = [sys.executable, "-m", "dpg_cli"]
    asked = [*dpg, "run", "qr-embed", "--scale", "gpu", "--generator", model, "--target", model, "--device", "cpu"]
    for text in sets:
        asked += ["--set", text]
    plan = subprocess.run(
        [*asked, "--card", "H100", "--dry-run", "--json"], check=True, stdout=subprocess.PIPE, text=True
    )
    killed = run([*asked, "--out", str(place)], log, place / "checkpoints")
    before = (place / "metrics.jsonl").read_text().splitlines()
    resumed = run([*dpg, "resume", str(place)], log)
    after = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    kept = json.loads(before[0]) if before else {}
    rows = [{name: row[name] for name in SHOWN if name in row} for row in after]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    found = {
        "date": time.strftime("%Y-%m-%d"), "shape": options.shape, "completions": options.completions, "tokens": options.tokens,
        "threads": threads, "killed_after": len(before), "killed_code": killed[2], "resumed_code": resumed[2],
        "first_step_kept": bool(kept) and after[0] == kept, "rows": rows, "peak_mb": [killed[0], resumed[0]],
        "seconds": [killed[1], resumed[1]], "planned_phases": json.loads(plan.stdout)["outlook"]["phases"],
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
