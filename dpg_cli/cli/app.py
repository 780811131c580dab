"""The Typer application and its commands' registration. Imports no torch: each command imports what it needs."""

from __future__ import annotations

from typing import Annotated

import typer

from dpg_cli import __version__
from dpg_cli.cli.commands import (
    attribute,
    check,
    export,
    inspect,
    metrics,
    presets,
    report,
    resume,
    run,
    select,
    verify,
)

app = typer.Typer(
    name="dpg",
    help="Dataset Policy Gradient: train a generator whose synthetic data does exactly what you ask to the model fine-tuned on it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 ok, 2 bad input, 3 degenerate training, 4 verification failed, 5 a process of several was lost, "
    "130 interrupted. "
    "--debug shows the traceback of an error.",
)
app.command("run")(run.run)
app.command("resume")(resume.resume)
app.command("check")(check.check)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.add_typer(export.app, name="export")
app.command("attribute")(attribute.attribute)
app.command("select")(select.select)
app.add_typer(presets.app, name="presets")
app.add_typer(metrics.app, name="metrics")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"dpg {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options of the program itself."""
