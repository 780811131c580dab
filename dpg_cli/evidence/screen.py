"""Does the data say what it may not? Every text of the dataset and of the control, read from the files and from nothing else.

Two rules of the settings: `dataset.forbidden`, words that stand in no text (in any case, inside other words too), and
`rollout.alphabet`, the characters that texts are made of.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.artefacts.rows import batches
from dpg_cli.runs.verdict import Verdict
from dpg_cli.settings.config import Config


@dataclass(frozen=True)
class Screen:
    """What was looked for, and found.

    Attributes:
        words, alphabet: of the settings; empty where there is no such rule.
        rows: texts of each file.
        dropped: rows of each file that were drawn and left out, for a forbidden word.
        holding: rows of each file that hold a word, by word; those that hold none are not listed.
        outside: rows of each file with a character that is not of the alphabet.
    """

    words: tuple[str, ...]
    alphabet: str
    rows: dict[str, int]
    dropped: dict[str, int]
    holding: dict[str, dict[str, int]]
    outside: dict[str, int]

    @property
    def clean(self) -> bool:
        """No text holds a forbidden word or a character outside the alphabet."""
        return not any(self.holding.values()) and not any(self.outside.values())

    @property
    def reason(self) -> str:
        """What is not clean; empty where all is."""
        for name, found in self.holding.items():
            for word, count in found.items():
                return f"{count:,} rows of dataset/{name} hold {word!r}"
        for name, count in self.outside.items():
            if count:
                return f"{count:,} rows of dataset/{name} have characters outside rollout.alphabet"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"clean": self.clean, **vars(self)}

    def lines(self) -> list[str]:
        """For people."""
        texts = f"{sum(self.rows.values()):,} texts of dataset and control"
        said = []
        if self.words:
            shown = ", ".join(map(repr, self.words[:6])) + (", ..." if len(self.words) > 6 else "")
            count = sum(sum(found.values()) for found in self.holding.values())
            left_out = (
                f"; {sum(self.dropped.values()):,} drawn ones were left out for it"
                if any(self.dropped.values())
                else ""
            )
            said.append(
                f"screen: {count:,} of {texts} hold one of {len(self.words)} forbidden words ({shown}){left_out}"
            )
        if self.alphabet:
            count = sum(self.outside.values())
            said.append(f"screen: {count:,} of {texts} have a character outside {self.alphabet!r}")
        return said


@dataclass(frozen=True)
class Screened:
    """A verdict on the effect of data that also had to be clean."""

    verdict: Verdict
    screen: Screen

    @property
    def verified(self) -> bool:
        """The effect is there, and the data is clean."""
        return self.verdict.verified and self.screen.clean

    @property
    def reason(self) -> str:
        """Why not."""
        return self.screen.reason or self.verdict.reason

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the verdict's, and `screen`."""
        return {**self.verdict.as_dict(), "verified": self.verified, "screen": self.screen.as_dict()}

    def lines(self) -> list[str]:
        """For people."""
        return [*self.verdict.lines(), *self.screen.lines()]


def holds(text: str, words: tuple[str, ...]) -> list[str]:
    """Which of the words stand in a text, in any case."""
    folded = text.casefold()
    return [word for word in words if word.casefold() in folded]


def screen(dataset: Path, config: Config) -> Screen | None:
    """Read both files of a run's dataset; None where the settings have no such rule.

    Args:
        dataset: the folder.
        config: of the run.
    """
    words, alphabet = config.dataset.forbidden, config.rollout.alphabet
    if not words and not alphabet:
        return None
    rows, holding, outside = {}, dict[str, dict[str, int]](), {}
    for name in ("train.parquet", "control.parquet"):
        texts = [text for batch in batches(dataset / name, ["text"]) for text in batch.column("text").to_pylist()]
        found = [word for text in texts for word in holds(text, words)]
        rows[name] = len(texts)
        holding[name] = {word: found.count(word) for word in words if word in found}
        outside[name] = sum(bool(set(text) - set(alphabet)) for text in texts) if alphabet else 0
    dropped = {name: config.dataset.examples - count for name, count in rows.items()}
    return Screen(words, alphabet, rows, dropped, holding, outside)
