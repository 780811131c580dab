"""`dpg report RUN`, `dpg report SCORES`: a run, or an attribution, as one self-contained page."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.errors import UsageError


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not; or the scores of an attribution.")],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; RUN/report.html, or SCORES with .html, by default.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write the report of a run: did it work, the picture, curves, the data token by token, how to repeat it.

    Of scores that `dpg attribute` wrote: for each question its most helpful and most harmful examples token by token, repetitions
    folded, a histogram, search, and what leaving the top of them out is predicted to do.

    The page is one file that asks for nothing from outside. `dpg run` and `dpg verify` write it too.

    Examples:

        dpg report runs/qr-embed-001 --open

        dpg report scores.parquet --open
    """
    from dpg_cli.attribution.page import write_page
    from dpg_cli.report import write_report
    from dpg_cli.runs.folder import RunFolder

    scores = run if run.is_file() else None
    if scores is not None and out is None and scores.with_suffix(".html").exists() and not overwrite:
        raise UsageError(f"{scores.with_suffix('.html')} exists already.", "Give another name, or --overwrite.")
    if out is not None and out.is_dir():
        raise UsageError(f"--out {out} is a folder.", "Name a file, such as report.html.")
    if out is not None and scores is not None and out.exists() and out.samefile(scores):
        raise UsageError(f"--out {out} would write onto the scores.", "Name another file.")
    if out is not None and out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists already.", "Give another name, or --overwrite.")
    try:
        page = write_report(RunFolder.open(run), out) if scores is None else write_page(scores, out)
    except OSError as error:
        raise UsageError(f"The page cannot be written: {error.strerror or error}.", "Give another --out.") from None
    typer.echo(json.dumps({"report": str(page), "bytes": page.stat().st_size}) if as_json else f"{page}")
    if open_page:
        webbrowser.open(page.resolve().as_uri())
