"""The natural policy step on the head at GPT-2's vocabulary: time against the rollout's, memory above the model's own.

    python benchmarks/head_policy.py [--layers 12] [--out FILE]

A GPT-2 of 768 by 12 layers and 50,257 rows with random weights samples 32 completions of 128 tokens, then takes one natural
step on its head from random advantages of their tokens. Memory is the peak of the step above what the process held before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.metagradient import processor
from dpg_cli.engine.generator.contexts import contexts
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.natural.head_policy import HeadChange, LabelGradient, add_advantages
from dpg_cli.engine.natural.step import NaturalPolicy, NaturalSpec
from dpg_cli.engine.records import Credit
from dpg_cli.models.loading import untie_head
from dpg_cli.tiny import MODEL_DIR

COUNT, LENGTH = 32, 128


def resident(device: torch.device) -> float:
    """MB that the process holds now: of the machine, or of the card."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """The most that the process holds within the block, in MB: looked at every 5 ms, or what a card's allocator counted.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> Peak:
        self.most, self.done = resident(self.device), False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.thread = threading.Thread(target=self.watch)
            self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done:
            self.most = max(self.most, resident(self.device))
            time.sleep(0.005)

    def now(self) -> float:
        """The most until now."""
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) / 1e6
        return self.most

    def __exit__(self, *_: object) -> None:
        self.now()
        self.done = True
        if self.device.type != "cuda":
            self.thread.join()


def clock(device: torch.device) -> float:
    """Seconds, once all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def natural_step(model: Any, tokenizer: Any, count: int, length: int) -> dict[str, Any]:
    """Sample completions, and take one natural step on the head from random advantages: seconds, and memory above the model's.

    Args:
        model: the generator, on its device.
        tokenizer: any with a word "a".
        count, length: of the completions.
    """
    device = next(model.parameters()).device
    untie_head(model)
    sampling = Sampling(1, length, length, 1.0, eos_id=0, pad_id=0, batch_size=count)
    started = clock(device)
    rollout = sample(model, tokenizer, ["a"] * count, sampling, torch.Generator(device).manual_seed(0))
    seconds_rollout = clock(device) - started
    head = find_head(model)
    assert head is not None
    policy = NaturalPolicy(NaturalSpec(), HeadChange(head))
    base, started = resident(device), clock(device)
    with Peak(device) as peak:
        labels = contexts(model, head, rollout, sampling)
        seconds_contexts = clock(device) - started
        places = policy.places(rollout.mask_N_K)
        gradient = LabelGradient.like(labels, places)
        advantage = torch.randn(rollout.ids_N_K.shape, generator=torch.Generator().manual_seed(1)).to(device)
        add_advantages(gradient, labels, rollout, Credit(advantage))
        numbers = policy.step(labels, places, gradient.total, 0.0)
    seconds = clock(device) - started
    return {
        "tokens": len(places),
        "seconds_rollout": seconds_rollout,
        "seconds_contexts": seconds_contexts,
        "seconds_step": seconds,
        "step_over_rollout": seconds / seconds_rollout,
        "peak_mb_above": peak.most - base,
        "figures": numbers,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=options.layers, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)  # of a smaller vocabulary: the completions are ids, not texts
    found = {"machine": processor(), "layers": options.layers, **natural_step(model, tokenizer, COUNT, LENGTH)}
    print(json.dumps(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
