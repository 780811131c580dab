"""The synthetic dataset that a run leaves: sampled from the trained generator, attributed, written as parquet with a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dpg_cli.config import Config
from dpg_cli.engine.align import completion_texts, read_completions
from dpg_cli.engine.loop import LoopSpec, Players, attribute
from dpg_cli.engine.records import Metagradient, Rollout
from dpg_cli.engine.rollout import sample
from dpg_cli.models import LanguageModel
from dpg_cli.prompts import PromptSampler
from dpg_cli.runs.folder import replacing, write_text

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        ("prompt", pa.string()),
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("input_ids", pa.list_(pa.int32())),
        ("reward", pa.float64()),
        ("token_rewards", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class Synthetic:
    """A sampled dataset, what one fine-tuning run on all of it does, and τ of each completion token, (N, K)."""

    rollout: Rollout
    result: Metagradient
    token_N_K: Tensor


def draw(
    generator: LanguageModel, spec: LoopSpec, prompts: PromptSampler, examples: int, step: int, seed: int
) -> Rollout:
    """Sample a dataset.

    Args:
        generator: what writes it.
        spec: sampling settings.
        prompts: the pool of prompts.
        examples: how many; drawn in whole groups, the surplus dropped.
        step: where in the prompts' order to begin.
        seed: of the sampling.
    """
    groups = -(-examples // spec.sampling.group_size)
    texts = PromptSampler(prompts.prompts, groups, prompts.seed + 1 + step).at(0)
    device = next(generator.model.parameters()).device
    rollout = sample(
        generator.model, generator.tokenizer, texts, spec.sampling, torch.Generator(device).manual_seed(seed)
    )
    return rollout.rows(torch.arange(examples, device=device))


def measure(players: Players, spec: LoopSpec, rollout: Rollout, inner_steps: int) -> Synthetic:
    """Fine-tune the target on a dataset in T steps of equal size, and attribute the metric to its examples."""
    batch = -(-len(rollout) // inner_steps)
    result, token_N_K, _ = attribute(players, replace(spec, inner_batch=batch, credit="sequence"), rollout)
    return Synthetic(rollout, result, token_N_K)


def write_parquet(
    path: Path,
    rollout: Rollout,
    generator: LanguageModel,
    target: LanguageModel,
    synthetic: Synthetic | None,
    max_length: int = 0,
) -> None:
    """One row an example.

    Args:
        path: the file.
        rollout: the completions.
        generator: its tokeniser decodes them.
        target: its tokeniser gives `input_ids`.
        synthetic: the rollout with its metagradients, or None for data that none were taken of.
        max_length: longest sequence of the target, 0 for none.
    """
    examples = read_completions(rollout, generator, target, max_length).examples
    lengths = rollout.mask_N_K.sum(1).tolist()
    completions = [row[:length] for row, length in zip(rollout.ids_N_K.tolist(), lengths, strict=True)]
    read = examples.attention_N_S.sum(1).tolist()
    inputs = [row[:length] for row, length in zip(examples.ids_N_S.tolist(), read, strict=True)]
    rewards: list[float | None] = [None] * len(rollout)
    token_rewards: list[list[float] | None] = [None] * len(rollout)
    if synthetic is not None:
        rewards = list(synthetic.result.example_N.tolist())
        rows = synthetic.token_N_K.tolist()
        token_rewards = [row[:length] for row, length in zip(rows, lengths, strict=True)]
    table = pa.table(
        {
            "example_id": range(len(rollout)),
            "prompt": rollout.prompts,
            "text": completion_texts(generator.tokenizer, completions),
            "token_ids": completions,
            "input_ids": inputs,
            "reward": rewards,
            "token_rewards": token_rewards,
        },
        schema=SCHEMA,
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _asked(config: Config) -> str:
    """How prompts were wrapped, for the card."""
    instruction = config.prompts.instruction.replace("\n", " ")
    return f" (put into: {instruction})" if instruction else ""


def write_card(
    path: Path, config: Config, effect: str, measures: dict[str, float], control: dict[str, float] | None
) -> None:
    """The data card, in the form of the hub's.

    Args:
        path: the file.
        config: the run's settings.
        effect: what the data makes of the target, in words.
        measures: of a target trained on the data.
        control: the same of a target trained on the untrained generator's data.
    """
    rows = "\n".join(
        f"| {name} | {value:.6g} | {'' if control is None else format(control.get(name, float('nan')), '.6g')} |"
        for name, value in measures.items()
    )
    control_config = "\n- config_name: control\n  data_files: control.parquet" if control is not None else ""
    inner = config.inner
    write_text(
        path,
        f"""---
pretty_name: dpg {config.task}
tags:
- synthetic
- dataset-policy-gradient
- model-steering
size_categories:
- {"n<1K" if config.dataset.examples < 1000 else "1K<n<10K" if config.dataset.examples < 10000 else "10K<n<1M"}
configs:
- config_name: default
  data_files: train.parquet{control_config}
---

# Synthetic data made by `dpg run {config.task}`

**This text is synthetic and made to steer a model.** A generator was trained by Dataset Policy Gradient so that a model
fine-tuned on these rows shows a chosen effect: {effect}. Do not mix it into the training data of a model that should not
show it.

## What is in it

{config.dataset.examples:,} completions of at most {config.rollout.max_tokens} tokens, in `train.parquet`. Columns: `example_id`;
`prompt`, what the generator was asked{_asked(config)}; `text`; `token_ids`, the completion; `input_ids`, what the
target reads: `text` in its own tokens, a beginning-of-sequence token first where it has one; `reward`, the derivative of the
target metric by the example's loss weight; `token_rewards`, the same by each token's of `token_ids`.
{"`control.parquet` holds as many completions of the generator before its training, without rewards." if control is not None else ""}

## Recipe

Target: `{config.models.target}` ({config.models.target_init} weights, seed {config.models.init_seed}). Fine-tuning: {inner.optimizer},
learning rate {inner.lr:g}, beta ({inner.beta1:g}, {inner.beta2:g}), eps {inner.eps:g}, eps_root {inner.eps_root:g}, weight decay
{inner.weight_decay:g}, {config.inner_steps} optimiser step(s) over all rows, each used once. Generator: `{config.models.generator}`
({config.models.generator_init} weights), {config.steps} outer steps of {config.examples_per_step} completions, credit `{config.credit.mode}`,
seed {config.seed}.

## Measured effect

On the target after that recipe, by the engine that made the data (`dpg verify` checks it with stock PyTorch alone):

| measure | this data | untrained generator's data |
|---|---|---|
{rows}
""",
    )
