"""`dpg metrics list`: the built-in target metrics, and those that installed packages bring."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(help="List target metrics.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """List target metrics."""


@app.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the built-in metrics, and the installed ones for `dpg run custom --metric NAME`, with their options.

    Example: dpg metrics list
    """
    from dpg_cli.metrics.catalogue import catalogue

    entries = catalogue()
    if as_json:
        typer.echo(json.dumps([vars(entry) for entry in entries], indent=2))
        return
    table = Table("metric", "source", "what it is", "options", box=None, pad_edge=False)
    for entry in entries:
        table.add_row(*map(escape, (entry.name, entry.source, entry.about, ", ".join(entry.options))))
    Console().print(table)
