"""Sixteen questions on W1: ours in one walk, beside one question, and beside bergson, in one interleaved run.

    python benchmarks/many_queries.py --bergson PYTHON [--queries 16] [--repeats 3] [--out FILE]

PYTHON is one of an environment with bergson 0.26.1. It has no pass for several questions, so each is a run of its own: training and
reverse. What a user of it could spare by hand, training once, is counted too: the runs less all trainings but one. The scores of
both are compared question by question.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("DPG_BENCH_HUGE_PAGES", "")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script finds only what lies beside it

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks.metagradient import SPEC, WORKLOADS, Bergson, QueryLoss, build, processor, timed, tokens  # noqa: E402
from dpg_cli.engine import Examples, Recipe  # noqa: E402
from dpg_cli.engine.metagrad import metagradients  # noqa: E402


def measure(python: str, queries: int, repeats: int) -> dict[str, Any]:
    """Seconds of each side in every repeat, and how far their scores lie apart."""
    work = WORKLOADS["W1"]
    model: Any = build(work)
    train, query = tokens(work)
    generator = torch.Generator().manual_seed(2)
    asked = torch.stack([torch.randint(0, work.vocabulary, query.shape, generator=generator) for _ in range(queries)])
    examples, metrics = Examples.from_sequences(train.tolist()), [QueryLoss(model, ids) for ids in asked]
    plan = Recipe.of(SPEC, work.batch).plan(examples)
    scores = torch.zeros(0)

    def ours(count: int) -> None:
        nonlocal scores
        scores = metagradients(model, examples, Recipe(SPEC), metrics[:count], plan=plan).example_Q_N

    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        other = Bergson(python, work, Path(folder), queries=asked)
        try:
            for repeat in range(repeats + 1):  # the first is warm-up
                row = {"one": timed(lambda: ours(1)), "many": timed(lambda: ours(queries))}
                row["bergson"] = other.run(queries if repeat else 1)
                row["bergson_training"] = other.training
                if repeat:
                    rows.append(row)
        finally:
            other.close()
        theirs = -torch.from_numpy(np.load(other.scores))  # of the loss, ours of minus the loss
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(scores.double(), theirs, strict=True)]
    spared = [row["bergson"] - row["bergson_training"] * (queries - 1) / queries for row in rows]
    return {
        "queries": queries,
        "rows": rows,
        "ours_many_to_one": statistics.median(row["many"] / row["one"] for row in rows),
        "bergson_to_ours": statistics.median(row["bergson"] / row["many"] for row in rows),
        "bergson_trained_once_to_ours": statistics.median(
            less / row["many"] for less, row in zip(spared, rows, strict=True)
        ),
        "largest_difference": max(apart),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--bergson", required=True, metavar="PYTHON")
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **measure(options.bergson, options.queries, options.repeats),
    }
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
