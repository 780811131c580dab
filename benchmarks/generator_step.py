"""The generator's policy step by AdamW: what sharing prompts, chunks of the vocabulary and adapters save.

    python benchmarks/generator_step.py [--repeat 3] [--out FILE]

Models have GPT-2's shape and random weights, completions random tokens. Each measurement is a process of its own; those that are compared take
turns. Time is the processor time of one thread, the least of the repeats; memory is the most that the process holds in the step above what it
held before it, the median. A first step on a few tokens makes gradients and moments, which then count as the model's own; for
adapters they count as the step's, since sparing them is the point.

    prompts     one group of 4 after a prompt of 960 tokens; a row for each completion, or one row
    vocabulary  32 completions of 128 tokens after 8, at 1,024 and at 50,257 tokens of vocabulary, with KL and `expected` credit in factors
    adapters    8 completions of 64 tokens after 32, with KL, activations computed again, a completion at a time: all weights, or LoRA of rank 16
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what is freed goes back at once
SHAPE = {"n_embd": 512, "n_layer": 3, "n_head": 8, "n_positions": 2048}
CASES: dict[str, dict[str, Any]] = {
    **{
        f"prompts {length} {kind}": {
            "shape": SHAPE, "vocabulary": 1024, "prompt": 960, "length": length, "groups": 1, "group": 4,
            "share": kind == "shared",
        }
        for length in (32, 64, 128)
        for kind in ("plain", "shared")
    },
    **{
        f"vocabulary {size}": {
            "shape": {"n_embd": 512, "n_layer": 8, "n_head": 8}, "vocabulary": size, "prompt": 8, "length": 128, "groups": 8,
            "group": 4, "kl": 0.1, "factors": True,
        }
        for size in (1024, 50257)
    },
    **{
        f"adapters {kind}": {
            "shape": {"n_embd": 512, "n_layer": 8, "n_head": 8}, "vocabulary": 50257, "prompt": 32, "length": 64, "groups": 2,
            "group": 4, "kl": 0.1, "checkpointing": True, "micro_batch": 1, "lora": kind == "lora", "whole": True,
        }
        for kind in ("all", "lora")
    },
}  # fmt: skip


def child(case: dict[str, Any]) -> dict[str, float]:
    """One step of a case."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from benchmarks.head_policy import Peak, resident
    from dpg_cli.engine.generator.policy import PolicySpec, policy_step
    from dpg_cli.engine.records import Credit, Rollout
    from dpg_cli.engine.soft import LabelFactors, StepFactors
    from dpg_cli.models.lora import Lora, adapt

    torch.set_num_threads(1)
    torch.manual_seed(0)
    size = case["vocabulary"]
    config = GPT2Config(vocab_size=size, bos_token_id=0, eos_token_id=0, **case["shape"])
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, name, 0.0)
    model: Any = GPT2LMHeadModel(config).eval()
    start: Any = None
    if case.get("lora"):
        model = adapt(model, Lora(rank=16, alpha=32.0), 0, "generator")
        start = model
    held = resident()
    if case.get("kl") and start is None:
        start = GPT2LMHeadModel(config).eval().requires_grad_(False)
    if case.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def rollout(prompt: int, length: int, groups: int, group: int) -> Rollout:
        ids = torch.randint(1, size, (groups * group, length))
        real = torch.ones_like(ids, dtype=torch.bool)
        asked = torch.randint(1, size, (groups, prompt)).repeat_interleave(group, 0)
        old = torch.full(ids.shape, -float(torch.log(torch.tensor(float(size)))))
        return Rollout([""] * len(ids), asked, torch.ones_like(asked, dtype=torch.bool), ids, real, old, group, 0.0)

    def credit(of: Rollout) -> Credit:
        advantage = torch.randn(of.ids_N_K.shape)
        if not case.get("factors"):
            return Credit(advantage)
        count, length = of.ids_N_K.shape
        width = config.n_embd
        made = StepFactors(
            torch.arange(count), torch.randn(count, length, width), torch.randn(count, length, width) * 1e-3,
            torch.ones(count, length), torch.randn(size, width) * 0.02, torch.randn(size, width) * 1e-4,
        )  # fmt: skip
        return Credit(advantage, None, {}, LabelFactors((made,), length))

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    spec = PolicySpec(
        minibatch=10_000,
        kl=case.get("kl", 0.0),
        share=case.get("share", False),
        micro_batch=case.get("micro_batch", 0),
    )
    order = torch.Generator().manual_seed(0)
    whole = rollout(case["prompt"], case["length"], case["groups"], case["group"])
    given = credit(whole)
    few = rollout(2, 2, 1, 2)
    policy_step(
        model, optimizer, few, credit(few) if case.get("factors") else Credit(torch.ones(2, 2)), spec, order, start
    )
    base, began = resident(), time.process_time()
    with Peak() as peak:
        policy_step(model, optimizer, whole, given, spec, order, start)
    seconds = time.process_time() - began
    return {"seconds": seconds, "peak_mb": peak.most - (held if case.get("whole") else base), "held_mb": held}


def measured(name: str, mapped: bool) -> dict[str, float]:
    """A case in a process of its own."""
    environment = {**os.environ, **(MAPPED if mapped else {}), "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, __file__, "--case", name], env=environment, check=True, capture_output=True, text=True
    ).stdout
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--case")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(child(CASES[options.case])))
        return
    from benchmarks.metagradient import processor

    names = [name for name in CASES if name.startswith(options.only)]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeat):
        for name in names:
            found = measured(name, mapped=True)
            peaks[name].append(found["peak_mb"])
            seconds[name].append((measured(name, mapped=False) if name.startswith("prompts") else found)["seconds"])
            print(f"{name}: {seconds[name][-1]:.2f} s, {peaks[name][-1]:.0f} MB", file=sys.stderr)
    rows = {name: {"seconds": min(seconds[name]), "peak_mb": statistics.median(peaks[name])} for name in names}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    about = {"machine": processor(), "repeat": options.repeat, "load": f"{load:.1f} processes a core beside it"}
    print(json.dumps({**about, "rows": rows}))
    if options.out:
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
