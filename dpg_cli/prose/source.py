"""The source text: the King James Version of 1611 as Debian packages it, split by chapter into training and held-out.

`fetch` needs `apt-get` and `dpkg-deb` (Debian, Ubuntu): the package `bible-kjv-text` holds the text compressed, and the
program of `bible-kjv` unpacks it. Neither is installed and neither becomes part of this repository. This module is free of torch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from dpg_cli.errors import UsageError

Split = Literal["train", "eval"]

PACKAGES = ("bible-kjv", "bible-kjv-text")
EVERYTHING = "gen1:1-rev22:21"  # the range that `bible` is asked for
SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"  # of version 4.38, all 31,102 verses

_VERSE = re.compile(r"([1-3]?[A-Za-z]+)(\d+):(\d+) (.+)")
_HELD_OUT = 20  # one chapter in so many
_SHINGLE = 8  # words; a sequence of so many that training has too tells that a passage is not new
_KNOWN = 0.25  # largest share of such sequences in a held-out passage


@dataclass(frozen=True)
class Chapter:
    """One chapter: its name, such as `Psa23`, and its verses in order."""

    name: str
    verses: tuple[str, ...]

    @property
    def split(self) -> Split:
        """Which side the chapter is on: a hash of its name holds one in twenty out."""
        digest = hashlib.sha256(f"chapter {self.name}".encode()).digest()
        return "eval" if int.from_bytes(digest[:8], "big") % _HELD_OUT == 0 else "train"


def fetch() -> str:
    """The text as `bible -f` prints it: a line a verse, `Ge1:1 In the beginning ...`.

    Raises:
        UsageError: where the packages cannot be had, or hold another text than version 4.38.
    """
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise UsageError(
            f"The text comes from Debian packages, and {missing[0]} is not here.", "Give it with --text FILE."
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            subprocess.run(["apt-get", "download", *PACKAGES], cwd=folder, check=True, capture_output=True, text=True)
            for package in sorted(folder.glob("*.deb")):
                subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True, text=True)
            program = [f"{folder}/usr/bin/bible", "-p", f"{folder}/usr/lib/", "-f", EVERYTHING]
            text = subprocess.run(program, check=True, capture_output=True, text=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            raise UsageError(
                f"The text cannot be had from {' and '.join(PACKAGES)}: {reason}.", "Give it with --text FILE."
            ) from None
    return checked(text)


def checked(text: str) -> str:
    """The same text, if it is the one that the shipped models were made from.

    Raises:
        UsageError: if it is another one.
    """
    if hashlib.sha256(text.encode()).hexdigest() != SHA256:
        raise UsageError(
            "This is not the text of bible-kjv-text 4.38 as `bible -f` prints it.", "Take that version of the package."
        )
    return text


def chapters(text: str) -> list[Chapter]:
    """The chapters of a text with a line a verse, in its order.

    Raises:
        UsageError: for a line that is no verse.
    """
    found = []
    for line in text.splitlines():
        match = _VERSE.fullmatch(line.strip())
        if match is None:
            raise UsageError(
                f"No verse: {line[:60]!r}.", "Each line is a reference and the verse: Ge1:1 In the beginning ..."
            )
        found.append((match[1] + match[2], match[4].strip()))
    return [
        Chapter(name, tuple(verse for _, verse in group)) for name, group in groupby(found, key=lambda pair: pair[0])
    ]


def passages(parts: Sequence[Chapter], characters: int) -> Iterator[str]:
    """Runs of whole verses of at least so many characters, none across a chapter's end; shorter rests are left out."""
    for part in parts:
        passage = ""
        for verse in part.verses:
            passage = f"{passage} {verse}" if passage else verse
            if len(passage) >= characters:
                yield passage
                passage = ""


def unseen(candidates: Sequence[str], training: Sequence[Chapter]) -> list[str]:
    """The passages that no training chapter tells in the same words: the source repeats whole chapters.

    A passage is left out where more than a quarter of its eight-word sequences occur in the training chapters.
    """
    known: set[bytes] = set()
    for part in training:
        known.update(_shingles(" ".join(part.verses)))
    kept = []
    for passage in candidates:
        own = _shingles(passage)
        if sum(shingle in known for shingle in own) <= _KNOWN * len(own):
            kept.append(passage)
    return kept


def _shingles(text: str) -> list[bytes]:
    """Digests of all sequences of `_SHINGLE` words, letters alone and in lower case."""
    words = re.findall(r"[a-z']+", text.lower())
    sequences = (" ".join(words[i : i + _SHINGLE]) for i in range(len(words) - _SHINGLE + 1))
    return [hashlib.blake2b(sequence.encode(), digest_size=8).digest() for sequence in sequences]
