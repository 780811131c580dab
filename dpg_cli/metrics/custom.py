"""Metrics of the user's own: a file that `--metric FILE.py:Name` names, or an entry point of an installed package.

A file is run only when the user names it on the command line. What settings, presets and run folders say is a record: it
tells what was run, and the sha256 tells whether the file has changed since. Entry points (group `dpg.metrics`) were installed
by the user, so a settings file may name them. `load` finds the factory, `trial` tries the metric once before anything is spent.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError, suggestion
from dpg_cli.escape import pasted

GROUP = "dpg.metrics"
MODULE = "dpg_user_metric"
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Reference:
    """What `--metric` or a settings file names.

    Attributes:
        file: a Python file, absolute; None for an entry point.
        name: of the class or function in it, or of the entry point.
    """

    file: Path | None
    name: str

    def __str__(self) -> str:
        return self.name if self.file is None else f"{self.file}:{self.name}"


@dataclass(frozen=True)
class Factory:
    """A metric's class or function, found and loaded but not called.

    Attributes:
        reference: where it came from.
        make: called as make(target, **options).
        source: the file's bytes, exactly those that were run; None for an entry point.
        origin: in words, for run.json.
    """

    reference: Reference
    make: Callable[..., Any]
    source: bytes | None
    origin: str

    @property
    def sha256(self) -> str:
        """Of the file; empty for an entry point."""
        return "" if self.source is None else hashlib.sha256(self.source).hexdigest()


def parse_reference(text: str, what: str = "--metric") -> Reference:
    """`FILE.py:Name`, or the name of an entry point.

    Args:
        text: the reference.
        what: the flag or setting that it comes from.

    Raises:
        UsageError: if it is neither, naming what the file defines.
    """
    place, colon, name = text.rpartition(":")
    if colon and place.endswith(".py"):
        if not name.isidentifier():
            raise UsageError(f"{what} {text!r} names no class or function after the colon.", _defined(Path(place)))
        return Reference(_absolute(place), name)
    if text.endswith((".py", ".py:")):
        raise UsageError(f"{what} {text!r} does not say which metric of the file.", _defined(Path(text.rstrip(":"))))
    if not text or colon or "/" in text or "\\" in text:
        raise UsageError(
            f"{what} {text!r} is neither FILE.py:Name nor the name of a metric.", "`dpg metrics list` shows the names."
        )
    return Reference(None, text)


def _absolute(place: str) -> Path:
    return Path(place).expanduser().absolute()


def _defined(path: Path) -> str:
    """A remedy: what can be named in a file, from its syntax alone."""
    try:
        tree = ast.parse(path.expanduser().read_bytes())
    except (OSError, SyntaxError, ValueError):
        return "For example: --metric mine.py:Mine."
    kinds = (ast.ClassDef, ast.FunctionDef)
    names = [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    return (
        f"Give one of: {', '.join(f'--metric {pasted(str(path))}:{name}' for name in names)}"
        if names
        else "It defines no class or function."
    )


def read_source(path: Path) -> bytes:
    """The bytes of a metric file.

    Raises:
        UsageError: if it cannot be read, or is larger than 1 MB.
    """
    try:
        if not path.is_file():
            raise UsageError(f"There is no metric file {path}.", "Check the path before the colon.")
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than 1 MB and can be no metric.", "Name a Python file.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"The metric file {path} cannot be read: {reason}.", "Check the path.") from None


def digest(reference: Reference) -> str:
    """sha256 of a reference's file; empty for an entry point."""
    return "" if reference.file is None else hashlib.sha256(read_source(reference.file)).hexdigest()


def load(reference: Reference) -> Factory:
    """Import the class or function. The caller has made sure that the user asked for it.

    Raises:
        UsageError: if it is missing, or its module raises.
    """
    return _from_entry_point(reference) if reference.file is None else _from_file(reference, reference.file)


def _from_file(reference: Reference, path: Path) -> Factory:
    """Run a file's bytes as a module of their own."""
    source = read_source(path)
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None:
        raise UsageError(f"{path} is no Python file.", "Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses and pickling look their module up
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script's exit is not ours
        raise UsageError(
            f"The metric file {path} raised {said(error)} while it was loaded.", "Correct it; --debug shows where."
        ) from error
    if not hasattr(module, reference.name):
        known = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == MODULE]
        raise UsageError(f"{path} has no {reference.name!r}.", suggestion(reference.name, known, "It defines"))
    return Factory(reference, _callable(reference, getattr(module, reference.name)), source, str(reference))


def installed() -> list[EntryPoint]:
    """Entry points of the group, by name."""
    return sorted(entry_points(group=GROUP), key=lambda point: point.name)


def _from_entry_point(reference: Reference) -> Factory:
    """Load an installed metric by name."""
    points = installed()
    found = [point for point in points if point.name == reference.name]
    if not found:
        raise UsageError(
            f"No installed package has a metric {reference.name!r}.",
            suggestion(reference.name, [point.name for point in points], "Installed")
            + " A file is named as --metric FILE.py:Name.",
        )
    if len({point.value for point in found}) > 1:
        raise UsageError(
            f"Several packages have a metric {reference.name!r}: {', '.join(map(package, found))}.",
            "Remove all but one.",
        )
    try:
        make = found[0].load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UsageError(
            f"The metric {reference.name!r} of {package(found[0])} raised {said(error)} while it was loaded.",
            "Correct or reinstall that package; --debug shows where.",
        ) from error
    return Factory(reference, _callable(reference, make), None, f"{found[0].value} of {package(found[0])}")


def package(point: EntryPoint) -> str:
    """Name and version of the package that an entry point belongs to."""
    return "an unknown package" if point.dist is None else f"{point.dist.name} {point.dist.version}"


def _callable(reference: Reference, make: Any) -> Callable[..., Any]:
    if not callable(make):
        raise UsageError(
            f"{reference} is no class or function, but a {type(make).__name__}.", "Name what makes the metric."
        )
    return make


def option_names(make: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options that a factory takes: its parameters after the target. Empty where Python cannot tell."""
    try:
        parameters = list(inspect.signature(make).parameters.values())
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {parameter.name: parameter for parameter in parameters[1:] if parameter.kind not in kinds}


def check_call(factory: Factory, target: Any, options: Mapping[str, Any]) -> None:
    """Refuse options that the factory does not take.

    Raises:
        UsageError: naming the options that it takes.
    """
    try:
        inspect.signature(factory.make).bind(target, **options)
    except ValueError:  # no signature to be had
        return
    except TypeError as error:
        known = option_names(factory.make)
        unknown = [name for name in options if name not in known]
        if unknown and known:
            cause, remedy = f"takes no option {unknown[0]!r}", suggestion(unknown[0], list(known), "It takes")
        elif unknown:
            cause, remedy = (
                f"takes no option {unknown[0]!r}",
                "Leave it out: it must be callable as NAME(target, **options).",
            )
        else:
            cause = f"cannot be called as NAME(target, **options): {error}"
            remedy = "Give what is missing by --set metric.options.KEY=VALUE, or correct its signature."
        raise UsageError(f"The metric {factory.reference} {cause}.", remedy) from None


def said(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300].rstrip('.')}" if text else type(error).__name__
