"""What target metrics there are: built-in ones, and the entry points of installed packages."""

from __future__ import annotations

from dataclasses import dataclass

from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import summary_of
from dpg_cli.metrics.custom import Reference, installed, load, option_names, package
from dpg_cli.settings.config import NormOptions, PatternOptions, Section, TextLossOptions

BUILT_IN: dict[str, type[Section]] = {"pattern": PatternOptions, "norm": NormOptions, "text-loss": TextLossOptions}


@dataclass(frozen=True)
class Entry:
    """One metric.

    Attributes:
        name: as settings and --metric name it.
        source: `built-in`, or the package that brings it.
        about: in one line; why it cannot be loaded, where it cannot.
        options: names of what it takes.
    """

    name: str
    source: str
    about: str
    options: list[str]


def catalogue() -> list[Entry]:
    """All metrics. Loads the installed ones; one that fails is listed with its reason."""
    entries = [
        Entry(name, "built-in", summary_of(options), [key for key in options.model_fields if key != "name"])
        for name, options in BUILT_IN.items()
    ]
    for point in installed():
        try:
            make = load(Reference(None, point.name)).make
            about, options = summary_of(make), list(option_names(make))
        except UsageError as error:
            about, options = f"cannot be loaded: {error.cause}", []
        entries.append(Entry(point.name, package(point), about, options))
    return entries
