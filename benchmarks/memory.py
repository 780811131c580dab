"""What the choices of memory cost, and what memory does not grow with.

    python benchmarks/memory.py [--repeats 3] [--part steps] [--json] [--out FILE]

1. T = 256 at W1's shape: time and peak memory of keep, sqrt and offload, beside the peak of T = 16.
2. Vocabulary 50,257 against 1,024, at 512 and 4,096 tokens a step (one inner step of a small model): the peak above that of
   the parameters' own vectors. All logits of 4,096 tokens in float32 would be 823 MB.

Every peak is of a process of its own; times are medians over repeats that alternate between the choices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from metagradient import WORKLOADS, Workload, peak_bytes

from dpg_cli.planning.memory import BASE_BYTES, Need

SMALL = Workload(64, 1, 2, 1024, 64, 2, 8)


def parameters_of(work: Workload) -> int:
    """n of GPT-2 with an untied head."""
    layer = 12 * work.width**2 + 13 * work.width
    return 2 * work.vocabulary * work.width + work.length * work.width + work.layers * layer + 2 * work.width


def predicted_mb(work: Workload, states: Any) -> float:
    """Peak memory that `--dry-run` and `dpg attribute` would predict."""
    rows = min(work.batch, max(1, 4096 // work.length))
    need = Need(
        parameters_of(work), 4, work.steps, states, rows, work.length, work.layers, work.width, work.heads,
        work.vocabulary, work.batch, work.batch * work.length,
    )  # fmt: skip
    return (BASE_BYTES + need.bytes) / 1e6


def steps(repeats: int) -> list[dict[str, Any]]:
    """Rows of part 1."""
    found: dict[str, list[tuple[float, float]]] = {"keep": [], "sqrt": [], "offload": []}
    for _ in range(repeats):
        for memory, runs in found.items():
            runs.append(peak_bytes("T256", "ours", memory))
    base = {memory: peak_bytes("T16", "ours", memory)[0] for memory in found}
    keep = [seconds for _, seconds in found["keep"]]
    return [
        {
            "states": memory,
            "seconds": statistics.median(seconds for _, seconds in runs),
            "time_over_keep": statistics.median(s / k for (_, s), k in zip(runs, keep, strict=True)),
            "peak_mb": max(peak for peak, _ in runs) / 1e6,
            "predicted_mb": predicted_mb(WORKLOADS["T256"], memory),
            "peak_t16_mb": base[memory] / 1e6,
            "predicted_t16_mb": predicted_mb(WORKLOADS["T16"], memory),
            "peak_over_t16_keep": max(peak for peak, _ in runs) / base["keep"],
        }
        for memory, runs in found.items()
    ]


def vocabulary() -> list[dict[str, Any]]:
    """Rows of part 2."""
    rows = []
    for size in (1024, 8192, 50257):
        for batch in (8, 64):
            work = replace(SMALL, vocabulary=size, batch=batch)
            idle = peak_bytes(asdict(work), "nothing")[0]  # type: ignore[arg-type]
            peak = peak_bytes(asdict(work), "ours")[0]  # type: ignore[arg-type]
            rows.append(
                {
                    "vocabulary": size,
                    "tokens": batch * work.length,
                    "peak_mb": peak / 1e6,
                    "above_idle_mb": (peak - idle) / 1e6,
                    "predicted_mb": predicted_mb(work, "keep"),
                    "vectors_mb": 8 * parameters_of(work) * 4 / 1e6,
                    "all_logits_mb": batch * work.length * size * 4 / 1e6,
                }
            )
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", choices=("steps", "vocabulary", "both"), default="both")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    tables: dict[str, list[dict[str, Any]]] = {}
    if options.part != "vocabulary":
        tables["steps"] = steps(options.repeats)
    if options.part != "steps":
        tables["vocabulary"] = vocabulary()
    if options.out:
        options.out.write_text(
            json.dumps({"date": time.strftime("%Y-%m-%d")} | tables, indent=2) + "\n", encoding="utf-8"
        )
    if options.json:
        print(json.dumps(tables, indent=2))
        return
    for rows in tables.values():
        print("  ".join(f"{key:>18}" for key in rows[0]))
        for row in rows:
            print(
                "  ".join(f"{value:>18.2f}" if isinstance(value, float) else f"{value:>18}" for value in row.values())
            )
        print()


if __name__ == "__main__":
    main()
