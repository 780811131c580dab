"""`dpg select SCORES`: from scores to data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.errors import UsageError


def select(
    scores: Annotated[Path, typer.Argument(help="What `dpg attribute` wrote: .parquet, .jsonl or .csv.")],
    drop: Annotated[int, typer.Option(min=0, help="Leave out the most harmful so many examples.")] = 0,
    keep: Annotated[int, typer.Option(min=0, help="Keep the most helpful so many, and nothing else.")] = 0,
    weight: Annotated[
        float,
        typer.Option(
            min=0,
            help="Keep all, with a column `weight` = max(0, 1 + WEIGHT score / largest score), for a trainer that reads it.",
        ),
    ] = 0.0,
    side: Annotated[
        str,
        typer.Option(help="Who goes first: harmful; or helpful, where the metric is what you want to be rid of."),
    ] = "harmful",
    query: Annotated[str, typer.Option(help="Whose scores count, where there are several queries.")] = "",
    data: Annotated[
        str, typer.Option(help="The rows that the scores are of, where they are not where they were.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Where the rows go, in the format of the data; NAME-selected.ENDING by default."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier selection.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write your data back without the rows that harm, in its own format: what stays is there byte for byte.

    `dpg verify` of the new file then fine-tunes on both, by stock PyTorch, and puts the measured change beside the predicted.

    Examples:

        dpg select scores.parquet --drop 50

        dpg select scores.parquet --keep 1000 --out best.jsonl

        dpg select scores.parquet --drop 100 --side helpful --query insults
    """
    from dpg_cli.cli.tokens import shows_unicode
    from dpg_cli.escape import pasted
    from dpg_cli.selection.choice import Wish
    from dpg_cli.selection.select import select as run_selection

    if side not in ("harmful", "helpful"):
        raise UsageError(f"--side {side} is no side.", "Give harmful or helpful.")
    wish = Wish(drop, keep, weight, side, query)  # type: ignore[arg-type]
    found = run_selection(scores, wish, data=data, out=out, overwrite=overwrite)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2, ensure_ascii=not shows_unicode()))
        return
    gone = found.rows - found.kept
    which = "lowest-scored, whose weight lowers phi" if side == "harmful" else "highest-scored, whose weight raises phi"
    typer.echo(
        f"{found.out}: {found.kept:,} of {found.rows:,} rows"
        + (f", the {gone:,} {which}, left out" if gone else f", weighed, the {which}, least")
    )
    for name, change in found.choice.predicted.items():
        typer.echo(f"  {name}: predicted change of phi {change:+.4g}, to first order")
    typer.echo(f"Next: dpg verify {pasted(found.out)}")
