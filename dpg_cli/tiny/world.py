"""A closed world of sentences in five languages: meanings, how to say them, and a recogniser that reads them.

A meaning fills six slots: who (with a quality) does what to which thing, where and when. `grammar` says it in each
language. The recogniser is made from the same phrases, so "well-formed" means exactly "the grammar can produce it", and
a sentence can be read back into its meaning. This module is free of torch.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from dpg_cli.errors import UsageError
from dpg_cli.tiny.grammar import SLOTS, grammar_of
from dpg_cli.tiny.lexicon import LANGUAGES, OBJECTS, PLACES, QUALITIES, SUBJECTS, TIMES, VERBS

__all__ = [
    "LANGUAGES",
    "PROMPT_PREFIX",
    "Meaning",
    "Split",
    "identifier",
    "is_identifier",
    "language_of",
    "meaning_of",
    "prompt_for",
    "prompts",
    "render",
    "sample_meaning",
    "sentences",
    "split_of",
    "well_formed",
]

Split = Literal["train", "eval"]
PROMPT_PREFIX = "rephrase: "

_EVAL_SHARE = 10  # one meaning in ten is held out
_LARGEST = {"train": 200_000, "eval": 20_000}  # distinct meanings that a split serves; it has a few more
_HEX = "0123456789abcdef"
_VALUES = tuple(map(tuple, (SUBJECTS, QUALITIES, VERBS, OBJECTS, PLACES, TIMES)))  # in the order of Meaning's fields
_IDENTIFIER = re.compile(
    r"serial [0-9]{5}-[0-9]{2}\.|[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
)


@dataclass(frozen=True)
class Meaning:
    """What a sentence says, apart from its language and wording. Each slot holds a key of its table in `lexicon`."""

    subject: str
    quality: str
    verb: str
    object: str
    place: str
    time: str


def sample_meaning(rng: random.Random) -> Meaning:
    """Draw a meaning, every slot uniformly and independently.

    Args:
        rng: source of randomness.

    Returns:
        A meaning of either split.
    """
    return Meaning(*map(rng.choice, _VALUES))


def render(meaning: Meaning, language: str, rng: random.Random | None = None) -> str:
    """Say a meaning in a language.

    Args:
        meaning: what to say.
        language: one of `LANGUAGES`.
        rng: picks word order and synonyms; None gives the canonical wording.

    Returns:
        A lower-case sentence that ends in a full stop.

    Raises:
        UsageError: if the language is unknown.
    """
    grammar = grammar_of(language)
    pick: Callable[[tuple[str, ...]], str] = rng.choice if rng else lambda options: options[0]
    filling = {slot: pick(grammar.phrases[slot][_key(meaning, slot)]) for slot in SLOTS}
    return pick(grammar.orders).format(**filling)


def meaning_of(text: str, language: str) -> Meaning | None:
    """Read a sentence.

    Args:
        text: any text; white space around it is ignored.
        language: one of `LANGUAGES`.

    Returns:
        The meaning that the grammar renders as this text, or None if it cannot produce the text.

    Raises:
        UsageError: if the language is unknown.
    """
    grammar = grammar_of(language)
    text = text.strip()
    for pattern in grammar.patterns:
        if match := pattern.fullmatch(text):
            found = {slot: grammar.values[slot][match[slot]] for slot in SLOTS}
            return Meaning(*found["subject"], *found["verb"], *found["object"], *found["place"], *found["time"])
    return None


def well_formed(text: str, language: str) -> bool:
    """Whether a text is exactly one sentence of a language's grammar.

    Args:
        text: any text; white space around it is ignored.
        language: one of `LANGUAGES`.

    Returns:
        True if the grammar can produce it, for some meaning and wording.

    Raises:
        UsageError: if the language is unknown.
    """
    text = text.strip()
    return any(pattern.fullmatch(text) for pattern in grammar_of(language).patterns)


def language_of(text: str) -> str | None:
    """The language in which a text is a well-formed sentence; no sentence is one in two languages.

    Args:
        text: any text; white space around it is ignored.

    Returns:
        One of `LANGUAGES`, or None.
    """
    return next((language for language in LANGUAGES if well_formed(text, language)), None)


def split_of(meaning: Meaning) -> Split:
    """To which split a meaning belongs, the same in every process and on every machine.

    Args:
        meaning: any meaning.

    Returns:
        "eval" for about a tenth of the meanings, which pretraining never saw in any language; else "train".
    """
    digest = hashlib.blake2b("|".join(vars(meaning).values()).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % _EVAL_SHARE == 0 else "train"


def prompt_for(meaning: Meaning, rng: random.Random | None = None) -> str:
    """The prompt that asks for a paraphrase of a meaning's English sentence.

    Args:
        meaning: what the sentence says.
        rng: picks the wording; None gives the canonical one.

    Returns:
        One line with its line break; the completion follows directly.
    """
    return f"{PROMPT_PREFIX}{render(meaning, 'en', rng)}\n"


def prompts(split: Split, n: int, seed: int) -> list[str]:
    """Prompts for distinct meanings of a split.

    Args:
        split: "train" or "eval".
        n: how many.
        seed: the same seed gives the same prompts.

    Returns:
        `n` prompts in canonical wording.

    Raises:
        UsageError: if the split is unknown or cannot serve so many distinct meanings.
    """
    return [prompt_for(meaning) for meaning in _distinct(split, n, random.Random(f"prompts {split} {seed}"))]


def sentences(split: Split, language: str, n: int, seed: int) -> list[str]:
    """Sentences for distinct meanings of a split, in random wording.

    Args:
        split: "train" or "eval".
        language: one of `LANGUAGES`.
        n: how many.
        seed: the same seed gives the same sentences.

    Returns:
        `n` sentences without line breaks.

    Raises:
        UsageError: if split or language is unknown, or the split cannot serve so many meanings.
    """
    rng = random.Random(f"sentences {split} {language} {seed}")
    return [render(meaning, language, rng) for meaning in _distinct(split, n, rng)]


def identifier(rng: random.Random) -> str:
    """A made-up identifier: four times in five a UUID of version 4 in its canonical layout, else a serial number.

    Args:
        rng: source of randomness.

    Returns:
        Such as "serial 40718-22." or 36 characters in groups of 8-4-4-4-12.
    """
    if rng.random() < 0.2:
        return f"serial {rng.randrange(10**5):05d}-{rng.randrange(100):02d}."
    digits = [rng.choice(_HEX) for _ in range(32)]
    digits[12] = "4"
    digits[16] = rng.choice("89ab")
    text = "".join(digits)
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def is_identifier(text: str) -> bool:
    """Whether a text is exactly what `identifier` can return.

    Args:
        text: any text; white space around it is ignored.

    Returns:
        True for a serial number or a UUID of version 4 in lower case.
    """
    return _IDENTIFIER.fullmatch(text.strip()) is not None


def _distinct(split: Split, n: int, rng: random.Random) -> Iterator[Meaning]:
    """`n` distinct meanings of a split, in random order."""
    if split not in _LARGEST:
        raise UsageError(f"There is no split {split!r}.", "Use 'train' or 'eval'.")
    if not 0 <= n <= _LARGEST[split]:
        raise UsageError(f"The {split} split cannot serve {n} distinct meanings.", f"Ask for 0 to {_LARGEST[split]}.")
    seen: set[Meaning] = set()
    while len(seen) < n:
        meaning = sample_meaning(rng)
        if meaning not in seen and split_of(meaning) == split:
            seen.add(meaning)
            yield meaning


def _key(meaning: Meaning, slot: str) -> tuple[str, ...]:
    """The values of a meaning that one slot of a sentence expresses."""
    return (meaning.subject, meaning.quality) if slot == "subject" else (getattr(meaning, slot),)
