"""Run what is missing of the study, then write its page and figures.

python -m benchmarks.study                         everything; an hour or two on two cores, and it can be interrupted
python -m benchmarks.study --quick                 fewer seeds and smaller grids, into build/study-quick/; minutes
python -m benchmarks.study --only theorem,credit   some experiments
python -m benchmarks.study --minutes 4             starts no new cell after so long
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.study.experiments import EXPERIMENTS
from benchmarks.study.store import Store, key_of

ROOT = Path(__file__).parents[2]
FULL = ROOT / "benchmarks" / "results" / "study"
QUICK = ROOT / "build" / "study-quick"


def one(name: str, settings: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """One cell in a worker process: its rows, and the seconds that it took."""
    import torch

    torch.set_num_threads(1)
    start = time.perf_counter()
    return EXPERIMENTS[name].measure(settings), time.perf_counter() - start


def main() -> None:
    """Parse, run, print a line for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default=",".join(EXPERIMENTS))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    options = parser.parse_args()
    names = options.only.split(",")
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        parser.error(f"unknown experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}")
    store = Store(QUICK if options.quick else FULL)
    jobs = [(name, cell) for name in names for cell in EXPERIMENTS[name].cells(options.quick)]
    jobs.sort(key=lambda job: job[1]["seed"])  # what is interrupted has some seeds of everything
    missing = [(name, cell) for name, cell in jobs if key_of(cell) not in store.done(name)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} cells are there", flush=True)
    run(store, missing, options.workers, options.minutes)
    if options.quick:
        page(store, QUICK / "results.md", QUICK / "figures")
    else:
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "report.py")], check=True)


def run(store: Store, missing: list[tuple[str, dict[str, Any]]], workers: int, minutes: float) -> None:
    """Measure cells in worker processes; each is stored as soon as it is there."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    end = time.monotonic() + 60 * minutes
    waiting, failed = list(reversed(missing)), 0
    with ProcessPoolExecutor(workers) as pool:
        running: dict[Any, tuple[str, dict[str, Any]]] = {}
        while running or waiting:
            while waiting and len(running) < workers and time.monotonic() < end:
                job = waiting.pop()
                running[pool.submit(one, *job)] = job
            if not running:
                print(f"time is up; {len(waiting)} cells are missing", flush=True)
                return
            future = next(as_completed(running))
            name, cell = running.pop(future)
            try:
                rows, seconds = future.result()
            except Exception as error:  # the others go on; this one is missing and is said to be
                failed += 1
                print(f"FAILED  {name}  {key_of(cell)}: {error}", flush=True)
                continue
            store.add(name, cell, rows)
            print(f"{seconds:6.1f} s  {name}  {key_of(cell)}", flush=True)
    if failed:
        raise SystemExit(f"{failed} cells failed")


def page(store: Store, path: Path, figures: Path) -> None:
    """The study's sections and figures alone."""
    from benchmarks.study.experiments import draw, sections

    draw(store, figures)
    path.write_text("# Results of the quick study\n\n" + "\n".join(sections(store, "figures")), encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
