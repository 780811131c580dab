"""`dpg inspect dataset A B`: how well can two datasets be told apart?"""

from __future__ import annotations

import json
from pathlib import Path

import typer

from dpg_cli.errors import UsageError
from dpg_cli.escape import printable


def compare(names: list[str], tokenizer: str | None, reader: str | None, device: str, as_json: bool) -> None:
    """Compare two datasets and print the judgement.

    Args:
        names: of the two; or of one run, for its data and control.
        tokenizer: a model whose tokens their texts are compared in; None takes their own token ids.
        reader: a model that reads their texts; None for none.
        device: where it reads.
        as_json: print JSON.

    Raises:
        UsageError: for more than two, or what cannot be read.
    """
    from dpg_cli.cli.stages import Stages
    from dpg_cli.evidence.fluency.rows import read_pair
    from dpg_cli.evidence.fluency.run import judge_files, tokenized
    from dpg_cli.evidence.stock import Watcher
    from dpg_cli.models.loading import load, pick_device

    one, other = _files(names)
    with Stages() as stages:
        words = load(tokenizer, device=pick_device("cpu")) if tokenizer else None
        judge = load(reader, device=pick_device(device)) if reader else None
        sides = read_pair(one, other, None if words is None else lambda texts: tokenized(words, texts))
        if judge is not None and not all(any(side.texts) for side in sides):
            raise UsageError(
                "The datasets hold no texts for --reader to read.", "Leave it out, or name files with a text column."
            )
        found = judge_files(*sides, judge, Watcher(stages.stage, stages.progress))
    if as_json:
        typer.echo(json.dumps({"first": one, "second": other, **found.as_dict()}, indent=2))
        return
    typer.echo(printable(f"first: {one} ({sides[0].rows:,} rows); second: {other} ({sides[1].rows:,} rows)", 1000))
    for line in found.lines("first", "second"):
        typer.echo(printable(line, 1000))


def _files(names: list[str]) -> tuple[str, str]:
    """The two files that are meant."""
    if len(names) == 1 and (Path(names[0]) / "config.toml").is_file():
        folder = Path(names[0]) / "dataset"
        return str(folder / "train.parquet"), str(folder / "control.parquet")
    if len(names) != 2:
        raise UsageError(
            f"{len(names)} datasets are given; two are compared.",
            "Give a run for its data and control, or two datasets: dpg inspect dataset A B",
        )
    files = [
        str(Path(name) / "dataset" / "train.parquet") if (Path(name) / "config.toml").is_file() else name
        for name in names
    ]
    return files[0], files[1]
