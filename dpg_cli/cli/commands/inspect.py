"""`dpg inspect PATH`: what a run, a checkpoint, a model folder or a safetensors file is. Everything from files is escaped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.cli.commands.inspect_dataset import compare
from dpg_cli.cli.look import Printer
from dpg_cli.errors import UsageError
from dpg_cli.escape import printable


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder, a checkpoint, a model folder or a safetensors file; or the word dataset and two datasets, or "
            "a run for its data and control: .parquet, .jsonl (FILE:COLUMN), run folders.",
            metavar="PATH",
        ),
    ],
    render: Annotated[Path | None, typer.Option(help="Draw the LM head into this PNG.")] = None,
    patch: Annotated[str | None, typer.Option(help="ROW,COL,ROWS,COLS: the part to draw; else the whole.")] = None,
    show: Annotated[
        str | None,
        typer.Option(help="before, after or difference; by default the difference, where a before is known."),
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of another matrix to draw.")] = None,
    samples: Annotated[int, typer.Option(help="Rows of the dataset to show, by highest and by lowest reward.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of two datasets: compare their texts, in the tokens of this model.")
    ] = None,
    reader: Annotated[str | None, typer.Option(help="Of two datasets: a model that reads their texts.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...; for --reader.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what PATH is: settings, parameters, history, samples, what happened to the LM head, whether it is finished.

    Nothing is unpickled and no code of the folder is run.

    With the word dataset before them, two datasets are compared: how well a classifier on token and bigram counts tells them
    apart, from one example and from a hundred, and with --reader what both cost that model.

    Examples:

        dpg inspect runs/mine

        dpg inspect runs/mine --render head.png --patch 0,0,64,64 --show difference

        dpg inspect model.safetensors --json

        dpg inspect dataset runs/mine

        dpg inspect dataset mine.jsonl theirs.parquet --tokenizer gpt2 --reader gpt2
    """
    drawing = render is not None or patch is not None or show is not None or tensor is not None
    if len(paths) > 1 and str(paths[0]) == "dataset":
        if drawing:
            raise UsageError("Datasets have no weights to draw.", "Leave --render and what goes with it out.")
        compare(list(map(str, paths[1:])), tokenizer, reader, device, as_json)
        return
    if len(paths) > 1:
        raise UsageError(f"{len(paths)} paths are given; one is looked at.", "Two datasets: dpg inspect dataset A B")
    if tokenizer or reader:
        raise UsageError("--tokenizer and --reader are for datasets.", "For example: dpg inspect dataset A B")
    path = paths[0]
    from dpg_cli.inspection.look import look

    if not 0 <= samples <= 1000:
        raise UsageError(f"--samples {samples} is out of range.", "Give 0 to 1000.")
    window = None if patch is None else _window(patch)
    if render is None and (patch is not None or show is not None or tensor is not None):
        raise UsageError("--patch, --show and --tensor say what to draw.", "Add --render FILE.png.")
    if render is not None:
        _check_png(render, path, overwrite)
    found = look(path, samples)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # terminals that lack the bars of a chart
        Printer().look(found)
    if render is not None:
        from dpg_cli.inspection.picture import draw
        from dpg_cli.patterns.render import save_png

        save_png(draw(path, show=show, window=window, tensor=tensor), render)
        typer.echo(printable(f"drawn: {render}"), err=True)


def _window(text: str) -> tuple[int, int, int, int]:
    """`ROW,COL,ROWS,COLS` as four numbers."""
    parts = text.replace(" ", "").split(",")
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"--patch {text!r} is not ROW,COL,ROWS,COLS.", "For example: --patch 0,0,64,64.")
    row, column, rows, columns = map(int, parts)
    return row, column, rows, columns


def _check_png(render: Path, path: Path, overwrite: bool) -> None:
    """Refuse a place for the picture before the work begins."""
    if render.suffix.lower() != ".png":
        raise UsageError(f"--render {render} does not end in .png.", "The picture is a PNG.")
    if render.exists() and (not overwrite or not render.is_file()):
        raise UsageError(f"{render} exists already.", "Give another name, or add --overwrite.")
    if path.is_dir() and render.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"{render} lies inside of what is inspected.", "Give a place outside of it.")
    if not render.resolve().parent.is_dir():
        raise UsageError(f"The folder of {render} does not exist.", "Make it first.")
