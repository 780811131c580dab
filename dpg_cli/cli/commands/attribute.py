"""`dpg attribute DATA`: which of your fine-tuning examples help a metric, and which harm it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dpg_cli.errors import UsageError

if TYPE_CHECKING:
    from dpg_cli.attribution.attribute import Attribution, Ranked

PLAIN_SECONDS = 10.0  # between two plain lines of progress


def attribute(
    data: Annotated[
        str,
        typer.Argument(
            help="Your examples: a text, JSONL or parquet file (FILE:COLUMN), a datasets folder, or a hub dataset; "
            "rows with `messages` in a JSONL or parquet file are read through the target's chat template."
        ),
    ],
    target: Annotated[str, typer.Option(help="The model to fine-tune: a folder, a hub name, tiny or prose.")] = "tiny",
    metric: Annotated[str, typer.Option(help="text-loss, pattern or norm.")] = "text-loss",
    language: Annotated[
        str | None, typer.Option(help="text-loss on held-out sentences of the embedded world: en, es, de, fr or it.")
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="text-loss on these held-out texts: a source as DATA.")] = None,
    out: Annotated[Path, typer.Option(help="Where the scores go.")] = Path("scores.parquet"),
    prompts: Annotated[
        str, typer.Option(help="What stands before each example and is not trained on: a source of as many texts.")
    ] = "",
    memory: Annotated[
        str | None, typer.Option(help="States of the fine-tuning: keep, sqrt (recompute) or offload (to disk).")
    ] = None,
    micro_batch: Annotated[
        int, typer.Option(min=0, help="Examples in memory at once; 0 takes about 4,096 tokens.")
    ] = 0,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bf16: linear maps in bfloat16, all else in float32.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Cut examples to so many tokens.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many examples; 0 takes all.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Rows of the tables.")] = 5,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example inner.lr=1e-5 or metric.documents=64.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which the examples are trained on.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune the target on your data once, and give the exact derivative of the metric by each example and token.

    A positive score helps the metric. The scores of all examples go to --out; the extremes are shown.

    Examples:

        dpg attribute sft.jsonl:completion --prompts sft.jsonl:prompt --target ./model --eval-text heldout.txt

        dpg attribute chats.jsonl:messages --target ./instruct-model --eval-text heldout.txt --memory sqrt

        dpg attribute notes.txt --language es --set inner.lr=1e-5
    """
    from dpg_cli.attribution.attribute import DEFAULTS
    from dpg_cli.attribution.attribute import attribute as run_attribution
    from dpg_cli.settings.presets import merge, resolve

    options: dict[str, Any] = {"name": metric}
    if language is not None:
        options["language"] = language
    if eval_text is not None:
        options["file"] = eval_text
    if metric == "text-loss" and not (language or eval_text) and not any("metric." in text for text in overrides or []):
        raise UsageError("There is no held-out text to measure on.", "Give --eval-text or --language.")
    inner = {"states": memory, "max_length": max_length, "precision": precision}
    flags = {
        "seed": seed,
        "device": device,
        "models": {"target": target},
        "metric": options,
        "inner": {key: value for key, value in inner.items() if value is not None},
    }
    config = resolve(merge(DEFAULTS, {"metric": {"name": metric}}), overrides or [], flags)
    with _Display() as display:
        result = run_attribution(
            config,
            data,
            out,
            prompts=prompts,
            limit=limit,
            micro_batch=micro_batch,
            top=top,
            on_stage=display.stage,
            on_progress=display.progress,
        )
    if as_json:
        typer.echo(json.dumps({"scores": str(out), **asdict(result)}, indent=2, ensure_ascii=False))
    else:
        _show(result, out)


class _Display:
    """Stages and progress on stderr; a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.started = self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> _Display:
        if self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}")
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.console.print(f"{time.monotonic() - self.started:6.0f} s  {name}")

    def progress(self, phase: str, done: int, total: int) -> None:
        """An inner step is done, forward or in reverse."""
        name = {"forward": "fine-tuning", "reverse": "attributing"}[phase]
        if self.bar is not None:
            if phase not in self.tasks:
                self.tasks[phase] = self.bar.add_task(name, total=total)
            self.bar.update(self.tasks[phase], completed=done)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self.console.print(f"{self.last_line - self.started:6.0f} s  {name}: step {done} of {total}")


def coloured(example: Ranked) -> Text:
    """The tokens of an example, green where they help and red where they harm, the stronger the farther from 0."""
    largest = max((abs(score) for score in example.token_scores), default=0.0)
    text = Text(overflow="fold")
    for token, score in zip(example.tokens, example.token_scores, strict=True):
        share = abs(score) / largest if largest else 0.0
        style = "" if share < 0.1 else ("green" if score > 0 else "red") + (" bold" if share > 0.5 else "")
        text.append(token.replace("\n", "\u2424"), style=style)
    return text


def _show(result: Attribution, out: Path) -> None:
    """The tables and the summary, on stdout."""
    console = Console(highlight=False)
    for title, rows in (("Most helpful", result.helpful), ("Most harmful", result.harmful)):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("example", justify="right")
        table.add_column("score", justify="right")
        table.add_column("tokens")
        for row in rows:
            table.add_row(str(row.example_id), f"{row.score:+.3e}", coloured(row))
        console.print(table)
        console.print()
    measures = ", ".join(f"{name} {value:.4g}" for name, value in result.measures.items())
    console.print(f"Metric: {result.metric}. Φ {result.value_before:.4f} -> {result.value:.4f} ({measures}).")
    if result.cut:
        console.print(f"{result.cut:,} examples were cut to the longest length.")
    if result.precision_error is not None:
        console.print(f"bf16: token scores of the first step are {result.precision_error:.1%} off those of float32.")
    memory = "" if result.peak_memory_mb is None else f", {result.peak_memory_mb:,.0f} MB at the peak"
    console.print(
        f"{result.examples:,} examples in {result.inner_steps:,} steps, {result.seconds:.0f} s{memory}. Scores: {out}"
    )
