"""`dpg report RUN`: the run as one self-contained page."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the report of a run: did it work, the picture, curves, the data token by token, how to repeat it.

    The page is one file that asks for nothing from outside. `dpg run` and `dpg verify` write it too.

    Example: dpg report runs/qr-embed-001 --open
    """
    from dpg_cli.report import write_report
    from dpg_cli.runs.folder import RunFolder

    folder = RunFolder.open(run)
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder.", "Name a file, such as report.html.")
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists already.", "Give another name, or --overwrite.")
    try:
        page = write_report(folder, out)
    except OSError as error:
        raise UsageError(f"The page cannot be written: {error.strerror or error}.", "Give another --out.") from None
    typer.echo(json.dumps({"report": str(page), "bytes": page.stat().st_size}) if as_json else f"{page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
