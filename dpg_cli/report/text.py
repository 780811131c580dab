"""Text of a run made safe to show: it may steer neither a terminal, nor the direction of writing, nor the encoder."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t"
_BIDI = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """The text with U+FFFD for each control character, lone surrogate, unassigned code point and mark of direction.

    HTML is not escaped here: the template and the charts do that.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if c not in _KEPT and (unicodedata.category(c) in ("Cc", "Cs", "Cn") or c in _BIDI) else c
        for c in text
    )
