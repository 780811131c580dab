"""The synthetic dataset that a run leaves: sampled from the trained generator, attributed, written as parquet with a card.

The columns are in `rows`, the card's text in `card`; both are free of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dpg_cli.artefacts.card import Results, Rows, columns_text, dataset_card, effect_of
from dpg_cli.artefacts.rows import ROWS_AT_ONCE, SCHEMA
from dpg_cli.data.prompts import PromptSampler
from dpg_cli.engine.attribution import AttributionSpec
from dpg_cli.engine.generator.align import completion_texts, read_completions
from dpg_cli.engine.generator.rollout import sample
from dpg_cli.engine.loop import LoopSpec, Players, attribute
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Metagradient, Rollout
from dpg_cli.models.loading import LanguageModel
from dpg_cli.runs.folder import RunFolder, replacing, write_text
from dpg_cli.settings.config import Config


@dataclass(frozen=True)
class Synthetic:
    """A sampled dataset, what one fine-tuning run on all of it does, and τ of each completion token, (N, K)."""

    rollout: Rollout
    result: Metagradient
    token_N_K: Tensor


def draw(
    generator: LanguageModel,
    spec: LoopSpec,
    prompts: PromptSampler,
    examples: int,
    step: int,
    seed: int,
    ranks: Ranks = ALONE,
) -> Rollout:
    """Sample a dataset.

    Args:
        generator: what writes it.
        spec: sampling settings.
        prompts: the pool of prompts.
        examples: how many; drawn in whole groups, the surplus dropped.
        step: where in the prompts' order to begin.
        seed: of the sampling.
        ranks: the processes that share the work.
    """
    groups = -(-examples // spec.sampling.group_size)
    texts = PromptSampler(prompts.prompts, groups, prompts.seed + 1 + step).at(0)
    device = next(generator.model.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    rollout = sample(generator.model, generator.tokenizer, texts, spec.sampling, rng, ranks=ranks)
    return rollout.rows(torch.arange(examples, device=device))


def measure(players: Players, spec: LoopSpec, rollout: Rollout, before: int) -> Synthetic:
    """Fine-tune the target on a dataset in as many steps as `before` examples take, and attribute the metric to its rows."""
    shared = replace(
        spec.rescaled(before, len(rollout)), credit="sequence", attribution=AttributionSpec(), labels="drawn"
    )
    result, token_N_K, _ = attribute(
        players, shared, rollout
    )  # whatever trained the generator, its data has metagradients
    return Synthetic(rollout, result, token_N_K)


def new_rollouts(
    generator: LanguageModel, spec: LoopSpec, prompts: PromptSampler, examples: int, seed: int
) -> Iterator[Rollout]:
    """Sample new examples, a batch at a time, so that memory does not grow with their number.

    The draws are of another stream than those of the run itself, whatever the seeds.

    Args:
        generator: what writes them.
        spec: sampling settings.
        prompts: the pool of prompts; each comes once before any comes again.
        examples: how many; whole groups are drawn, the surplus dropped.
        seed: of sampling and prompt order.
    """
    device = next(generator.model.parameters()).device
    stream = int.from_bytes(hashlib.sha256(f"new examples {prompts.seed} {seed}".encode()).digest()[:7])
    rng = torch.Generator(device).manual_seed(stream)
    size = spec.sampling.group_size
    order = PromptSampler(prompts.prompts, max(1, spec.sampling.batch_size // size), stream)
    done = batch = 0
    while done < examples:
        left = examples - done
        texts = order.at(batch)[: -(-left // size)]
        rollout = sample(generator.model, generator.tokenizer, texts, spec.sampling, rng)
        yield rollout.rows(torch.arange(min(left, len(rollout)), device=device))
        done, batch = done + len(rollout), batch + 1


def table_of(
    rollout: Rollout,
    generator: LanguageModel,
    target: LanguageModel,
    synthetic: Synthetic | None,
    max_length: int = 0,
    first: int = 0,
) -> pa.Table:
    """One row an example.

    Args:
        rollout: the completions.
        generator: its tokeniser decodes them.
        target: its tokeniser gives `input_ids`.
        synthetic: the rollout with its metagradients, or None for data that none were taken of.
        max_length: longest sequence of the target, 0 for none.
        first: id of the first example.
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
    return pa.table(
        {
            "example_id": range(first, first + len(rollout)),
            "prompt": rollout.prompts,
            "text": completion_texts(generator.tokenizer, completions),
            "token_ids": completions,
            "input_ids": inputs,
            "reward": rewards,
            "token_rewards": token_rewards,
        },
        schema=SCHEMA,
    )


def write_parquet(
    path: Path,
    rollout: Rollout,
    generator: LanguageModel,
    target: LanguageModel,
    synthetic: Synthetic | None,
    max_length: int = 0,
) -> None:
    """Write a dataset; the arguments are those of `table_of`.

    Args:
        path: the file.
        rollout: the completions.
        generator: its tokeniser decodes them.
        target: its tokeniser gives `input_ids`.
        synthetic: the rollout with its metagradients, or None for data that none were taken of.
        max_length: longest sequence of the target, 0 for none.
    """
    table = table_of(rollout, generator, target, synthetic, max_length)
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS_AT_ONCE)


def write_card(
    path: Path, config: Config, effect: str, measures: dict[str, float], control: dict[str, float] | None
) -> None:
    """The data card of a run's own dataset folder.

    Args:
        path: `dataset/README.md` in the run folder.
        config: the run's settings.
        effect: what the metric says it is for, in words.
        measures: of a target trained on the data.
        control: the same of a target trained on the untrained generator's data.
    """
    counts = {"train": config.dataset.examples}
    configs = [{"config_name": "default", "data_files": "train.parquet"}]
    text = "Each row is one completion."
    if control is not None:
        counts["control"] = config.dataset.examples
        configs.append({"config_name": "control", "data_files": "control.parquet"})
        text += " `control.parquet` holds as many of the generator before its training, without rewards."
    folder = RunFolder(path.parent.parent)
    rows = Rows(
        counts,
        configs,
        "train",
        columns_text(config),
        text,
        "the parquet files say so in their schema's metadata (key `dpg`)",
    )
    write_text(path, dataset_card(config, effect_of(config, folder.pattern, effect), Results(measures, control), rows))
