"""The stages that compute: metagradients beside plain training, the generator's step at 1B, outer steps beside the planner's prediction.

    python -m benchmarks.gpu_check.stages metagradient|generator|outer --device cuda --out FILE [--tiny] [--bergson PYTHON]

What is found is written as it comes. With `--tiny` shapes are small enough for a CPU and seconds; the stages are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.checkpoints import save
from benchmarks.head_policy import Peak, natural_step
from dpg_cli.driver.build import build
from dpg_cli.engine.loop import outer_step
from dpg_cli.models.loading import load
from dpg_cli.planning.cost import this_device
from dpg_cli.planning.job import Size, job_of
from dpg_cli.planning.memory import BASE_BYTES
from dpg_cli.planning.scaling import predict
from dpg_cli.settings.presets import find, resolve

ROOT = Path(__file__).parent.parent.parent
MADE = ROOT / "build" / "gpu-check"
# G96 whole is 96 times G8: `python benchmarks/metagradient.py --device cuda --workloads G96 --states sqrt`
FULL, SMALL = ("G8", "G96S"), ("D8", "D24")
OUTER, TINY_OUTER = 10, 3
TINY = (
    "prompts.per_step=8", "inner.batch_size=8", "rollout.max_tokens=8", "rollout.min_tokens=8", "policy.fisher_tokens=64",
    "policy.cg_iterations=3",
)  # fmt: skip
KEPT = (
    "phi", "seconds", "seconds_rollout", "seconds_metagradient", "seconds_policy", "policy_kl", "policy_residual", "policy_iterations",
)  # fmt: skip


def metagradient(options: argparse.Namespace) -> None:
    """Ours, plain training in float32 and bf16, differences, and bergson where it is given."""
    for name in SMALL if options.tiny else FULL:
        part = options.out.with_suffix(f".{name}.json")
        command = [
            sys.executable, str(ROOT / "benchmarks" / "metagradient.py"), "--device", options.device, "--workloads", name,
            "--repeats", "0", "--no-memory", "--no-agreement", "--plain-bf16", "--out", str(part),
        ]  # fmt: skip
        command += ["--states", "sqrt"] if name in ("G96S", "D24") else []
        command += ["--bergson", options.bergson] if options.bergson else []
        subprocess.run(command, check=True)
        keep(options.out, {name: json.loads(part.read_text(encoding="utf-8"))})


def generator(options: argparse.Namespace) -> None:
    """Rollout and natural step on the head of a generator with random weights."""
    shape, count, length = ("tiny-llama", 4, 8) if options.tiny else ("llama-1b", 32, 128)
    device = torch.device(options.device)
    loaded = load(str(save(shape, MADE / shape)), device=device)
    print(f"{shape}: {loaded.parameter_count:,} parameters", flush=True)
    keep(options.out, natural_step(loaded.model, loaded.tokenizer, count, length) | {"shape": shape})


def outer(options: argparse.Namespace) -> None:
    """Outer steps of `qr-embed --scale gpu`, generator and target of one random checkpoint, and their peak beside the planner's."""
    shape, steps = ("tiny-gpt2", TINY_OUTER) if options.tiny else ("gpt2", OUTER)
    folder = str(save(shape, MADE / shape))
    sets = [f'models.generator="{folder}"', f'models.target="{folder}"', f"device={options.device}", f"steps={steps}"]
    config = resolve(find("qr-embed.gpu").data(), [*sets, *(TINY if options.tiny else ())])
    started = time.perf_counter()
    built = build(config)
    players = built.players
    keep(options.out, {"shape": shape, "build_s": time.perf_counter() - started})
    job = job_of(config, Size.of(players.generator), Size.of(players.target), 1)
    device = this_device(built.device, built.config.policy.step)
    prediction = predict(job, device)
    rows: list[dict[str, float]] = []
    with Peak(built.device) as peak:
        for step in range(steps):
            report = outer_step(players, built.spec, built.prompts.at(step), step)
            rows.append({name: report.numbers[name] for name in KEPT if name in report.numbers})
            del report
            base = BASE_BYTES if built.device.type == "cpu" else 0.0
            phases = {name: size for name, size in prediction.bytes_by_phase.items() if name != "dataset"}
            keep(
                options.out,
                {
                    "rows": rows,
                    "peak_mb": peak.now(),
                    "predicted_mb": (max(phases.values()) + base) / 1e6,
                    "predicted_s": prediction.seconds,
                    "predicted_by_part": prediction.seconds_by_part,
                    "efficiency": device.efficiency,
                    "rate": device.rate,
                },
            )
            print(f"outer step {step + 1} of {steps}: {rows[-1]['seconds']:.2f} s, {peak.now():,.0f} MB", flush=True)


def keep(path: Path, more: dict[str, Any]) -> None:
    """Add figures to what the stage has found."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(known | more), encoding="utf-8")
    part.replace(path)


STAGES = {"metagradient": metagradient, "generator": generator, "outer": outer}


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bergson")
    options = parser.parse_args()
    about = {"torch": torch.__version__, "cores": os.cpu_count()}
    if options.device.startswith("cuda"):
        card = torch.cuda.get_device_properties(torch.device(options.device))
        about |= {"card": card.name, "card_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
    keep(options.out, {"about": about})
    STAGES[options.stage](options)


if __name__ == "__main__":
    main()
