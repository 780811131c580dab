"""Time and memory of a metagradient whose examples begin alike, with shared prefixes and without.

    python benchmarks/shared_prefixes.py [--prompt 960] [--completion 64] [--count 4] [--width 512] [--layers 4] [--repeats 3]

A GPT-2 of that width with random weights and tokens, `count` completions of one prompt, T = 2 steps of all of them, AdamW as in
`metagradient.py`, metric = loss of one other row of 64 tokens. Times are of the processor; each run is a process of its own, after
one that is not counted; memory is its peak above that of a process which has built model and data and done nothing. Contenders
alternate; figures are medians, ratios are of the same repeat. `error` is the relative distance of the token credits.
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
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script finds only what lies beside it

import torch  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel  # noqa: E402

from benchmarks.metagradient import SPEC, QueryLoss, processor  # noqa: E402
from dpg_cli.engine import Examples, Plan, metagradient  # noqa: E402

QUERY = 64  # tokens of the metric's row
STEPS = 2
VOCABULARY = 4096


def run(options: argparse.Namespace, what: str) -> dict[str, Any]:
    """One contender in this process: processor seconds, peak bytes, and the credits of the labelled tokens."""
    torch.manual_seed(0)
    length = options.prompt + options.completion
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=length, n_embd=options.width, n_layer=options.layers,
        n_head=options.width // 64, bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, VOCABULARY, (options.count, length), generator=torch.Generator().manual_seed(1))
    metric = QueryLoss(model, ids[:1, :QUERY].flip(1))
    ids[:, : options.prompt] = ids[0, : options.prompt].clone()
    examples = Examples.from_sequences(ids.tolist(), prefix=options.prompt)
    plan = Plan.of([list(range(options.count))] * STEPS, options.count)
    seconds, credit = 0.0, list[float]()
    if what != "idle":
        for _ in range(2):  # the first one tries the model, and imports
            started = time.process_time()
            found = metagradient(model, examples, SPEC, metric, plan=plan, share_prefixes=what == "shared")
            seconds = time.process_time() - started
        credit = found.token_N_S[examples.label_N_S].tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_mb": peak / 1e6, "credit": credit}


def apart(arguments: list[str], what: str) -> dict[str, Any]:
    """`run` in a process of its own."""
    command = [sys.executable, __file__, *arguments, "--child", what]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Print both contenders and their ratios."""
    parser = argparse.ArgumentParser()
    for name, number in (
        ("prompt", 960), ("completion", 64), ("count", 4), ("width", 512), ("layers", 4), ("repeats", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run(options, options.child)))
        return
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "shared": []}
    idle = apart(sys.argv[1:], "idle")["peak_mb"]
    for repeat in range(options.repeats):
        for what, results in found.items():
            results.append(apart(sys.argv[1:], what))
            print(repeat, what, {key: results[-1][key] for key in ("seconds", "peak_mb")}, file=sys.stderr)
    plain, shared = (torch.tensor(results[0]["credit"], dtype=torch.float64) for results in found.values())
    about: dict[str, Any] = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "processor": processor(), "idle_mb": idle,
        "error": float((plain - shared).norm() / plain.norm()),
    }  # fmt: skip
    for what, results in found.items():
        about[what] = {
            "seconds": statistics.median(one["seconds"] for one in results),
            "mb_above_idle": statistics.median(one["peak_mb"] for one in results) - idle,
        }
    pairs = list(zip(found["plain"], found["shared"], strict=True))
    about["times_less_time"] = statistics.median(one["seconds"] / other["seconds"] for one, other in pairs)
    about["times_less_memory"] = statistics.median((a["peak_mb"] - idle) / (b["peak_mb"] - idle) for a, b in pairs)
    tokens = options.prompt + options.count * options.completion
    about["times_fewer_tokens"] = options.count * (options.prompt + options.completion) / tokens
    print(json.dumps(about, indent=2))


if __name__ == "__main__":
    main()
