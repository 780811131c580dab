"""Time and memory of the exact metagradient against plain training, in one interleaved run.

    python benchmarks/metagradient.py [--repeats 5] [--workloads W1,T1] [--json]

Workloads: GPT-2 architecture from a random init, no dropout, random tokens, AdamW lr 1e-3, β (0.95, 0.975), ε 1e-8,
ε_root 1e-8, weight decay 0.01, metric = mean loss of one query batch. "Plain" is the same training by torch.optim.AdamW.
The floor counts operations: a plain step is 3F; the reverse costs 3F at t = 0 and 8F at every other step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel

from dpg_cli.engine import Examples, OptimizerSpec, metagradient

SPEC = OptimizerSpec("adamw", lr=1e-3, beta1=0.95, beta2=0.975, eps=1e-8, eps_root=1e-8, weight_decay=0.01)


@dataclass(frozen=True)
class Workload:
    """Width, layers, heads, vocabulary, sequence length, inner steps, batch."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    length: int
    steps: int
    batch: int


WORKLOADS = {
    "W1": Workload(128, 2, 4, 1024, 64, 8, 32),
    "W1-T32": Workload(128, 2, 4, 1024, 64, 32, 32),
    "T1": Workload(128, 2, 4, 1024, 64, 1, 256),
    "W3": Workload(768, 12, 12, 50257, 64, 2, 8),
}


class QueryLoss:
    """Minus the mean loss of one batch."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        logits = functional_call(model, dict(parameters), (), {"input_ids": self.ids, "use_cache": False}).logits
        return -nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        return {}


def build(work: Workload) -> GPT2LMHeadModel:
    """The target, always the same."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=work.vocabulary, n_positions=work.length, n_embd=work.width, n_layer=work.layers,
            n_head=work.heads, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip


def plain(work: Workload, ids: Tensor) -> None:
    """Ordinary training."""
    model = build(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SPEC.lr, betas=(SPEC.beta1, SPEC.beta2), weight_decay=0.01)
    for start in range(0, len(ids), work.batch):
        batch = ids[start : start + work.batch]
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def floor(steps: int) -> float:
    """Least possible multiple of plain training, by operation count."""
    return (3 * steps + 3 + 8 * (steps - 1)) / (3 * steps)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(name: str, repeats: int) -> dict[str, float | str]:
    """Medians of interleaved timings of one workload."""
    work = WORKLOADS[name]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, work.vocabulary, (work.steps * work.batch, work.length), generator=generator)
    query = torch.randint(0, work.vocabulary, (work.batch, work.length), generator=generator)
    model, metric = build(work), QueryLoss(query)
    examples = Examples.from_sequences(ids.tolist())

    def ours() -> object:
        return metagradient(model, examples, SPEC, metric, batch_size=work.batch)

    calls: dict[str, Callable[[], object]] = {"plain": lambda: plain(work, ids), "ours": ours}
    times: dict[str, list[float]] = {key: [] for key in calls}
    for repeat in range(repeats + 1):
        for key, call in calls.items():
            seconds = timed(call)
            if repeat:  # the first round warms up
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    return {
        "workload": name,
        "plain_s": medians["plain"],
        "ours_s": medians["ours"],
        "ratio": medians["ours"] / medians["plain"],
        "floor": floor(work.steps),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workloads", default="W1,T1")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(name, options.repeats) for name in options.workloads.split(",")]
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, indent=2))
        return
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; medians of {options.repeats}"
    )
    print(f"{'workload':<10}{'plain s':>10}{'ours s':>10}{'ours/plain':>12}{'floor':>8}")
    for row in rows:
        print(
            f"{row['workload']:<10}{row['plain_s']:>10.3f}{row['ours_s']:>10.3f}{row['ratio']:>12.2f}{row['floor']:>8.2f}"
        )


if __name__ == "__main__":
    main()
