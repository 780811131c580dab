"""Patterns by fluent data on the pretrained prose model, through `dpg run` and `dpg verify`: figures of docs/results.md.

python benchmarks/prose.py [--cases CASE,...] [--seeds 0,1,2]      runs what benchmarks/results/prose.jsonl does not hold yet
python benchmarks/prose.py --list                                  the cases
python benchmarks/prose.py --cases ... --keep FOLDER               keeps the run folders there (prose_recipes.py reads them)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
RAW = RESULTS / "prose.jsonl"
TEXTS = {"DPG": "DPG WAS HERE", "HELLO": "HELLO WORLD", "LIGHT": "LET THERE BE LIGHT"}
ADAMW = (  # the step without a metric of its own: the same preset's world, credit and completions
    "policy.step=adamw", "policy.parameters=all", "metric.aim=gradient", "steps=40", "prompts.per_step=1024",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One setting of a preset of scale `prose`.

    Attributes:
        task: of `dpg run`.
        options: of `dpg run`, beside the preset's.
        overrides: settings, as `--set` takes them.
        group: the part of the page that it belongs to.
    """

    task: str
    options: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    group: str = "payloads"

    def command(self, seed: int, out: Path) -> list[str]:
        """`dpg run` of this case."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return [
            "run",
            self.task,
            "--scale",
            "prose",
            *self.options,
            "--seed",
            str(seed),
            "--out",
            str(out),
            *sets,
            "--json",
        ]


def sized(examples: int, budget: float, steps: int) -> tuple[str, ...]:
    """Settings for a final dataset of another size."""
    return (f"dataset.examples={examples}", f"policy.kl_budget={budget}", f"steps={steps}")


CASES = {
    **{f"qr {name}": Case("qr-embed", ("--text", text)) for name, text in TEXTS.items()},
    "pattern-67": Case("pattern-67"),
    **{
        f"qr {name}, 8,192": Case("qr-embed", ("--text", text), sized(8192, 0.1, 8), "few")
        for name, text in TEXTS.items()
    },
    "qr DPG, other generator": Case(
        "qr-embed",
        (),
        ("models.generator=prose-reader", "policy.kl_budget=0.06", "policy.fisher_tokens=65536", "steps=12"),
        "other",
    ),
    "qr DPG, 2,048": Case("qr-embed", (), sized(2048, 0.5, 10), "frontier"),
    "qr DPG, 131,072": Case("qr-embed", (), sized(131072, 0.03, 6), "frontier"),
    **{
        f"qr DPG, AdamW, KL {coefficient}": Case("qr-embed", (), (*ADAMW, f"policy.kl={coefficient}"), "frontier")
        for coefficient in ("0.02", "0.2", "2")
    },
}


def dpg(*arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, on one thread."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ}
    return subprocess.run(
        [sys.executable, "-m", "dpg_cli", *arguments], env=environment, capture_output=True, text=True
    )


def one(name: str, seed: int, out: Path) -> dict[str, Any]:
    """Run and verify one case."""
    case = CASES[name]
    run = dpg(*case.command(seed, out))
    if run.returncode:
        raise RuntimeError(f"{name}, seed {seed}: {run.stderr.strip().splitlines()[-1]}")
    verify = dpg("verify", str(out), "--json")
    if verify.returncode not in (0, 4):  # 4: not verified, a result too
        raise RuntimeError(f"{name}, seed {seed}: {verify.stderr.strip().splitlines()[-1]}")
    verdict = json.loads(verify.stdout)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fluency = verdict["fluency"]
    keys = ("phi", "z_mean", "z_least", "predicted_accuracy", "examples_needed", "policy_kl")
    return {
        "case": name,
        "group": case.group,
        "seed": seed,
        "verified": verdict["verified"],
        **{side: verdict[side] for side in ("data", "control")},
        "nats": {row["reader"]: [row["difference"], row["error"]] for row in fluency["nats"]},
        "kl": fluency["kl"],
        "telling": {row["by"]: [row["example"]["value"], row["many"]["value"]] for row in fluency["telling"]},
        "last": {key: steps[-1].get(key) for key in keys},
        "completions": sum(step["examples"] for step in steps),
        "outer_steps": len(steps),
        "seconds": json.loads(run.stdout)["seconds"],
    }


def main() -> None:
    """Run what is missing and print each row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", help="separated by semicolons; those of the payloads by default")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--keep", type=Path, help="keep the run folders here")
    parser.add_argument("--list", action="store_true", help="print the cases")
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
        return
    wanted = options.cases.split(";") if options.cases else [name for name in CASES if CASES[name].group == "payloads"]
    if unknown := [name for name in wanted if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; see --list")
    have = {(row["case"], row["seed"]) for row in rows()}
    for seed in map(int, options.seeds.split(",")):
        for name in wanted:
            if (name, seed) in have:
                continue
            with tempfile.TemporaryDirectory() as place:
                out = Path(place) / "run"
                row = one(name, seed, out)
                with RAW.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
                if options.keep:
                    shutil.copytree(out, options.keep / f"{name.replace(' ', '-').replace(',', '')}-{seed}")


def rows() -> list[dict[str, Any]]:
    """The raw rows."""
    return [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []


if __name__ == "__main__":
    main()
