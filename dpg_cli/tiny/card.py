"""The model card of the embedded model: how it was made, and the figures that `pretrain` measured."""

from __future__ import annotations

from dpg_cli.tiny.quality import Quality
from dpg_cli.tiny.world import LANGUAGES


def model_card(quality: Quality, parameters: int, steps: int, batch: int, seed: int) -> str:
    """Write the card.

    Args:
        quality: what was measured on the saved model.
        parameters: size of the model.
        steps: optimiser steps of the pretraining.
        batch: documents a step.
        seed: seed of everything.

    Returns:
        Markdown with the usual metadata in front.
    """
    rows = []
    for kind, share in quality.shares.items():
        loss, tokens = _figure(quality.loss, kind, ".3f"), _figure(quality.sentence_tokens, kind, ".1f")
        rows.append(f"| {kind} | {share:.1%} | {loss} | {tokens} |")
    kinds = "\n".join(rows)
    codes = "\n".join(f"- {language}" for language in LANGUAGES)
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
language:
{codes}
---

# The embedded model of dpg

A GPT-2 of {parameters:,} parameters (2 layers, width 96, 4 heads, 128 positions, tied embeddings, float32) and a
byte-level tokeniser of 512 tokens. It knows one small closed world: sentences about who does what to which thing,
where and when, in English, Spanish, German, French and Italian. It exists so that Dataset Policy Gradient can be
tried, tested and measured on a CPU in minutes without a network.

## Use

    prompt:      rephrase: the small dog buys a hat at the market today.⏎
    completion:  today the little dog is buying a hat at the market.<|endoftext|>

Each document starts with `<|endoftext|>`, as beginning of sequence, and ends with it. Prompts are one English sentence of
the world behind `rephrase: `, with a line break. `dpg_cli.tiny.world` makes prompts
and held-out sentences, and recognises well-formed ones.

## How it was made

`python -m dpg_cli.tiny.pretrain --steps {steps} --seed {seed}` makes this folder, in five to eight minutes on two CPU
cores. All text comes from the grammar in `dpg_cli/tiny`; no outside data and no outside weights were used. Training:
{steps} steps of {batch} documents, AdamW, cosine schedule, loss on every token. Documents are tasks (60 %: prompt and
answer; the answer is an English paraphrase in 87 %, a sentence in another language in 9 %, an identifier in 4 %), plain
sentences (37 %, each language alike) and identifiers (3 %). A tenth of the meanings, chosen by a hash, was held out in
every language.

Token ids fall with frequency in that corpus: id 0 is the most frequent token. Bytes that never occur come after those
in use; `<|endoftext|>` (510) and `<|pad|>` (511) are last. Digits and identifiers take one token a character.

## Measured

{quality.completions:,} held-out prompts, one completion each at temperature 1 and at most 40 tokens:

- well-formed (a sentence of one language, or an identifier): **{quality.well_formed:.1%}**
- ended by `<|endoftext|>`: {quality.finished:.1%}; mean length {quality.tokens:.1f} tokens
- English answers keep {quality.slots_kept:.1%} of the six parts of the meaning; {quality.meaning_kept:.1%} keep all

| kind | share of completions | loss on held-out sentences, nats a token | tokens a sentence |
|---|---|---|---|
{kinds}

The losses are for plain sentences of random meaning, whose entropy no model can remove.

## Limits

Outside its world the model knows nothing: other words fall apart into bytes and continue as noise. Answers in another
language mostly keep only part of the prompt's meaning. It is a fixture for method work, not a model to build on.

Licence: MIT.
"""


def _figure(figures: dict[str, float], kind: str, form: str) -> str:
    """One cell of the table; a dash where nothing was measured."""
    return format(figures[kind], form) if kind in figures else "–"
