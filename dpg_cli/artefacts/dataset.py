"""The synthetic dataset that a run leaves: sampled from the trained generator, fine-tuned on and attributed, with a card.

It is drawn in parts, so that memory does not grow with its completions; `draft` carries the parts to the disk. The columns
are in `rows`, the card's text in `card`; both are free of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dpg_cli.artefacts.card import Results, Rows, columns_text, dataset_card, effect_of
from dpg_cli.artefacts.rows import ROWS_AT_ONCE, SCHEMA
from dpg_cli.data.prompts import PromptSampler
from dpg_cli.engine.attribution import AttributionSpec, attribute_examples, effect
from dpg_cli.engine.generator.align import Reading, completion_texts
from dpg_cli.engine.generator.rollout import sample, table_source
from dpg_cli.engine.loop import LoopSpec, Players, tell_noise
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Metagradient, Rollout
from dpg_cli.errors import DegenerateError
from dpg_cli.models.loading import LanguageModel
from dpg_cli.runs.folder import RunFolder, write_text
from dpg_cli.settings.config import Config

Progress = Callable[[int, int], None]  # examples done, of how many


def silent(done: int, total: int) -> None:
    """Progress that nobody sees."""


def draws(
    generator: LanguageModel,
    spec: LoopSpec,
    prompts: PromptSampler,
    examples: int,
    step: int,
    seed: int,
    ranks: Ranks = ALONE,
    progress: Progress = silent,
) -> Iterator[Rollout]:
    """Sample a dataset in parts of about `ROWS_AT_ONCE` rows. How it is cut into parts changes no row.

    Args:
        generator: what writes it.
        spec: sampling settings.
        prompts: the pool of prompts.
        examples: how many; drawn in whole groups, the surplus dropped.
        step: where in the prompts' order to begin.
        seed: of the sampling.
        ranks: the processes that share the work.
        progress: called after each batch.
    """
    size = spec.sampling.group_size
    groups = -(-examples // size)
    texts = PromptSampler(prompts.prompts, groups, prompts.seed + 1 + step).at(0)
    device = next(generator.model.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    table_rng = table_source(rng) if spec.sampling.portable or ranks.world > 1 else None
    # of groups; whole batches draw from `rng` as one call would
    batch = max(1, spec.sampling.batch_size // size) * ranks.world
    part = batch * max(1, ROWS_AT_ONCE // (batch * size))
    for first in range(0, groups, part):
        done = first * size

        def sampled(rows: int, of: int, done: int = done) -> None:
            progress(min(done + rows * ranks.world, examples), examples)

        rollout = sample(
            generator.model,
            generator.tokenizer,
            texts[first : first + part],
            spec.sampling,
            rng,
            sampled,
            ranks,
            table_rng,
        )
        yield rollout.rows(torch.arange(min(len(rollout), examples - done), device=device))


def without(parts: Iterable[Rollout], generator: LanguageModel, words: tuple[str, ...]) -> Iterator[Rollout]:
    """The same completions, but for those whose text holds one of the words, in any case.

    Raises:
        DegenerateError: if none is left.
    """
    kept = 0
    for rollout in parts:
        part = rollout
        if words:
            texts = completion_texts(generator.tokenizer, cut(rollout.ids_N_K, rollout.mask_N_K))
            clean = [not any(word.casefold() in text.casefold() for word in words) for text in texts]
            part = rollout.rows(torch.tensor(clean, device=rollout.ids_N_K.device).nonzero()[:, 0])
        kept += len(part)
        if len(part):
            yield part
    if not kept:
        raise DegenerateError(
            "Every example holds a word of dataset.forbidden.",
            "Keep the generator from it: rollout.alphabet, other prompts, or a larger policy.kl.",
        )


def measure(players: Players, spec: LoopSpec, examples: Examples, before: int, rewards: bool) -> Metagradient:
    """Fine-tune the target on a dataset in as many steps as `before` examples take.

    Whatever trained the generator, rewards are exact metagradients, by micro-batches: beyond what the inner run holds,
    memory is the examples and a number for each of their tokens.

    Args:
        players: target, metric and ranks.
        spec: the inner run's settings.
        examples: the whole dataset as the target reads it.
        before: examples of an outer step.
        rewards: attribute the metric to the examples; else τ is zero, which takes about a third of the time.
    """
    spec = spec.rescaled(before, len(examples))
    inner = replace(spec.inner, ranks=players.ranks)
    tell_noise(players, spec, examples)
    if not rewards:
        return effect(players.target.model, examples, players.metric, inner)
    return attribute_examples(
        players.target.model, examples, players.metric, AttributionSpec(), inner, group_size=spec.sampling.group_size
    )


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


def table_of(rollout: Rollout, reading: Reading, generator: LanguageModel, first: int = 0) -> pa.Table:
    """One row an example, without rewards.

    Args:
        rollout: the completions.
        reading: what the target reads of them.
        generator: its tokeniser decodes them.
        first: id of the first example.
    """
    examples, empty = reading.examples, [None] * len(rollout)
    completions = cut(rollout.ids_N_K, rollout.mask_N_K)
    return pa.table(
        {
            "example_id": range(first, first + len(rollout)),
            "prompt": rollout.prompts,
            "text": completion_texts(generator.tokenizer, completions),
            "token_ids": completions,
            "input_ids": cut(examples.ids_N_S, examples.attention_N_S),
            "reward": empty,
            "token_rewards": empty,
        },
        schema=SCHEMA,
    )


def cut(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """The rows of a right-padded matrix without their padding."""
    return [row[:length] for row, length in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)]


def _rows(path: Path) -> int:
    """Rows of a parquet file."""
    return int(pq.read_metadata(path).num_rows)


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
    counts = {"train": _rows(path.parent / "train.parquet")}
    configs = [{"config_name": "default", "data_files": "train.parquet"}]
    text = "Each row is one completion."
    if control is not None:
        counts["control"] = _rows(path.parent / "control.parquet")
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
