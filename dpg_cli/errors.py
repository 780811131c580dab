"""The errors that a user can cause or meet, each with its cause and its remedy.

The command line maps every `DpgError` to one line on stderr and to its exit code, in one place (`dpg_cli.cli`).
Anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_FAULTS = 20  # shown in one message


class DpgError(Exception):
    """Base of all expected errors.

    Args:
        cause: what is wrong, in one sentence, naming the offending value.
        remedy: what the user can do about it, in one sentence; may be empty.
    """

    exit_code = 2

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause} {remedy}".strip())
        self.cause = cause
        self.remedy = remedy


class UsageError(DpgError):
    """Bad input: an argument, a file or a combination of settings. Exit code 2."""


class BadValueError(UsageError, ValueError):
    """An argument of a library call has the right type and a wrong value."""


class BadTypeError(UsageError, TypeError):
    """An argument of a library call is of another kind than what is needed."""


class ConfigError(UsageError):
    """One or several faults in the settings, reported together.

    Args:
        faults: one line for each fault, as `key: what is wrong`.
    """

    def __init__(
        self, faults: list[str], remedy: str = "See `dpg presets show qr-embed` for the keys and their defaults."
    ) -> None:
        self.faults = list(faults)
        first = "; ".join(self.faults[:MOST_FAULTS])
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        end = "" if f"{first}{more}".endswith("?") else "."
        super().__init__(f"{first}{more}{end}", remedy)


def one_line(text: str) -> str:
    """A message on one line, without control characters that could come from a user's file."""
    return "".join(character if character.isprintable() else " " for character in text)


class InterruptedRunError(DpgError):
    """The user stopped a run. Exit code 130."""

    exit_code = 130


class DegenerateError(DpgError):
    """Training became non-finite or its reward says nothing. Exit code 3."""

    exit_code = 3


class VerificationError(DpgError):
    """An effect could not be confirmed by independent means. Exit code 4."""

    exit_code = 4


class LostProcessError(DpgError):
    """Another process of a run on several ended, or cannot be reached. Exit code 5.

    Args:
        reason: what the connection said.
        remedy: what the user can do about it.
    """

    exit_code = 5

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(
            f"Another process of this run ended, or cannot be reached ({reason[:200].rstrip('.')}).", remedy
        )
        self.reason = reason


MOST = 24  # names that a remedy lists


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """A remedy for an unknown name.

    Args:
        name: what was given.
        known: what there is.
        otherwise: what stands before the list of `known` when none of them is near.

    Returns:
        "Did you mean x?", or the first few of `known`.
    """
    names = list(dict.fromkeys(known))
    near = get_close_matches(name, names, n=2, cutoff=0.6)
    near = near or [other for other in names if name and other.startswith(f"{name}.")]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    shown = ", ".join(names[:MOST])
    return f"{otherwise}: {shown or 'nothing'}{', ...' if len(names) > MOST else '.'}"
