"""How a run's data reads beside its control, and how any two datasets read beside each other: models loaded, rows judged."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from dpg_cli.data.chat import PromptFormat, prompt_format
from dpg_cli.engine.generator.alphabet import restricted
from dpg_cli.errors import UsageError
from dpg_cli.evidence.fluency.judge import (
    FEWEST,
    Fluency,
    at_random,
    by_counts,
    by_ratio,
    finite,
    paired,
    shown,
)
from dpg_cli.evidence.fluency.nats import Cost, Sampled, compare, cost
from dpg_cli.evidence.fluency.rows import Side, read_pair
from dpg_cli.evidence.stock import UNWATCHED, Watcher
from dpg_cli.models.fingerprint import require_same
from dpg_cli.models.loading import LanguageModel, load, load_generator, quiet_transformers, same_tokenizer
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import read_info
from dpg_cli.settings.config import Config

READERS = {"prose": "prose-reader", "prose-reader": "prose"}  # generator -> a model of its world that is another
START = "starting generator"


@dataclass(frozen=True)
class Read:
    """What a reader makes of rows: contexts and completions in its own tokens."""

    contexts: list[list[int]]
    completions: list[np.ndarray]


def reader_for(config: Config, asked: str) -> str:
    """The name of the independent reader of a run; empty for none.

    Args:
        config: of the run.
        asked: a model's name, "none", or "auto" for that of the generator's world, if it has one.
    """
    if asked == "none":
        return ""
    return READERS.get(config.models.generator, "") if asked == "auto" else asked


def judge_run(
    folder: RunFolder, config: Config, device: torch.device, reader: LanguageModel | None, watch: Watcher = UNWATCHED
) -> Fluency:
    """Judge a run's data against its control.

    Args:
        folder: the run; its dataset and control are there.
        config: its settings.
        device: where models read.
        reader: an independent one, or None.
        watch: told of stages and progress.

    Raises:
        UsageError: if the dataset is damaged.
    """
    watch.stage("reading the dataset and the control")
    sides = read_pair(str(folder.dataset / "train.parquet"), str(folder.dataset / "control.parquet"))
    judged = judge_files(*sides, None, watch)
    notes = list(judged.notes)
    try:
        start = restricted(load_generator(config.models, device), config.rollout.alphabet)
        if recorded := read_info(folder)[0].fingerprints.get("generator"):
            require_same("generator", start, recorded, str(folder.path))
    except UsageError as error:
        notes.append(f"nats not measured: {error.cause}")
        return replace(judged, notes=tuple(notes))
    asked = config.prompts
    form = prompt_format(start.tokenizer, start.name, asked.chat, asked.instruction, asked.max_tokens)
    sampled = Sampled(config.rollout.temperature, config.rollout.min_tokens, start.end_ids, start.silent_ids)

    def read(model: LanguageModel, name: str, parts: list[Read], drawn: Sampled | None = None) -> tuple[Cost, Cost]:
        watch.stage(f"nats a token under {name}")
        one, other = (cost(model, part.contexts, part.completions, drawn, watch.progress) for part in parts)
        return one, other

    own = [Read(encoded(form, side.prompts or [""] * len(side.tokens)), side.tokens) for side in sides]
    costs = {START: read(start, f"the {START}", own, sampled)}
    if reader is not None:
        parts = own if same_tokenizer(start, reader) else [in_its_tokens(reader, side, config) for side in sides]
        costs[reader.name] = read(reader, reader.name, parts)
    telling, kl = judged.telling, None
    try:
        generator = load(str(folder.generator), device=device, dtype=config.models.dtype)
        trained = read(generator, "the trained generator", own, sampled)
        if not all(map(finite, (*costs[START], *trained))):
            raise UsageError("A generator gives one of the rows no probability.")
        ratio, kl = by_ratio((costs[START][0], trained[0]), (costs[START][1], trained[1]))
        telling = (*telling, ratio)
    except UsageError as error:
        notes.append(f"likelihood ratio not measured: {error.cause}")
    return with_nats(replace(judged, telling=telling, kl=kl, notes=tuple(notes)), *sides, costs)


def judge_files(data: Side, control: Side, reader: LanguageModel | None, watch: Watcher = UNWATCHED) -> Fluency:
    """Judge any two datasets.

    Args:
        data, control: their rows.
        reader: whose nats are taken, or None; its tokens are those of the rows' texts.
        watch: told of stages and progress.
    """
    watch.stage("telling the two apart by token and bigram counts")
    counts = by_counts(data, control, watch.progress)
    found = Fluency(
        (len(data.tokens), len(control.tokens)),
        telling=() if counts is None else (counts,),
        notes=() if counts else (f"not told apart by counts: that takes {FEWEST} examples of each at least",),
    )
    costs: dict[str, tuple[Cost, Cost]] = {}
    if reader is not None:
        watch.stage(f"nats a token under {reader.name}")
        form = PromptFormat(reader.tokenizer)
        one, other = (
            cost(
                reader,
                encoded(form, side.prompts or [""] * len(side.texts)),
                tokenized(reader, side.texts),
                progress=watch.progress,
            )
            for side in (data, control)
        )
        costs[reader.name] = one, other
    return with_nats(found, data, control, costs)


def with_nats(found: Fluency, data: Side, control: Side, costs: dict[str, tuple[Cost, Cost]]) -> Fluency:
    """The judgement with what each costs each reader, and with examples to look at."""
    pairs = paired(data, control)
    sides = [
        shown(side, {name: pair[number] for name, pair in costs.items()}, at_random(len(side.tokens), which))
        for number, (which, side) in enumerate((("data", data), ("control", control)))
    ]
    return replace(
        found,
        nats=tuple(compare(name, *pair, pairs) for name, pair in costs.items()),
        data=sides[0],
        control=sides[1],
    )


def encoded(form: PromptFormat, prompts: list[str]) -> list[list[int]]:
    """Token ids of each prompt, each prompt encoded once."""
    known = list(dict.fromkeys(prompts))
    ids = dict(zip(known, form.encode(known), strict=True))
    return [list(ids[prompt]) for prompt in prompts]


def in_its_tokens(reader: LanguageModel, side: Side, config: Config) -> Read:
    """A run's rows in the tokens of a reader that has others than the generator: it is asked as the generator was, by its own
    chat template where it has one, and reads the text without the end of sequence."""
    asked = config.prompts
    chat = "auto" if asked.chat == "always" else asked.chat
    form = prompt_format(reader.tokenizer, reader.name, chat, asked.instruction, asked.max_tokens)
    return Read(encoded(form, side.prompts or [""] * len(side.texts)), tokenized(reader, side.texts))


def tokenized(model: LanguageModel, texts: list[str]) -> list[np.ndarray]:
    """Texts in a model's tokens, without special ones of its own."""
    with quiet_transformers():
        rows = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array(row, dtype=np.int64) for row in rows]
