"""`dpg export dataset|generator|target|image|metrics`: carry a run's results away, marked for what they are."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Carry a run's dataset, models, picture or log away, with a card that says what they are.",
    no_args_is_help=True,
)
Run = Annotated[Path, typer.Argument(help="A finished run folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")]
PROGRESS_SECONDS = 5.0  # between two lines


@app.command()
def dataset(
    run: Run,
    out: Annotated[Path, typer.Option(help="A file (.jsonl, .parquet), or a folder: a name without such an ending.")],
    format: Annotated[
        str, typer.Option(help="jsonl, parquet, datasets (load_from_disk), or chat (messages, for SFT trainers).")
    ] = "jsonl",
    source: Annotated[
        str, typer.Option(help="train: the generator's text; control: the untrained generator's.")
    ] = "train",
    n: Annotated[
        int | None, typer.Option("--n", help="Sample so many new examples from the generator instead.")
    ] = None,
    split: Annotated[
        float | None, typer.Option(help="Share of the rows to hold out: 0.1 writes train and test.")
    ] = None,
    min_reward: Annotated[float | None, typer.Option(help="Only rows with at least this reward.")] = None,
    seed: Annotated[int, typer.Option(help="Of new examples and of the split.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...; for --n.")] = "auto",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the synthetic dataset with its data card; the same seed gives the same files.

    Every row and file says that it is synthetic and made to steer a model.

    Examples:

        dpg export dataset runs/mine --format chat --out mine.jsonl

        dpg export dataset runs/mine --format datasets --split 0.1 --out mine

        dpg export dataset runs/mine --format parquet --n 100000 --seed 1 --out more.parquet
    """
    from dpg_cli.export.dataset import DatasetRequest, export_dataset
    from dpg_cli.runs.folder import RunFolder

    request = DatasetRequest(format, out, source, n, split, min_reward, seed, overwrite, device)
    exported = export_dataset(RunFolder.open(run), request, _Progress())
    rows = ", ".join(f"{name} {count:,}" for name, count in exported.rows.items())
    _said(
        {"out": str(exported.out), "card": str(exported.card), "rows": exported.rows, "note": exported.note},
        f"{exported.out}: {rows} rows. Card: {exported.card}" + (f" {exported.note}" if exported.note else ""),
        as_json,
    )


@app.command()
def generator(
    run: Run,
    out: Annotated[Path, typer.Option(help="A folder.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy the trained generator, with a model card.

    Example: dpg export generator runs/mine --out my-generator
    """
    _model(run, "generator", out, overwrite, as_json)


@app.command()
def target(
    run: Run,
    out: Annotated[Path, typer.Option(help="A folder.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy the fine-tuned target, with a model card.

    Example: dpg export target runs/mine --out my-target
    """
    _model(run, "target", out, overwrite, as_json)


@app.command()
def image(
    run: Run,
    out: Annotated[Path, typer.Option(help="A .png file.")],
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Copy the picture of the LM head; others are drawn by `dpg inspect RUN --render`.

    Example: dpg export image runs/mine --out head.png
    """
    from dpg_cli.export.artefacts import export_image
    from dpg_cli.runs.folder import RunFolder

    export_image(RunFolder.open(run), out, overwrite)
    _said({"out": str(out)}, str(out), as_json)


@app.command()
def metrics(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    out: Annotated[Path, typer.Option(help="A file.")],
    format: Annotated[str | None, typer.Option(help="jsonl, csv or parquet; by default what --out ends in.")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write the log of the outer steps as a table.

    Example: dpg export metrics runs/mine --out log.csv
    """
    from dpg_cli.export.artefacts import export_metrics
    from dpg_cli.runs.folder import RunFolder

    steps = export_metrics(RunFolder.open(run), out, format, overwrite)
    _said({"out": str(out), "steps": steps}, f"{out}: {steps:,} outer steps", as_json)


def _model(run: Path, role: str, out: Path, overwrite: bool, as_json: bool) -> None:
    """Copy one of the two models."""
    from dpg_cli.export.artefacts import export_model
    from dpg_cli.runs.folder import RunFolder

    files = export_model(RunFolder.open(run), role, out, overwrite)
    _said({"out": str(out), "files": files}, f"{out}: {len(files)} files", as_json)


def _said(data: dict[str, object], line: str, as_json: bool) -> None:
    """The result on stdout."""
    from dpg_cli.escape import printable

    typer.echo(json.dumps(data, indent=2) if as_json else printable(line))


class _Progress:
    """Lines on stderr: at the beginning, then every few seconds."""

    def __init__(self) -> None:
        self.last = float("-inf")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last >= PROGRESS_SECONDS:
            self.last = now
            typer.echo(f"{done:,} of {total:,} rows", err=True)
