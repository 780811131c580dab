"""Tokens on a screen: coloured by their scores, or by whether they are trained on; marked where there are no colours."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.text import Text

from dpg_cli.escape import printable


def shows_unicode() -> bool:
    """Whether stdout takes every character."""
    return "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()


def token_text(token: str) -> str:
    """A token as it can be shown: line ends as signs, nothing that steers a terminal."""
    return printable(token.replace("\n", "\u2424" if shows_unicode() else "\\n"))


def scored_tokens(tokens: Sequence[str], scores: Sequence[float]) -> Text:
    """The tokens of an example, green where they help and red where they harm, the stronger the farther from 0."""
    largest = max((abs(score) for score in scores), default=0.0)
    text = Text(overflow="fold")
    for token, score in zip(tokens, scores, strict=True):
        share = abs(score) / largest if largest else 0.0
        style = "" if share < 0.1 else ("green" if score > 0 else "red") + (" bold" if share > 0.5 else "")
        text.append(token_text(token), style=style)
    return text


def mask_legend(colours: bool) -> str:
    """How `masked_tokens` tells what is trained on."""
    return "green: trained on; grey: context" if colours else "[trained on] (context)"


def masked_tokens(tokens: Sequence[str], label: Sequence[bool], colours: bool) -> Text:
    """The tokens of an example, those that are trained on told from the others.

    Args:
        tokens: the text of each.
        label: which are trained on.
        colours: tell by colour, neighbours in two shades; else by brackets around each token.
    """
    text = Text(overflow="fold")
    for place, (token, trained) in enumerate(zip(tokens, label, strict=True)):
        shown = token_text(token)
        if colours:
            text.append(
                shown, style=("green", "bright_green")[place % 2] if trained else ("bright_black", "white")[place % 2]
            )
        else:
            text.append(f"[{shown}]" if trained else f"({shown})")
    return text
