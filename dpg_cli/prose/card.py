"""The model cards of the two models of prose: where the text is from, how they were made, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from dpg_cli.prose import best_block
from dpg_cli.prose.quality import Reading
from dpg_cli.prose.shapes import NEW_TOKENS, POSITIONS
from dpg_cli.prose.training import BETAS, CLIP, ROW_LENGTHS, WARMUP, WEIGHT_DECAY, Recipe

_NAMES = {"gpt2": "GPT-2", "llama": "Llama"}
_ROLES = {
    "gpt2": "It is generator and target of the scale `prose`, and is called `prose`.",
    "llama": "It is the independent reader of what `prose` writes, and a generator that is not the target: `prose-reader`.",
}
_BLOCK = 21  # modules on a side of the smallest QR code


@dataclass(frozen=True)
class Facts:
    """What a card says.

    Attributes:
        model_type, width, heads, parameters: of the model.
        recipe, minutes: of the training; minutes of processor time.
        reading: losses on the held-out passages.
        passages: how many they are.
        characters_a_token: of the held-out passages.
        completions: how many of its own completions from an empty prompt were read.
        own_nats: the model's loss on those, nats a token: an estimate of their entropy.
        samples: completions from an empty prompt.
        counts: of each token id in the training text.
        first_merges: the tokens of rows 256 to 276, spelt out.
    """

    model_type: str
    width: int
    heads: int
    parameters: int
    recipe: Recipe
    minutes: float
    reading: Reading
    passages: int
    characters_a_token: float
    completions: int
    own_nats: float
    samples: tuple[str, ...]
    counts: tuple[int, ...]
    first_merges: tuple[str, ...]


def model_card(facts: Facts) -> str:
    """Write the card: Markdown with the usual metadata in front."""
    recipe, reading, total, size = facts.recipe, facts.reading, sum(facts.counts), len(facts.counts)
    epochs = recipe.steps * recipe.batch / total
    block = best_block(list(facts.counts), _BLOCK)
    shares = [facts.counts[row] / total for row in block]
    unused = sum(count == 0 for count in facts.counts[:_BLOCK])
    merges = " ".join(f"`{token}`" for token in facts.first_merges)
    samples = "\n".join(f"    {' '.join(sample.split())}" for sample in facts.samples)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "tokenizers"))
    only = "model" if facts.model_type == "gpt2" else "reader"
    return f"""---
license: mit
library_name: transformers
pipeline_tag: text-generation
language:
- en
---

# A small model of real prose

A {_NAMES[facts.model_type]} of {facts.parameters:,} parameters (2 layers, width {facts.width}, {facts.heads} heads, {POSITIONS} positions,
head and embeddings tied, no dropout) and a byte-level BPE tokeniser of {size:,} tokens. It writes the English of 1611.
{_ROLES[facts.model_type]}
It exists so that Dataset Policy Gradient can be tried on text with the entropy of prose, on a CPU and without a network.

## Source and licence

The King James Version of the Bible, 31,102 verses, 4.3 MB, from Debian's packages `bible-kjv` and `bible-kjv-text`
4.38. Their copyright file says of the text that its copyright has expired: it is in the public domain (in the United
Kingdom the right to print it is the Crown's). The text is not part of this repository; the making script fetches it.
Weights, tokeniser and scripts: MIT.

## How it was made

`make model-prose`, or `python -m dpg_cli.prose.pretrain --only {only}`:
{recipe.steps:,} steps of {recipe.batch:,} tokens ({epochs:.1f} times the training text), AdamW (rate {recipe.learning_rate:g},
betas {BETAS[0]} and {BETAS[1]}, weight decay {WEIGHT_DECAY} on matrices), {WARMUP} steps of warm-up, cosine to zero,
gradients clipped at {CLIP:g}, seed {recipe.seed}; products in bfloat16, weights and sums in float32. It took
about {facts.minutes:.0f} minutes of one core. Rows are {ROW_LENGTHS[0]} or {ROW_LENGTHS[1]} tokens long: `<|endoftext|>`, then the text
from the start of a verse on, verses joined by a space; `<|endoftext|>` again where the chapter ends.
Weights are stored in float16 and load in float32.
Made with {versions}.

One chapter in twenty, chosen by a hash of its name, was held out (48 of 1,189). Passages of whole verses, at least 200
characters long, were cut from them; those of which the training chapters hold more than a quarter of the
eight-word sequences were left out, since the source repeats itself.

## Measured

On {facts.passages:,} held-out passages, {reading.tokens:,} tokens of {facts.characters_a_token:.2f} characters,
each read from its beginning:

- held-out loss: **{reading.nats:.3f} nats a token** ({reading.nats / facts.characters_a_token:.3f} a character)
- of the first {NEW_TOKENS} tokens of each passage: {reading.opening:.3f} nats a token
- its own completions of {NEW_TOKENS} tokens, {facts.completions:,} of them: {facts.own_nats:.3f} nats a token by its own measure

Completions from an empty prompt at temperature 1, the first {len(facts.samples)} of a seed:

{samples}

## The vocabulary

Ids 0 to 255 are the bytes, in the order of byte-level BPE; 256 to {size - 3:,} are the merges, in the order they were
learnt; {size - 2:,} is `<|endoftext|>`, beginning and end of sequence, and {size - 1:,} is `<|pad|>`.
`token_counts.json` says how often the training text holds each id. Of rows 0 to {_BLOCK - 1} it never uses {unused}.
The first merges, rows 256 to {255 + _BLOCK}, are frequent:
{merges}.

The {_BLOCK} rows side by side whose rarest token is the least rare are **{block.start} to {block.stop - 1}**: each is {min(shares):.2%} of the
tokens or more, together {sum(shares):.1%} (`dpg_cli.prose.frequent_rows({_BLOCK})`).

## Limits

The model has the tone of its source and little of its sense, and knows nothing else: modern words fall apart into
letters. It is a fixture for method work, not a model to build on.
"""
