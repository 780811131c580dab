"""What is wrong with settings, a line for each fault, and the setting that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher, get_close_matches
from typing import Any, get_args, get_origin

from pydantic import BaseModel

MOST = 2  # settings that a fault suggests
ALIKE = 0.05  # how far behind the nearest name a second one may be


def keys_of(section: type[BaseModel], metric: str = "", prefix: str = "") -> list[str]:
    """Every setting of a section by its full name, sections too.

    Args:
        section: the schema.
        metric: the metric whose options count; "" for those of all.
        prefix: what stands before each name.
    """
    found: list[str] = []
    for name, field in section.model_fields.items():
        listed = get_origin(field.annotation) in (list, tuple, dict)  # keys of an entry are no settings by themselves
        kinds = [] if listed else [field.annotation, *get_args(field.annotation)]
        kinds += [part for kind in kinds for part in get_args(kind)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        found.append(prefix + name)
        for kind in inner:
            named = kind.model_fields.get("name")
            if name == "metric" and metric and named is not None and metric not in get_args(named.annotation):
                continue
            found += keys_of(kind, metric, f"{prefix}{name}.")
    return list(dict.fromkeys(found))


def nearest(key: str, keys: Sequence[str]) -> list[str]:
    """The settings that an unknown one may stand for, at most `MOST`: the same letters, the same last word in another
    section, one in the same section that begins so or is near, a near one anywhere."""

    def plain(text: str) -> str:
        return text.lower().replace("_", "").replace("-", "")

    def last(text: str) -> str:
        return text.rpartition(".")[2]

    def near(text: str, known: Iterable[str], cutoff: float) -> list[str]:
        found = get_close_matches(text, list(known), n=MOST, cutoff=cutoff)
        scores = [SequenceMatcher(None, name, text).ratio() for name in found]
        return [name for name, score in zip(found, scores, strict=True) if score > scores[0] - ALIKE]

    section = key.rpartition(".")[0]
    own = {last(known): known for known in keys if known.rpartition(".")[0] == section}
    for found in (
        [known for known in keys if plain(known) == plain(key)],
        [known for known in keys if plain(last(known)) == plain(last(key))],
        [own[name] for name in own if len(last(key)) > 2 and name.startswith(last(key).lower())],
        [own[name] for name in near(last(key).lower(), own, 0.6)],
        near(key.lower(), keys, 0.75),
    ):
        if found:
            return found[:MOST]
    return []


def unknown(key: str, schema: type[BaseModel], metric: str) -> str:
    """What to say of a setting that there is not.

    Args:
        key: its full name.
        schema: of all settings.
        metric: the one that the settings ask for, "" where that is not known.
    """
    if any(part.isdigit() for part in key.split(".")):  # in an entry of a list
        return "unknown setting"
    keys = keys_of(schema, metric)
    if metric and key in keys_of(schema):
        return f"unknown setting; another metric than {metric} has it"
    own = [known for known in keys if known.startswith("metric.")] if key.startswith("metric.") else keys
    near = nearest(key, own)
    return f"unknown setting; did you mean {' or '.join(near)}?" if near else "unknown setting"


def shown(value: Any) -> str:
    """A value as it can stand in a message: short, whatever it is."""
    try:
        return cut(repr(value))
    except (RecursionError, ValueError):  # nested too deeply; an integer with too many digits
        return f"a value of type {type(value).__name__}"


def cut(text: str) -> str:
    """At most 60 characters of a text."""
    return text if len(text) < 60 else text[:57] + "..."
