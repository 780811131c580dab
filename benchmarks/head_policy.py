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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from benchmarks.metagradient import processor
from dpg_cli.engine.generator.contexts import contexts
from dpg_cli.engine.generator.head_policy import HeadChange, LabelGradient, add_advantages
from dpg_cli.engine.generator.natural import NaturalPolicy, NaturalSpec
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.records import Credit
from dpg_cli.tiny import MODEL_DIR

COUNT, LENGTH = 32, 128


def resident() -> float:
    """MB that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """The most that the process holds within the block, in MB, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.most, self.done = resident(), False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.done:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def __exit__(self, *_: object) -> None:
        self.done = True
        self.thread.join()


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
    sampling = Sampling(1, LENGTH, LENGTH, 1.0, eos_id=0, pad_id=0, batch_size=COUNT)
    started = time.perf_counter()
    rollout = sample(model, tokenizer, ["a"] * COUNT, sampling, torch.Generator().manual_seed(0))
    seconds_rollout = time.perf_counter() - started
    head = find_head(model)
    assert head is not None
    policy = NaturalPolicy(NaturalSpec(), HeadChange(head))
    base, started = resident(), time.perf_counter()
    with Peak() as peak:
        labels = contexts(model, head, rollout, sampling)
        seconds_contexts = time.perf_counter() - started
        places = policy.places(rollout.mask_N_K)
        gradient = LabelGradient.like(labels, places)
        advantage = torch.randn(rollout.ids_N_K.shape, generator=torch.Generator().manual_seed(1))
        add_advantages(gradient, labels, rollout, Credit(advantage))
        numbers = policy.step(labels, places, gradient.total, 0.0)
    seconds = time.perf_counter() - started
    found = {
        "machine": processor(),
        "layers": options.layers,
        "tokens": len(places),
        "seconds_rollout": seconds_rollout,
        "seconds_contexts": seconds_contexts,
        "seconds_step": seconds,
        "step_over_rollout": seconds / seconds_rollout,
        "peak_mb_above": peak.most - base,
        "figures": numbers,
    }
    print(json.dumps(found))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
