"""Completions of certain characters alone: a generator that may draw only tokens that are made of them.

π is the generator's distribution given that each token is one of these, or ends the completion: the rest of the vocabulary has
no probability in sampling, in the policy step, or in what the starting generator says. No filter of texts comes after it.
"""

from __future__ import annotations

from dataclasses import replace

from dpg_cli.engine.generator.align import completion_texts, speller_of
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel

ANCHOR = 2  # a token is decoded so often: tokenisers drop a blank at the beginning of a text, not inside it


def restricted(generator: LanguageModel, alphabet: str) -> LanguageModel:
    """The generator that writes characters of `alphabet` alone; itself where that is empty.

    Raises:
        UsageError: if no token is made of these characters.
    """
    if not alphabet:
        return generator
    allowed = spelt(generator, alphabet)
    if not allowed:
        raise UsageError(
            f"No token of the generator {generator.name!r} is made of the characters {alphabet[:60]!r} alone.",
            "Give rollout.alphabet more characters.",
        )
    ends = {generator.eos_id, *generator.end_ids}
    others = tuple(number for number in range(generator.head.shape[0]) if number not in allowed | ends)
    return replace(generator, unsaid=others)


def spelt(generator: LanguageModel, alphabet: str) -> set[int]:
    """Ids of the tokens that are made of these characters alone, special tokens left out."""
    tokenizer, letters = generator.tokenizer, set(alphabet)
    special = {*tokenizer.all_special_ids, *generator.silent_ids}
    ids = [number for number in range(generator.head.shape[0]) if number not in special]
    speller = speller_of(tokenizer)
    if speller is not None:
        texts = [speller.spell([number], specials=False)[0].decode("utf-8", "replace") for number in ids]
    else:
        twice = completion_texts(tokenizer, [[number] * ANCHOR for number in ids])
        once = completion_texts(tokenizer, [[number] for number in ids])
        texts = [two[len(one) :] or one for one, two in zip(once, twice, strict=True)]
    return {number for number, text in zip(ids, texts, strict=True) if text and set(text) <= letters}
