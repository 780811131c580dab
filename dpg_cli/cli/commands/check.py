"""`dpg check`: the settings of `dpg run`, measured for about a minute instead of run."""

from __future__ import annotations

import inspect
import json
import sys
from functools import partial
from typing import Annotated, Any

import typer

from dpg_cli.cli.commands.run import run
from dpg_cli.cli.settings import OPTIONS, settings_of
from dpg_cli.errors import DegenerateError


def check(
    *,
    completions: Annotated[int, typer.Option(min=2, help="Completions to measure on, at most an outer step's.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **settings: Any,
) -> None:
    """Before hours are spent: can these settings learn? Takes the settings of `dpg run`; writes nothing.

    Each check has a measured number, a verdict (ok, warn, fail) and the setting to change. Exit code 0 when no check
    fails, else 3.

    Examples:

        dpg check qr-embed --text "HELLO WORLD"

        dpg check language-rephrase --language de --set inner.lr=1e-3
    """
    from dpg_cli.driver.build import build
    from dpg_cli.evidence.check import check as measure
    from dpg_cli.settings.config import settle

    config = settle(settings_of(settings))
    make = partial(build, named_metric=settings["metric"])
    report = measure(config, make=make, completions=completions, on_stage=_stage)
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        for line in report.lines():
            typer.echo(line)
    if not report.learnable:
        names = ", ".join(finding.name for finding in report.failures)
        remedies = " ".join(dict.fromkeys(finding.remedy for finding in report.failures if finding.remedy))
        raise DegenerateError(f"{report.task} cannot learn with these settings: {names}.", f"Try {remedies}.")


def _stage(name: str) -> None:
    """Progress."""
    sys.stderr.write(f"{name}\n")


def _with_options_of_run() -> inspect.Signature:
    """The options of `dpg run` that make its settings, and those of `dpg check`."""
    own = inspect.signature(check, eval_str=True)
    shared = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(run, eval_str=True).parameters.items()
        if name in OPTIONS
    ]
    kept = [parameter for parameter in own.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    return own.replace(parameters=[*shared, *kept])


check.__signature__ = _with_options_of_run()  # type: ignore[attr-defined]
