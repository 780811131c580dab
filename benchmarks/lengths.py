"""Time and memory of the metagradient by the length of a row, against plain training with PyTorch's fused attention.

    python benchmarks/lengths.py [--lengths 512,1024,2048,4096,8192] [--ways exact,one-sided,difference] [--layers 12] [--repeats 1]
                                 [--out benchmarks/results/speed-lengths.json]

GPT-2 small's shape with a context as long as the row, random weights and tokens, T = 2 steps of one row each (a micro-batch is one
row), AdamW as in `metagradient.py`, metric = loss of one other row of 64 tokens. "Plain" is the same two steps by torch.optim.AdamW
with `attn_implementation="sdpa"`. Each run is a process of its own; peak memory is resident memory of the whole process, *idle*
that of one which has built model and data and done nothing. Contenders alternate within a repeat; figures are medians, and the
ratio is over plain in the same repeat. A run that the machine kills for memory is recorded as such.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script finds only what lies beside it

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from benchmarks.metagradient import SPEC, QueryLoss, Workload, config_of, plain, processor, timed  # noqa: E402
from dpg_cli.engine import Examples, metagradient  # noqa: E402
from dpg_cli.errors import DpgError  # noqa: E402

LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = ("exact", "one-sided", "difference")
QUERY = 64  # tokens of the metric's row
STEPS = 2


def run(work: Workload, what: str) -> dict[str, Any]:
    """One contender in this process; seconds, peak bytes, and what differences said of their error."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**config_of(work), attn_implementation="sdpa")).eval()
    ids = torch.randint(0, work.vocabulary, (work.steps, work.length), generator=torch.Generator().manual_seed(1))
    examples, metric = Examples.from_sequences(ids.tolist()), QueryLoss(model, ids[:1, :QUERY].flip(1))
    seconds, said, refused = 0.0, None, ""
    if what == "plain":
        seconds = timed(lambda: plain(model, work, ids))
    elif what != "idle":
        stats: list[dict[str, float]] = []

        def call() -> None:
            result = metagradient(
                model, examples, SPEC, metric, batch_size=work.batch, micro_batch=1, second_order=what
            )  # type: ignore[arg-type]  # fmt: skip
            stats.append(result.stats)

        try:
            seconds = timed(call)
            said = stats[0].get("difference_error")
        except DpgError as error:
            refused = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_mb": peak / 1e6, "said": said, "refused": refused}


def apart(work: Workload, what: str) -> dict[str, Any] | None:
    """`run` in a process of its own; None if it was killed."""
    command = [sys.executable, __file__, "--child", json.dumps({"work": asdict(work), "what": what})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def measure(work: Workload, ways: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """The row of one length."""
    row: dict[str, Any] = {"length": work.length, "layers": work.layers}
    idle = apart(work, "idle")
    row["idle_mb"] = None if idle is None else idle["peak_mb"]
    found: dict[str, list[dict[str, Any] | None]] = {what: [] for what in ("plain", *ways)}
    for repeat in range(repeats):
        for what, results in found.items():
            results.append(apart(work, what))
            print(work.length, repeat, what, results[-1], file=sys.stderr)
    base = found["plain"]
    for what, results in found.items():
        good = [one for one in results if one is not None and not one["refused"]]
        if len(good) < len(results):
            row[what] = {"failed": next((one["refused"] for one in results if one is not None), "killed")}
            continue
        row[what] = {key: statistics.median(one[key] for one in good) for key in ("seconds", "peak_mb")}
        row[what]["said"] = good[0]["said"]
        if all(one is not None for one in base):
            for key, over in (("seconds", "time_ratio"), ("peak_mb", "peak_ratio")):
                row[what][over] = statistics.median(
                    one[key] / other[key] for one, other in zip(good, base, strict=True) if other is not None
                )
    return row


def main() -> None:
    """Print a row for each length."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        asked = json.loads(options.child)
        print(json.dumps(run(Workload(**asked["work"]), asked["what"])))
        return
    about: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "processor": processor(), "repeats": options.repeats, "rows": [],
    }  # fmt: skip
    for length in map(int, options.lengths.split(",")):
        work = Workload(768, options.layers, 12, 50257, length, STEPS, 1)
        about["rows"].append(measure(work, tuple(options.ways.split(",")), options.repeats))
        if options.out:  # as it goes: a long run may be cut off
            options.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
