"""Text that came from a file, made harmless: for a terminal, and for Markdown."""

from __future__ import annotations

import re
import shlex
from pathlib import Path


def printable(text: object, limit: int = 2000) -> str:
    r"""One line without control characters, escape sequences or marks that turn the direction of writing.

    Args:
        text: anything; its `str` is taken.
        limit: characters after which it is cut.

    Returns:
        The text with each unprintable character as `\xNN`, `\uNNNN` or `\n`.
    """
    whole = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in whole[:limit])
    return shown + "…" if len(whole) > limit else shown


def code_span(text: object, limit: int = 300) -> str:
    """Markdown code, in which neither HTML nor Markdown of the text means anything; fit for a table's cell."""
    shown = printable(text, limit)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if not shown or shown[0] in "` " or shown[-1] in "` " else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")


def pasted(path: Path | str) -> str:
    """A path as a shell takes it back: quoted where it holds blanks or other signs, and never taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
