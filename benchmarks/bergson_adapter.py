"""Runs bergson's metagradient (MAGIC) on a workload of `metagradient.py`, in bergson's own environment.

    PYTHON benchmarks/bergson_adapter.py SPEC.json

The parent writes SPEC.json and the model and tokens it names, then sends one line on stdin for each run; each run answers
with one line of JSON on stdout: seconds, those of the training alone, peak resident memory; the scores lie in a file. A line that is a
number asks for as many runs, one for each of the questions in `queries`: it has no pass for several. Checkpoints are saved at every
step, so that bergson computes nothing twice. Needs no package of ours.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
import torchopt
from bergson.magic.cli import compute_query_gradients
from bergson.magic.data_stream import DataStream
from bergson.magic.trainer import BackwardState, Trainer
from bergson.utils import weighted_causal_lm_ce
from datasets import Dataset
from safetensors.torch import load_file
from torchopt.pytree import tree_iter
from transformers import GPT2Config, GPT2LMHeadModel


def metagradient(model: GPT2LMHeadModel, train: Dataset, query: Dataset, spec: dict) -> tuple[torch.Tensor, float]:
    """∂(mean query loss)/∂w for every example: train, query gradients, backward through training; seconds of the training."""
    started = time.perf_counter()
    optimizer = torchopt.adamw(
        spec["lr"], betas=tuple(spec["betas"]), eps=spec["eps"], eps_root=spec["eps_root"],
        weight_decay=spec["weight_decay"],
    )  # fmt: skip
    folder = tempfile.mkdtemp(dir=spec["folder"])
    try:
        trainer, state = Trainer.initialize(model, optimizer)
        stream = DataStream(train, spec["batch"], device="cpu")
        state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode="all")
        trained = time.perf_counter() - started
        gradients, _ = compute_query_gradients(state, model, DataStream(query, len(query), device="cpu"))
        stream.requires_grad = True
        zeros = [
            torch.zeros_like(t) for t in tree_iter(state.opt_state) if torch.is_tensor(t) and t.is_floating_point()
        ]
        start = BackwardState(gradients, zeros, torch.zeros_like(stream.weights))
        found = trainer.backward(folder, stream, start, state, inplace=True, save_mode="all")
        return found.weight_grads.detach(), trained
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Serve runs until stdin closes."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever bergson prints goes to stderr
    torch.set_default_dtype(getattr(torch, spec["dtype"]))
    torch.set_num_threads(spec["threads"])
    model = GPT2LMHeadModel(GPT2Config(**spec["config"], attn_implementation="eager")).eval()
    model.load_state_dict(load_file(spec["weights"]), strict=False)
    model.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
    train, query = (Dataset.from_dict({"input_ids": np.load(spec[key]).tolist()}) for key in ("train", "query"))
    for line in sys.stdin:
        asked = [query]
        if line.strip().isdigit():
            asked = [Dataset.from_dict({"input_ids": ids}) for ids in np.load(spec["queries"])[: int(line)].tolist()]
        scores, seconds, training = [], 0.0, 0.0
        for one in asked:
            fresh = copy.deepcopy(model)
            started = time.perf_counter()
            found, trained = metagradient(fresh, train, one, spec)
            seconds += time.perf_counter() - started
            training += trained
            scores.append(found.double().numpy())
        np.save(spec["scores"], scores[0] if asked[0] is query else np.stack(scores))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answers.write(json.dumps({"seconds": seconds, "training": training, "peak_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
