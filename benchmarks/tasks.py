"""The other presets at three seeds through `dpg run` and `dpg verify`: figures of docs/results.md.

python benchmarks/tasks.py [--workers 2] [--seeds 0,1,2]      runs what benchmarks/results/tasks.jsonl does not hold yet
python benchmarks/tasks.py --method naive                     a control at equal examples; rows go to controls.jsonl
python benchmarks/tasks.py --method metagradient --credit sequence --tasks pattern-67      what controls compare with
python benchmarks/tasks.py --credit sequence --times 10 --tasks pattern-67                 the same at ten times the outer steps
python benchmarks/tasks.py --method natural      natural policy steps in place of AdamW's; rows go to natural.jsonl
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

from dpg_cli.settings.presets import find_task

RESULTS = Path(__file__).parent / "results"
LANGUAGES = ("es", "de", "fr", "it")
METHODS = {  # rewards of whole examples reach tokens by `sequence` credit alone
    "metagradient": [],
    "sgd": ["attribution.method=sgd"],
    "naive": ["attribution.method=naive", "attribution.cross_group=false", "credit.mode=sequence"],
    "shared-off": ["attribution.cross_group=false"],
    "edit-distance": ["attribution.method=edit-distance", "credit.mode=sequence"],
    "language-id": ["attribution.method=language-id", "credit.mode=sequence"],
    "natural": [],
}
EXAMPLE_WISE = ("naive", "edit-distance", "language-id")
CASES = {
    "qr-embed": ["qr-embed", "--text", "DPG WAS HERE"],
    "pattern-67": ["pattern-67"],
    "l2-shrink": ["l2-shrink"],
    **{f"language-rephrase {language}": ["language-rephrase", "--language", language] for language in LANGUAGES},
    "uuid-emit": ["uuid-emit"],  # a fresh UUID for each run
    "subliminal-trait": ["subliminal-trait"],
}
HEAD = ("policy.step=natural", "policy.parameters=head", "models.untie_generator=true", "inner.labels=soft")
PATTERN = (
    "metric.margin=4.5",
    "metric.sharpness=2",
    "metric.aim=moments",
    "credit.discount=0",
    "policy.kl_budget=6",
    "policy.trust=0.1",
)
NATURAL = {  # natural steps in place of AdamW's, of the same preset; the outer steps that they need
    "qr-embed": (*HEAD, *PATTERN, "steps=8", "prompts.per_step=256", "inner.batch_size=1024"),
    "pattern-67": (*HEAD, *PATTERN, "steps=8"),
    "l2-shrink": (*HEAD, "steps=30", "policy.kl_budget=8", "policy.trust=0.2"),
    "language-rephrase": (*HEAD, "steps=24", "policy.kl_budget=4", "policy.trust=0.1"),
    "uuid-emit": (*HEAD, "steps=50", "policy.kl_budget=60", "policy.trust=0.3", "policy.kl=0", "policy.kl_decay=0"),
}
GROUPS = {"uuid-emit": ["rollout.group_size=4", "prompts.per_step=16"]}  # as many examples, for credit that compares


def steps_of(name: str) -> int:
    """Outer steps of a case's preset."""
    return int(find_task(CASES[name][0], "tiny").data()["steps"])


def summary(verdict: dict, side: str) -> str:
    """One side of a verdict in words."""
    value = verdict[side]
    if "accuracy" in value.get("measures", {}):
        measures, before = value["measures"], verdict["before"]
        return f"margin {measures['margin']:.3f} ({measures['margin'] - before['margin']:+.3f}), preferred {measures['accuracy']:.0%}"
    if "measures" in value:
        norm = value["measures"]["norm"]
        return f"norm {norm:.4f} ({norm - verdict['before']['norm']:+.4f})"
    if "pixel_accuracy" in value:
        return f"pixel accuracy {value['pixel_accuracy']:.4f}"
    if value["well_formed"] is None:  # a document
        greedy = verdict["greedy" if side == "data" else "greedy_control"]
        return f"{value['hits']:.1%} exact; greedy: `{greedy}`"
    return f"{value['hits']:.1%} as asked, {value['well_formed']:.1%} of them well-formed"


def one(name: str, seed: int, folder: Path, method: str, credit: str, times: int) -> dict[str, object]:
    """Run and verify one case; every method takes the preset's completions, and `times` its outer steps."""
    out = folder / f"{name.replace(' ', '-')}-{seed}"
    overrides = [*METHODS[method], *([f"credit.mode={credit}"] if credit else [])]
    if method == "natural":
        overrides += NATURAL[CASES[name][0]]
    if credit in ("sequence", "token"):
        overrides += GROUPS.get(name, [])
    if times > 1:
        overrides.append(f"steps={times * steps_of(name)}")
    key = {"task": name, "seed": seed, "method": method, "credit": credit, "times": times}
    dpg = [sys.executable, "-m", "dpg_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [*dpg, "run", *CASES[name], "--seed", str(seed), "--out", str(out), "--json"]
    command += [part for override in overrides for part in ("--set", override)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:  # a control whose reward dies is a result too
        cause = run.stderr.strip().splitlines()[-1]
        if run.returncode != 3:
            raise RuntimeError(cause)
        return {**key, "stopped": cause}
    verify = subprocess.run([*dpg, "verify", str(out), "--json"], env=environment, capture_output=True, text=True)
    verdict = json.loads(verify.stdout)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        **key,
        "examples": int(sum(step["examples"] for step in steps)),
        "phi_first": steps[0]["phi"],
        "phi_last": steps[-1]["phi"],
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
    parser.add_argument("--method", choices=METHODS, default="metagradient")
    parser.add_argument("--credit", choices=("sequence", "token", "expected"), help="instead of the preset's")
    parser.add_argument("--times", type=int, default=1, help="outer steps, in those of the preset")
    parser.add_argument("--tasks", help="comma-separated cases; all by default")
    options = parser.parse_args()
    every = list(CASES)[:-1] if options.method == "natural" else list(CASES)[1:]  # qr_embed.py has QR codes by AdamW
    cases = options.tasks.split(",") if options.tasks else every
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"unknown case {unknown[0]!r}; there are {', '.join(CASES)}")
    method, credit = options.method, options.credit or ("sequence" if options.method in EXAMPLE_WISE else "")
    if method in EXAMPLE_WISE and credit != "sequence":
        parser.error(f"--method {method} has one reward an example: --credit sequence")
    times = options.times
    own = method == "metagradient" and not credit and times == 1
    raw = RESULTS / ("natural.jsonl" if method == "natural" else "tasks.jsonl" if own else "controls.jsonl")
    RESULTS.mkdir(exist_ok=True)
    done = [json.loads(line) for line in raw.read_text().splitlines()] if raw.is_file() else []
    have = {
        (row["task"], row["seed"], row.get("method", "metagradient"), row.get("credit", ""), row.get("times", 1))
        for row in done
    }
    lock = Lock()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.workers) as pool:

        def job(name: str, seed: int) -> None:
            row = one(name, seed, Path(place), method, credit, times)
            with lock, raw.open("a") as file:
                file.write(json.dumps(row) + "\n")
                print({key: value for key, value in row.items() if key != "verdict"}, flush=True)

        wanted = [(name, int(seed)) for seed in options.seeds.split(",") for name in cases]
        missing = [(name, seed) for name, seed in wanted if (name, seed, method, credit, times) not in have]
        for future in [pool.submit(job, name, seed) for name, seed in missing]:
            future.result()


if __name__ == "__main__":
    main()
