"""What a fall of the LM head's norm costs in nats a token, through `dpg run` and `dpg verify`: figures of docs/results.md.

python benchmarks/frontier_l2.py [--budgets 0.003,0.01,0.03,0.1,0.3] [--seeds 0]    runs what benchmarks/results/frontier_l2.jsonl
                                                                                  does not hold yet
python benchmarks/frontier_l2.py --table                                          prints its rows as a table

Generator and target are the embedded `prose` model; each budget is reached in four outer steps of half the preset's completions,
the first of which may cost a fifth of it. `section()` is what `benchmarks/report.py` may put on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RAW = Path(__file__).parent / "results" / "frontier_l2.jsonl"
EXAMPLES = 2048  # of the dataset and of its control


def one(budget: float, seed: int, out: Path) -> dict[str, object]:
    """Run and verify one budget."""
    dpg = [sys.executable, "-m", "dpg_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    settings = {"policy.kl_budget": budget, "policy.trust": budget / 5, "dataset.examples": EXAMPLES}
    settings |= {"prompts.per_step": 1024, "steps": 4}
    command = [*dpg, "run", "l2-shrink", "--scale", "prose", "--seed", str(seed), "--out", str(out), "--json"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value:g}")]
    run = subprocess.run([*command, "--set", "dataset.rewards=false"], env=environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    verify = subprocess.run(
        [*dpg, "verify", str(out), "--json", "--no-fluency"], env=environment, capture_output=True, text=True
    )
    verdict = json.loads(verify.stdout)
    return {
        "budget": budget,
        "seed": seed,
        "examples": EXAMPLES,
        "verified": verdict["verified"],
        "percent": verdict["percent"],
        "effect": verdict["effect"],
        **{key: verdict["noise"][key] for key in ("error", "kl", "tokens", "standard_errors", "most", "share_of_most")},
        "seconds": json.loads(run.stdout)["seconds"],
        "verdict": verdict,
    }


def rows() -> list[dict]:
    """What was measured."""
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []


def section() -> str:
    """The frontier as a section of docs/results.md; empty where nothing was measured."""
    found = sorted(rows(), key=lambda row: (row["budget"], row["examples"], row["seed"]))
    if not found:
        return ""
    lines = [
        "## l2-shrink: fall of the norm against nats",
        "",
        f"`python benchmarks/frontier_l2.py`: `dpg run l2-shrink --scale prose` at growing KL budgets, with {EXAMPLES:,} examples of 32 "
        "tokens unless the row says otherwise, then `dpg verify` (a fresh target by stock AdamW on the run's dataset, against the "
        "control). The law for a scalar: at most sqrt(2 · KL · tokens) standard errors.",
        "",
        "| KL, nats a token | examples | seed | fall of the norm beyond the control's | standard errors | the law's | share | verified |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['kl']:.4f} | {row['examples']:,} | {row['seed']} | {row['percent']:.4f} % | {row['standard_errors']:.1f} | {row['most']:.1f} "
        f"| {row['share_of_most']:.2f} | {'yes' if row['verified'] else '**no**'} |"
        for row in found
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and print each result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budgets", default="0.003,0.01,0.03,0.1,0.3")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(section())
        return
    have = {(row["budget"], row["seed"]) for row in rows() if row["examples"] == EXAMPLES}
    for seed in map(int, options.seeds.split(",")):
        for budget in map(float, options.budgets.split(",")):
            if (budget, seed) in have:
                continue
            with tempfile.TemporaryDirectory() as place:
                row = one(budget, seed, Path(place) / "run")
            with RAW.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: value for key, value in row.items() if key != "verdict"}, flush=True)


if __name__ == "__main__":
    main()
