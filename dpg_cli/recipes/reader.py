"""Reading a recipe key by key: what is understood, what changes nothing, what would change the numbers and is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from dpg_cli.errors import ConfigError
from dpg_cli.settings.config import shown

SHOWN = 8  # ignored keys that are named


@dataclass(frozen=True)
class Understood:
    """What a recipe says in our settings.

    Attributes:
        kind: whose recipe it is, in words.
        settings: nested, to be merged under flags.
        said: (their key and value, our setting) of everything that was understood.
        ignored: keys that change nothing in the numbers.
        differs: what we do otherwise, a sentence each.
    """

    kind: str
    settings: dict[str, Any]
    said: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    differs: tuple[str, ...]

    def text(self) -> str:
        """One screen of it."""
        width = max((len(theirs) for theirs, _ in self.said), default=0)
        lines = [f"The recipe is one of {self.kind}. Understood:"]
        lines += [f"  {theirs:<{width}}  ->  {ours}" for theirs, ours in self.said]
        if self.ignored:
            more = f" and {len(self.ignored) - SHOWN} more" if len(self.ignored) > SHOWN else ""
            lines.append(f"Changing nothing: {', '.join(self.ignored[:SHOWN])}{more}.")
        lines += [f"Differs: {sentence}" for sentence in self.differs]
        return "\n".join(lines)


class Reader:
    """The keys of a recipe that have not been read yet, and what was made of the others.

    Args:
        data: the recipe.
        kind: whose it is, in words.
    """

    def __init__(self, data: dict[str, Any], kind: str) -> None:
        self.left, self.kind = dict(data), kind
        self.settings: dict[str, Any] = {}
        self.said: list[tuple[str, str]] = []
        self.ignored: list[str] = []
        self.differs: list[str] = []
        self.faults: list[str] = []

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is then read; the default where it is not there, or null."""
        value = self.left.pop(key, None)
        return default if value is None else value

    def number(self, key: str, default: float) -> float:
        """A number, also where YAML took it for a text (2e-5)."""
        value = self.take(key, default)
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            self.faults.append(f"{key}: {shown(value)} is no number")
            return float(default)

    def whole(self, key: str, default: int) -> int:
        """A whole number."""
        value = self.number(key, default)
        if value != int(value):
            self.faults.append(f"{key}: {value:g} is no whole number")
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """Yes or no, also as a text."""
        value = self.take(key, default)
        if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
            return value.lower() in ("true", "yes")
        if not isinstance(value, bool):
            self.faults.append(f"{key}: {shown(value)} is neither true nor false")
            return default
        return value

    def put(self, place: str, value: Any, because: str) -> None:
        """Set one of our settings.

        Args:
            place: `section.key`, or a key of the run.
            value: of our setting.
            because: their key and value, as it is shown.
        """
        section, _, key = place.rpartition(".")
        (self.settings.setdefault(section, {}) if section else self.settings)[key] = value
        self.said.append((because, f"{place} = {_words(value)}"))

    def ignore(self, globs: Iterable[str]) -> None:
        """Read keys that change nothing in the numbers."""
        for key in [key for key in self.left if any(fnmatchcase(key, glob) for glob in globs)]:
            self.ignored.append(key)
            del self.left[key]

    def refuse(self, key: str, neutral: tuple[Any, ...], why: str) -> None:
        """Read a key that we can only follow at its neutral values (null always is one)."""
        value = self.left.pop(key, None)
        if value is None or any(
            value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
        ):
            return
        if isinstance(value, int | float) and not isinstance(value, bool) and float(value) in neutral:
            return
        self.faults.append(f"{key} = {shown(value)}: {why}")

    def done(self, unknown: str) -> Understood:
        """The result.

        Args:
            unknown: what to say of a key that is not known.

        Raises:
            ConfigError: with a line for everything that we cannot follow.
        """
        self.faults += [f"{key}: {unknown}" for key in self.left]
        if self.faults:
            raise ConfigError(
                [f"recipe: {fault}" for fault in self.faults],
                "Take them out of a copy of the recipe, if a run without them is what you want attributed.",
            )
        return Understood(
            self.kind, self.settings, tuple(self.said), tuple(self.ignored), tuple(dict.fromkeys(self.differs))
        )


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return format(value, "g")
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
