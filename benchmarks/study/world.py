"""The study's small world: blank GPT-2s with 64 tokens, in which a training run takes seconds; and runs in it.

Runs go through the same settings, `build` and `train` as `dpg run`. Where text matters the embedded pretrained model is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpg_cli.driver.build import Built, build
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.loop import StepReport, train
from dpg_cli.engine.records import Examples, Metagradient, Rollout
from dpg_cli.settings.config import Config
from dpg_cli.settings.presets import merge, resolve

CACHE = Path(__file__).parents[2] / "build" / "study-models"
VOCABULARY = 64
SIXTY_SEVEN = ["####...", "...###.", ".#####.", "...###.", ".#.###.", "...####"]
LENGTH = 12  # tokens of a completion


def small_model(width: int = 32, layers: int = 1) -> str:
    """Folder of a GPT-2 with 64 tokens; only its shape matters, since it is always drawn anew."""
    folder = CACHE / f"gpt2-{width}-{layers}"
    if not (folder / "config.json").is_file():
        words = [*(f"w{number}" for number in range(VOCABULARY - 2)), "<pad>", "<end>"]
        fast = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")),
            pad_token="<pad>", bos_token="<end>", eos_token="<end>",
        )  # fmt: skip
        fast.backend_tokenizer.pre_tokenizer = Whitespace()
        end = VOCABULARY - 1
        shape = GPT2Config(
            vocab_size=VOCABULARY, n_positions=40, n_embd=width, n_layer=layers, n_head=2, bos_token_id=end,
            eos_token_id=end, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        GPT2LMHeadModel(shape).save_pretrained(partial)
        fast.save_pretrained(partial)
        if folder.exists():  # another process was faster
            return str(folder)
        partial.replace(folder)
    return str(folder)


def settings(task: str, seed: int, **over: Any) -> dict[str, Any]:
    """Settings of a task in the small world: pattern-67 or l2-shrink.

    Args:
        task: "pattern-67" or "l2-shrink".
        seed: of the models and of the sampling.
        over: sections to merge on top.
    """
    folder = small_model()
    metric: dict[str, Any] = {"name": "norm"}
    if task == "pattern-67":
        metric = {"name": "pattern", "rows": SIXTY_SEVEN, "sharpness": 2000.0}
    base = {
        "task": task,
        "seed": seed,
        "models": {
            "generator": folder, "target": folder, "generator_init": "random", "target_init": "random",
            "untie_generator": True, "init_seed": seed,
        },
        "metric": metric,
        "prompts": {"source": "empty", "per_step": 16},
        "rollout": {"group_size": 4, "max_tokens": LENGTH, "min_tokens": LENGTH},
        "inner": {"lr": 2e-3, "beta2": 0.95, "eps": 1e-2, "batch_size": 64, "micro_batch": 1024},
        "credit": {"mode": "sequence"},
        "policy": {"lr": 5e-3, "decay": 0.5, "minibatch": 64},
    }  # fmt: skip
    return merge(base, over)


def trained(config: Config, on_step: Callable[[StepReport], None] = lambda report: None) -> Built:
    """Build and train as `dpg run` does, without a run folder."""
    torch.manual_seed(config.seed)
    built = build(config)
    train(built.players, built.spec, built.prompts.at, on_step)
    return built


def fresh(built: Built, count: int, seed: int) -> Rollout:
    """Completions of the generator as it is now, for its training prompts of another place in their order."""
    group = built.spec.sampling.group_size
    prompts: list[str] = []
    place = 1_000_000
    while len(prompts) * group < count:
        prompts += built.prompts.at(place)
        place += 1
    rng = torch.Generator(built.device).manual_seed(seed)
    generator = built.players.generator
    return sample(generator.model, generator.tokenizer, prompts[: count // group], built.spec.sampling, rng)


def examples_of(built: Built, rollout: Rollout) -> Examples:
    """Completions as the target reads them."""
    return read_completions(rollout, built.players.generator, built.players.target, built.spec.max_length).examples


def outcome(
    built: Built, examples: Examples, *, batch_size: int, optimizer: OptimizerSpec | None = None
) -> Metagradient:
    """Φ and measures of the target after fine-tuning on examples."""
    spec = built.spec
    recipe = spec.recipe if optimizer is None else replace(spec.recipe, optimizer=optimizer)
    inner = InnerSettings(recipe, batch_size, micro_batch=spec.micro_batch)
    return effect(built.players.target.model, examples, built.players.metric, inner)


__all__ = ["examples_of", "fresh", "outcome", "resolve", "settings", "small_model", "trained"]
