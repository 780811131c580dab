"""Optimisers that people name and that are not followed, each with the reason. Free of torch."""

from __future__ import annotations

import re

ROUNDED = (
    "its states are rounded to a few bits at every step: rounding has no derivative, and exact states are another run"
)
REASONS = (  # (names, why): the first that matches decides
    (r"8bit|8_bit|4bit|int8|fp8", ROUNDED),
    (
        r"lion|signsgd|sign_sgd|signum",
        "its update is the sign of a momentum: the derivative is zero almost everywhere, and so would every score be",
    ),
    (
        r"adafactor|adalomo|^came",
        "it divides by factored second moments and by the size of its own update, whose derivative is not written here",
    ),
    (
        r"galore|apollo",
        "it projects gradients onto a basis that is drawn or decomposed anew: no derivative through that",
    ),
    (r"schedule_?free", "it is evaluated at another point than it trains at, which is not written here"),
    (r"lomo", "it updates during the backward pass and scales by a norm of its own"),
)


def why_not(name: str) -> str:
    """Why an optimiser is not followed; nothing where there is no more to say than that it is not known."""
    return next((why for names, why in REASONS if re.search(names, name.lower())), "")
