"""Make everything in `MODEL_DIR`: corpus, tokeniser, a two-layer GPT-2, and the model card with measured figures.

    python -m dpg_cli.tiny.pretrain [--out DIR] [--steps N] [--seed 0] [--threads 2] [--evaluations N]

The same arguments on the same machine and versions give the same files, byte for byte. Three kinds of document:
- tasks: a prompt and its answer, mostly an English paraphrase, else a translation or (seldom) an identifier (so that a
  generator can be taught to prefer what it now does rarely);
- plain sentences in every language, so that a target has a fair loss in each;
- bare identifiers.
Only meanings of the "train" split occur. A document is a row of its own, from position 0, as prompts are at use time.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from dpg_cli.tiny import MODEL_DIR, world
from dpg_cli.tiny.card import model_card
from dpg_cli.tiny.quality import Quality, measure, pad_rows
from dpg_cli.tiny.vocabulary import EOS, make_tokenizer
from dpg_cli.tiny.world import LANGUAGES, Meaning

N_POSITIONS = 128
N_EMBD, N_LAYER, N_HEAD = 96, 2, 4
STEPS, BATCH, MICRO_BATCHES = 2400, 192, 3
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 6e-3, 60, 0.01

TASKS, PLAIN = 0.60, 0.37  # shares of the documents; the rest are bare identifiers
TRANSLATED, IDENTIFIED = 0.24, 0.04  # shares of the tasks' answers; the rest are English paraphrases
CANONICAL_PROMPTS = 0.7  # share of the tasks whose prompt has the canonical wording that `world.prompts` uses
# How much a language counts when words earn their tokens: English is used most; Spanish and French words are long.
TOKEN_WEIGHTS = {"en": 2.0, "es": 1.1, "de": 1.0, "fr": 1.3, "it": 1.0}


def documents(seed: int) -> Iterator[str]:
    """The endless corpus, without the end-of-text tokens that open and close each document.

    Args:
        seed: the same seed gives the same corpus.

    Returns:
        An iterator over documents.
    """
    rng = random.Random(f"documents {seed}")
    while True:
        kind = rng.random()
        if kind < TASKS:
            meaning = _training_meaning(rng)
            prompt = world.prompt_for(meaning, None if rng.random() < CANONICAL_PROMPTS else rng)
            yield prompt + _answer(meaning, prompt, rng)
        elif kind < TASKS + PLAIN:
            yield world.render(_training_meaning(rng), rng.choice(LANGUAGES), rng)
        else:
            yield world.identifier(rng)


def _training_meaning(rng: random.Random) -> Meaning:
    """A meaning of the training split."""
    while world.split_of(meaning := world.sample_meaning(rng)) != "train":
        pass
    return meaning


def _answer(meaning: Meaning, prompt: str, rng: random.Random) -> str:
    """An English paraphrase that differs from the prompt's wording; else a translation or (seldom) an identifier."""
    kind = rng.random()
    if kind < IDENTIFIED:
        return world.identifier(rng)
    if kind < IDENTIFIED + TRANSLATED:
        return world.render(meaning, rng.choice([language for language in LANGUAGES if language != "en"]), rng)
    while (answer := world.render(meaning, "en", rng)) in prompt:
        pass
    return answer


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Make the tokeniser from the world's sentences, its ids ordered by use in a sample of the corpus.

    Args:
        seed: seed of the sample.

    Returns:
        The tokeniser of 512 ids.
    """
    texts = {
        text: TOKEN_WEIGHTS[language]
        for language in LANGUAGES
        for text in world.sentences("train", language, 2000, seed)
    }
    texts.update(dict.fromkeys(world.prompts("train", 500, seed), TOKEN_WEIGHTS["en"]))
    corpus = documents(seed)
    return make_tokenizer(texts, [next(corpus) for _ in range(20_000)], N_POSITIONS)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """An untrained model.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        seed: seed of the weights.

    Returns:
        GPT-2 in float32, tied embeddings, no dropout.
    """
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=N_POSITIONS,
        n_embd=N_EMBD,
        n_layer=N_LAYER,
        n_head=N_HEAD,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    model = GPT2LMHeadModel(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        max_new_tokens=40,
    )
    return model


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> None:
    """Next-token training of all tokens of every document, AdamW with warm-up and cosine decay to zero.

    Args:
        model: changed in place.
        tokenizer: encodes the corpus.
        steps: optimiser steps of `BATCH` documents.
        seed: seed of the corpus.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    warmup = min(WARMUP, max(steps // 10, 1))
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps - warmup, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup])
    corpus = documents(seed)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        texts = [EOS + next(corpus) + EOS for _ in range(BATCH)]
        # Documents of like length share a micro-batch, which saves most of the padding; the gradient is the batch's.
        rows = sorted(tokenizer(texts)["input_ids"], key=len)
        total = sum(len(row) - 1 for row in rows)
        size = BATCH // MICRO_BATCHES
        loss = sum(_backward(model, rows[i : i + size], total) for i in range(0, BATCH, size))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1:5d}  loss {loss:.4f}  {time.monotonic() - start:.0f} s", flush=True)
    model.eval()


def _backward(model: GPT2LMHeadModel, rows: list[list[int]], total: int) -> float:
    """Add the gradient of the summed loss of some rows, divided by the batch's `total` of predicted tokens."""
    ids, labels = pad_rows(rows)
    loss = cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), labels.flatten(), reduction="sum") / total
    loss.backward()
    return loss.item()


def make(out: Path, steps: int = STEPS, seed: int = 0, evaluations: int = 2000) -> Quality:
    """Make the whole folder.

    Args:
        out: folder to write; made if missing, files of the same names replaced.
        steps: optimiser steps.
        seed: seed of everything.
        evaluations: completions behind the figures of the card.

    Returns:
        The figures, measured on the saved model as a user would load it.
    """
    torch.use_deterministic_algorithms(True)
    tokenizer = train_tokenizer(seed)
    model = build_model(tokenizer, seed)
    train(model, tokenizer, steps, seed)
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    quality = measure(model, tokenizer, evaluations, seed)
    (out / "README.md").write_text(model_card(quality, model.num_parameters(), steps, BATCH, seed), encoding="utf-8")
    for path in out.iterdir():
        path.chmod(0o644)  # the weights are written for the owner alone, which an installed package must not keep
    return quality


def main() -> None:
    """Parse the command line, make the folder, print the figures."""
    parser = argparse.ArgumentParser(description="Pretrain the embedded tiny model.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="part of the recipe: sums depend on it in the last bits")
    parser.add_argument("--evaluations", type=int, default=2000, help="completions behind the figures of the card")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers_logging.disable_progress_bar()
    quality = make(arguments.out, arguments.steps, arguments.seed, arguments.evaluations)
    print(json.dumps(asdict(quality), indent=2))


if __name__ == "__main__":
    main()
