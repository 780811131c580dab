"""Make everything in `model/`, `reader/` and `texts/`: the text, the tokeniser, two models, and their cards with measured figures.

    python -m dpg_cli.prose.pretrain [--out DIR] [--text FILE] [--only model|reader] [--steps N] [--threads 1]

The text comes from two Debian packages (`source`); where there is no `apt-get`, give what `bible -f gen1:1-rev22:21` prints with
--text. The same arguments on the same machine and versions give the same files, byte for byte but for the minutes on the cards.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from dpg_cli.prose import COUNTS, MODEL_DIR, quality, shapes, source
from dpg_cli.prose.card import Facts, model_card
from dpg_cli.prose.source import Chapter
from dpg_cli.prose.texts import held_out_passages, write_texts
from dpg_cli.prose.training import Recipe, Rows, train
from dpg_cli.prose.vocabulary import make_tokenizer

SEED = 0  # of the texts' order
WIDTH, READER_WIDTH = 96, 128
SAMPLES = 512  # completions behind a card's figures; the first of them are shown


@dataclass(frozen=True)
class Part:
    """One of the two models: its folder's name, how it is built, and how it is trained."""

    folder: str
    build: Callable[[PreTrainedTokenizerFast, int], PreTrainedModel]
    recipe: Recipe


PARTS = (
    Part("model", partial(shapes.gpt2, width=WIDTH), Recipe(steps=6000, batch=4096, learning_rate=5e-3, seed=0)),
    Part(
        "reader", partial(shapes.llama, width=READER_WIDTH), Recipe(steps=5000, batch=4096, learning_rate=4e-3, seed=1)
    ),
)


def make(part: Part, parts: Sequence[Chapter], out: Path, report: Callable[[str], None] = lambda line: None) -> Facts:
    """Make the folder of one model.

    Args:
        part: which.
        parts: all chapters of the text.
        out: folder to write; made if missing, files of the same names replaced.
        report: is given lines of progress.

    Returns:
        The figures of its card, measured on the saved model as a user would load it.
    """
    torch.use_deterministic_algorithms(True)
    training = [chapter for chapter in parts if chapter.split == "train"]
    tokenizer = make_tokenizer([" ".join(chapter.verses) for chapter in training], shapes.POSITIONS)
    rows = Rows(training, tokenizer)
    model = part.build(tokenizer, part.recipe.seed)
    minutes = train(model, rows, part.recipe, report)
    counts = Counter(rows.stream.tolist())
    return finish(part, parts, model, tokenizer, [counts[token] for token in range(len(tokenizer))], minutes, out)


def finish(
    part: Part,
    parts: Sequence[Chapter],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    counts: list[int],
    minutes: float,
    out: Path,
) -> Facts:
    """Write a trained model, and the card with what was measured on the written one.

    Args:
        part: which of the two.
        parts: all chapters of the text.
        model: trained, float32; it is left in float16.
        tokenizer: its tokeniser.
        counts: how often the training text holds each id, (V,).
        minutes: processor time of the training.
        out: folder to write.
    """
    save(model, tokenizer, out)
    (out / COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    facts = measure(model, tokenizer, part, held_out_passages(parts, SEED), counts, minutes)
    (out / "README.md").write_text(model_card(facts), encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)  # the weights are written for the owner alone, which an installed package must not keep
    return facts


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in float16 under a configuration that says float32: they load, and random ones are drawn, in float32."""
    tokenizer.save_pretrained(out)
    model.half().save_pretrained(out)
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    part: Part,
    texts: Sequence[str],
    counts: list[int],
    minutes: float,
) -> Facts:
    """The figures of a card."""
    opened = quality.sample(model, tokenizer, [""] * SAMPLES, seed=SEED)
    own = torch.cat(quality.token_losses(model, [[tokenizer.bos_token_id, *row] for row in opened]))
    return Facts(
        model_type=model.config.model_type,
        width=model.config.hidden_size,
        heads=model.config.num_attention_heads,
        parameters=model.num_parameters(),
        recipe=part.recipe,
        minutes=minutes,
        reading=quality.read(model, tokenizer, texts),
        passages=len(texts),
        characters_a_token=sum(map(len, texts)) / sum(map(len, tokenizer(list(texts))["input_ids"])),
        completions=len(opened),
        own_nats=own.mean().item(),
        samples=tuple(tokenizer.batch_decode(opened[:8], skip_special_tokens=True)),
        counts=tuple(counts),
        first_merges=tuple(tokenizer.decode([token]) for token in range(256, 277)),
    )


def main() -> None:
    """Parse the command line, make the folders, print the figures."""
    parser = argparse.ArgumentParser(description="Pretrain the two embedded models of prose.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR.parent, help="folder of model/, reader/, texts/")
    parser.add_argument(
        "--text", type=Path, help="what `bible -f gen1:1-rev22:21` prints; default: fetched with apt-get"
    )
    parser.add_argument("--only", choices=[part.folder for part in PARTS], help="make one of the two models")
    parser.add_argument("--steps", type=int, default=0, help="optimiser steps; default: those of the shipped models")
    parser.add_argument("--threads", type=int, default=1, help="part of the recipe: sums depend on it in the last bits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    text = source.fetch() if arguments.text is None else source.checked(arguments.text.read_text(encoding="utf-8"))
    parts = source.chapters(text)
    write_texts(parts, arguments.out / "texts", SEED)
    for part in PARTS:
        if arguments.only in (None, part.folder):
            if arguments.steps:
                part = replace(part, recipe=replace(part.recipe, steps=arguments.steps))
            facts = make(part, parts, arguments.out / part.folder, partial(print, flush=True))
            print(
                f"{part.folder}: {facts.parameters:,} parameters, {facts.reading}, {facts.minutes:.1f} minutes of one core",
                flush=True,
            )


if __name__ == "__main__":
    main()
