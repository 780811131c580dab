"""Elements of a recipe beside bergson's: clipping (a recipe of its own test suite), a schedule, Muon. Scores, not speed.

    python benchmarks/bergson_recipes.py --bergson PYTHON [--out FILE]

PYTHON is one of an environment with bergson 0.26.1. Both get the same weights (of pythia-14m's shape, random) and rows, and
give ∂(query loss)/∂w in float64. Central differences of our inner run, which tests hold to stock PyTorch, are the judge.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

CONFIG = {
    "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 50304,
    "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
ROWS = [[5 * row + place + 1 for place in range(5)] for row in range(4)]
STEP = 1e-2  # of the five-point differences: large, since the model takes its softmax in float32
SPEC = {"lr": 1e-3, "betas": (0.95, 0.975), "eps": 1e-8, "eps_root": 1e-8, "weight_decay": 0.01}
RECIPES: dict[str, dict[str, Any]] = {
    "SGD 0.05, clipped at 2 (bergson's test_grad_clipping)": {"optimizer": "sgd", "lr": 0.05, "clip": 2.0, "passes": 1},
    "AdamW, clipped at 1": {"optimizer": "adamw", **SPEC, "clip": 1.0, "passes": 2},
    "AdamW, cosine after a warm-up step": {"optimizer": "adamw", **SPEC, "schedule": "cosine", "passes": 3},
    "Muon, matrices of the blocks alone": {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.0, "passes": 2},
    "Muon with weight decay 0.1": {"optimizer": "muon", "lr": 1e-2, "weight_decay": 0.1, "passes": 2},
}


def rate(recipe: dict[str, Any], step: int) -> float:
    """Learning rate of a step."""
    if "schedule" not in recipe:
        return recipe["lr"]
    steps, warm = 2 * recipe["passes"], 1
    if step < warm:
        return recipe["lr"] * step / warm
    return recipe["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def built(weights: str) -> GPTNeoXForCausalLM:
    """The model in float64, from a file of weights where there is one."""
    torch.manual_seed(42)
    model = GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**CONFIG), attn_implementation="eager").double().eval()
    if weights:
        load_model(model, weights)
    return model


def freeze(model: GPTNeoXForCausalLM, recipe: dict[str, Any]) -> None:
    """Muon of bergson takes every matrix, torch's those within the model: both are given only the latter to train."""
    if recipe["optimizer"] == "muon":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.ndim == 2 and "layers." in name)


def theirs(spec: dict[str, Any]) -> None:
    """The scores by bergson, in its own environment; nothing of ours is imported."""
    from functools import partial

    import torchopt
    from bergson.distributed import grad_tree
    from bergson.magic import BackwardState, DataStream, Trainer, muon
    from bergson.utils.math import weighted_causal_lm_ce
    from datasets import Dataset
    from torchopt.pytree import tree_iter

    torch.set_default_dtype(torch.float64)
    recipe = spec["recipe"]
    model: Any = built(spec["weights"])
    freeze(model, recipe)
    model.loss_function = partial(weighted_causal_lm_ce, reduction="mean")
    steps = 2 * recipe["passes"]
    rates = torch.tensor([rate(recipe, step) for step in range(steps + 1)])
    lr = (lambda step: rates[int(step)]) if "schedule" in recipe else recipe["lr"]
    if recipe["optimizer"] == "sgd":
        optimizer = torchopt.sgd(lr)
    elif recipe["optimizer"] == "muon":
        optimizer = muon(lr, momentum=0.95, weight_decay=recipe["weight_decay"])
    else:
        keys = {key: recipe[key] for key in ("betas", "eps", "eps_root", "weight_decay")}
        optimizer = torchopt.adamw(lr, **keys)
    rows = ROWS * recipe["passes"]
    data = Dataset.from_dict({"input_ids": rows, "labels": rows, "attention_mask": [[1] * 5] * len(rows)})
    query = {"input_ids": torch.tensor(ROWS), "labels": torch.tensor(ROWS)}
    trainer, state = Trainer.initialize(model, optimizer)
    stream = DataStream(data, 2, device="cpu")
    options = {"max_grad_norm": recipe["clip"]} if "clip" in recipe else {}
    with tempfile.TemporaryDirectory() as folder:
        state = trainer.train(state, stream, inplace=True, save_dir=folder, save_mode="all", **options)
        with state.activate(model) as params:
            loss = model(**query).loss
            grads = {key: grad.detach().clone() for key, grad in grad_tree(loss, params).items()}
        zeros = [
            torch.zeros_like(part)
            for part in tree_iter(state.opt_state)
            if torch.is_tensor(part) and part.is_floating_point()
        ]
        begun = BackwardState(grads, zeros, torch.zeros_like(stream.weights))
        stream.requires_grad = True
        found = trainer.backward(folder, stream, begun, state, inplace=True, save_mode="all", **options)
    per_visit = found.weight_grads.detach().double().reshape(recipe["passes"], len(ROWS))
    Path(spec["scores"]).write_text(json.dumps(per_visit.sum(0).tolist()))


def ours(recipe: dict[str, Any], weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Our scores, and those of central differences."""
    from dpg_cli.engine import Examples, OptimizerSpec, Recipe, metagradient
    from dpg_cli.engine.inner.recipe import Batches, Schedule

    model: Any = built(weights)
    freeze(model, recipe)
    name = recipe["optimizer"]
    if name == "adamw":
        keys = {key: recipe[key] for key in ("eps", "eps_root", "weight_decay")}
        spec = OptimizerSpec(name, lr=recipe["lr"], beta1=recipe["betas"][0], beta2=recipe["betas"][1], **keys)
    elif name == "muon":
        decay = recipe["weight_decay"]
        keys = {"momentum": 0.95, "nesterov": True, "weight_decay": decay, "adjust_lr": "match_rms_adamw"}
        spec = OptimizerSpec(name, lr=recipe["lr"], **keys)
    else:
        spec = OptimizerSpec(name, lr=recipe["lr"])
    schedule = Schedule("cosine", warmup=1) if "schedule" in recipe else Schedule()
    whole = Recipe(
        spec, schedule=schedule, max_grad_norm=recipe.get("clip", 0.0), batches=Batches(size=2, epochs=recipe["passes"])
    )
    examples = Examples.from_sequences(ROWS)
    query = torch.tensor(ROWS)

    def metric(target: Any) -> torch.Tensor:
        logits = target(input_ids=query).logits[:, :-1]  # not its own loss, which is computed in float32
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), query[:, 1:].flatten())

    found = metagradient(model, examples, whole, metric).example_N
    differences = []
    for row in range(len(ROWS)):
        values = {}
        for step in (-2, -1, 1, 2):
            weights_N = torch.ones(len(ROWS), dtype=torch.float64)
            weights_N[row] += step * STEP
            values[step] = metagradient(model, examples, whole, metric, weights_N=weights_N).value
        differences.append((values[-2] - 8 * values[-1] + 8 * values[1] - values[2]) / (12 * STEP))
    return found, torch.tensor(differences, dtype=torch.float64)


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bergson", help="python of an environment with bergson 0.26.1")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        theirs(json.loads(options.child.read_text()))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/weights.safetensors"
        save_model(built(""), weights)
        for name, recipe in RECIPES.items():
            own, judge = ours(recipe, weights)
            spec = {"recipe": recipe, "weights": weights, "scores": f"{folder}/scores.json"}
            Path(f"{folder}/spec.json").write_text(json.dumps(spec))
            done = subprocess.run(
                [options.bergson, __file__, "--child", f"{folder}/spec.json"], capture_output=True, text=True
            )
            row: dict[str, Any] = {"recipe": name, "ours": own.tolist(), "differences": judge.tolist()}
            row["ours_off"] = float((own - judge).norm() / judge.norm())
            if done.returncode:
                row["failed"] = done.stderr.strip().splitlines()[-1][:300]
            else:
                other = torch.tensor(json.loads(Path(spec["scores"]).read_text()), dtype=torch.float64)
                row |= {"bergson": other.tolist(), "bergson_off": float((other - judge).norm() / judge.norm())}
            found.append(row)
            print(json.dumps(row), flush=True)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
