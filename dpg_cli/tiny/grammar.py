"""How each language says a meaning: phrases that already agree in gender and case, and the orders that join them.

A slot's phrases are listed in full ("der alte hund"), never assembled from free parts at reading time. So the renderer
and the recogniser cannot disagree about agreement: both look at the same list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from dpg_cli.errors import UsageError
from dpg_cli.tiny.lexicon import (
    BEFORE_NOUN,
    DEFINITE,
    INDEFINITE,
    LANGUAGES,
    OBJECTS,
    ORDERS,
    PLACES,
    QUALITIES,
    SUBJECTS,
    TIMES,
    VERBS,
)

SLOTS = ("subject", "verb", "object", "place", "time")
"""Parts of a sentence; the subject expresses two slots of a meaning, its noun and its quality."""


@dataclass(frozen=True)
class Grammar:
    """One language.

    Attributes:
        phrases: slot -> values of the meaning -> phrases, the canonical one first.
        orders: sentence frames, the canonical one first.
        patterns: the recogniser, a regular expression for each order with a named group for each slot.
        values: slot -> phrase -> values of the meaning.
    """

    phrases: dict[str, dict[tuple[str, ...], tuple[str, ...]]]
    orders: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    values: dict[str, dict[str, tuple[str, ...]]]


@cache
def grammar_of(language: str) -> Grammar:
    """A language's grammar, built from the lexicon once.

    Args:
        language: one of `LANGUAGES`.

    Returns:
        Its phrases, sentence frames and recogniser.

    Raises:
        UsageError: if the language is unknown.
    """
    if language not in LANGUAGES:
        raise UsageError(f"There is no language {language!r}.", f"Use one of {', '.join(LANGUAGES)}.")
    column = LANGUAGES.index(language)
    phrases: dict[str, dict[tuple[str, ...], tuple[str, ...]]] = {
        "subject": {(s, q): tuple(_subjects(s, q, language)) for s in SUBJECTS for q in QUALITIES},
        "object": {(o,): tuple(_objects(o, language)) for o in OBJECTS},
    }
    for slot, table in (("verb", VERBS), ("place", PLACES), ("time", TIMES)):
        phrases[slot] = {(key,): tuple(row[column].split("|")) for key, row in table.items()}
    values = {slot: {p: key for key, options in phrases[slot].items() for p in options} for slot in SLOTS}
    groups = {slot: f"(?P<{slot}>{_alternatives(values[slot])})" for slot in SLOTS}
    orders = ORDERS[language]
    patterns = tuple(re.compile(order.replace(".", r"\.").format(**groups)) for order in orders)
    return Grammar(phrases, orders, patterns, values)


def _alternatives(phrases: Iterable[str]) -> str:
    """A regular expression for any of some phrases."""
    return "|".join(re.escape(phrase) for phrase in phrases)


def _subjects(subject: str, quality: str, language: str) -> Iterator[str]:
    """Article, adjective and noun of the subject, in agreement and in the language's order."""
    column = LANGUAGES.index(language)
    noun_cell, quality_cell = SUBJECTS[subject][column], QUALITIES[quality][column]
    if language == "en":
        yield from (f"the {q} {s}" for s in noun_cell.split("|") for q in quality_cell.split("|"))
        return
    gender, noun = noun_cell.split()
    masculine, _, feminine = quality_cell.partition("/")
    adjective = feminine if gender == "f" and feminine else masculine
    pair = f"{adjective} {noun}" if quality in BEFORE_NOUN[language] else f"{noun} {adjective}"
    yield f"{DEFINITE[language][gender]} {pair}"


def _objects(item: str, language: str) -> Iterator[str]:
    """Indefinite article and noun of the object (accusative in German)."""
    cell = OBJECTS[item][LANGUAGES.index(language)]
    if language == "en":
        yield from (f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in cell.split("|"))
        return
    gender, noun = cell.split()
    yield f"{INDEFINITE[language][gender]} {noun}"
