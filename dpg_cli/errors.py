"""The errors that a user can cause or meet, each with its cause and its remedy.

The command line maps every `DpgError` to one line on stderr and to its exit code, in one place (`dpg_cli.cli`).
Anything else that is raised is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

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


class ConfigError(UsageError):
    """One or several faults in the settings, reported together.

    Args:
        faults: one line for each fault, as `key: what is wrong`.
    """

    def __init__(
        self, faults: list[str], remedy: str = "See `dpg presets show` for the keys and their defaults."
    ) -> None:
        self.faults = list(faults)
        first = "; ".join(self.faults[:MOST_FAULTS])
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        super().__init__(f"{first}{more}.", remedy)


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
