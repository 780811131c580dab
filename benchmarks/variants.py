"""What elements of a recipe, adapters, packing and many questions cost: ratios of metagradients within one run.

    python benchmarks/variants.py [--repeats 5] [--only recipe,queries,packing,lora] [--out FILE]

recipe    W1 with a cosine schedule after warm-up, clipping by the global norm and decay groups, beside W1 as it is
queries   W1 with 16 questions in one walk, beside one question
packing   W1's model on ragged rows whose mean length is a quarter of the longest, packed beside padded
lora      W3 with adapters of rank 8 on all linear maps but the head, beside all weights (one repeat is enough)

Each measurement is a process of its own, variants alternate, and ratios are medians of those within a repeat. Peak memory is
above that of a process that has built model and data and done nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script finds only what lies beside it

import torch  # noqa: E402

from benchmarks.metagradient import SPEC, WORKLOADS, QueryLoss, build, processor, tokens  # noqa: E402
from dpg_cli.engine import Examples, Recipe, metagradient  # noqa: E402
from dpg_cli.engine.inner.recipe import Groups, Schedule  # noqa: E402
from dpg_cli.engine.metagrad import metagradients  # noqa: E402
from dpg_cli.models.lora import Lora, adapt  # noqa: E402

QUERIES = 16
RAGGED = 256  # rows, of at most as many tokens
VARIANTS = {
    "recipe": ("plain", "recipe"),
    "queries": ("one", "sixteen"),
    "packing": ("padded", "packed"),
    "lora": ("full", "lora"),
}
TARGETS = {"recipe": 1.03, "queries": 4.0, "packing": 0.5, "lora": 0.5}
Run = Callable[[], Any]


def prepared(variant: str) -> Run:
    """Build model and data; the call makes the metagradient."""
    work = WORKLOADS["W3" if variant in ("full", "lora") else "W1"]
    model: Any = build(work)
    train, query = tokens(work)
    examples = Examples.from_sequences(train.tolist())
    recipe = Recipe(SPEC)
    if variant == "recipe":
        schedule, groups = Schedule("cosine", warmup=0.1), Groups(no_decay=("biases", "norms"))
        recipe = Recipe(SPEC, schedule=schedule, max_grad_norm=1.0, groups=groups)
    if variant in ("one", "sixteen"):
        count = QUERIES if variant == "sixteen" else 1
        generator = torch.Generator().manual_seed(2)
        asked = [torch.randint(0, work.vocabulary, query.shape, generator=generator) for _ in range(count)]
        metrics = [QueryLoss(model, ids) for ids in asked]
        plan = Recipe.of(SPEC, work.batch).plan(examples)
        return lambda: metagradients(model, examples, recipe, metrics, plan=plan)
    if variant in ("padded", "packed"):
        model, examples = ragged()
    if variant == "lora":
        model = adapt(model, Lora(rank=8), 0)
    metric = QueryLoss(model, query)
    packing = variant == "packed"
    return lambda: metagradient(model, examples, recipe, metric, batch_size=work.batch, packing=packing)


def ragged() -> tuple[Any, Examples]:
    """W1's model with a longer context, and rows with lengths as chats have them: most short, a few long."""
    from dataclasses import replace

    work = replace(WORKLOADS["W1"], length=RAGGED)
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(RAGGED, generator=generator)
    lengths = (8 + (RAGGED - 8) * draws.pow(3)).long().tolist()  # the mean of u³ is a quarter
    lengths[0] = RAGGED
    rows = [torch.randint(0, work.vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return build(work), Examples.from_sequences(rows)


def child(variant: str) -> None:
    """Measure in this process."""
    run = prepared(variant)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    start = time.perf_counter()
    run()
    seconds = min(first, time.perf_counter() - start)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": seconds, "peak_mb": (after - before) / 1024}))


def measured(variant: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", variant], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    found: dict[str, Any] = {"machine": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in options.only.split(","):
        base, other = VARIANTS[name]
        rows = [(measured(base), measured(other)) for _ in range(options.repeats)]
        ratios = [two["seconds"] / one["seconds"] for one, two in rows]
        memory = [two["peak_mb"] / max(1.0, one["peak_mb"]) for one, two in rows]
        found[name] = {
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "memory": statistics.median(memory),
            "seconds": [statistics.median(row[side]["seconds"] for row in rows) for side in (0, 1)],
            "peak_mb": [statistics.median(row[side]["peak_mb"] for row in rows) for side in (0, 1)],
            "wanted": TARGETS[name],
        }
        print(name, json.dumps(found[name]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
