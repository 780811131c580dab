"""`dpg attribute DATA`: which of your fine-tuning examples help a metric, and which harm it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dpg_cli.cli.metric_flags import custom_settings, require_metric
from dpg_cli.cli.tokens import mask_legend, masked_tokens, scored_tokens, shows_unicode
from dpg_cli.errors import UsageError, one_line, suggestion
from dpg_cli.escape import printable

if TYPE_CHECKING:
    from dpg_cli.attribution.attribute import Attribution, Request
    from dpg_cli.settings.config import Config

RECIPE = "Recipe: how the target is fine-tuned"
PLAIN_SECONDS = 10.0  # between two plain lines of progress


def attribute(
    data: Annotated[
        str,
        typer.Argument(
            help="Your examples: a file (text, JSON, CSV, TSV, parquet; .gz, .zst, a pipe), a datasets folder (FOLDER#SPLIT) or a "
            "hub dataset; rows of text, prompt + completion, messages, or instruction + output; :COLUMN names one. docs/data.md."
        ),
    ],
    target: Annotated[str, typer.Option(help="The model to fine-tune: a folder, a hub name, tiny or prose.")] = "tiny",
    metric: Annotated[
        str,
        typer.Option(help="text-loss, pattern, norm; or your own: FILE.py:Name, which is run, or an installed one."),
    ] = "text-loss",
    language: Annotated[
        str | None, typer.Option(help="text-loss on held-out sentences of the embedded world: en, es, de, fr or it.")
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="text-loss on these held-out texts: a source as DATA.")] = None,
    out: Annotated[
        Path, typer.Option(help="Where the scores go: a name that ends in .parquet, .jsonl or .csv.")
    ] = Path("scores.parquet"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier scores.")] = False,
    show: Annotated[
        int, typer.Option(min=0, help="Print the first so many rows as tokens, with what is trained on, and stop.")
    ] = 0,
    prompts: Annotated[
        str, typer.Option(help="What stands before each example and is not trained on: a source of as many rows.")
    ] = "",
    train_on: Annotated[
        str,
        typer.Option(
            help="auto: a text, a completion, the assistant's turns; last: the last of those turns; all: everything."
        ),
    ] = "auto",
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
    keep: Annotated[str, typer.Option(help="Which end of a longer example stays: start or end.")] = "start",
    limit: Annotated[int, typer.Option(min=0, help="Only the first so many rows; 0 takes all.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Rows of the tables.")] = 5,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example inner.lr=1e-5 or metric.documents=64.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="How you trained: YAML or JSON of TRL, the transformers Trainer, axolotl or torchtune. docs/recipes.md.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=RECIPE)] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples of a batch.", rich_help_panel=RECIPE)] = None,
    accumulation: Annotated[
        int | None, typer.Option(min=1, help="Batches of an optimiser step.", rich_help_panel=RECIPE)
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.", rich_help_panel=RECIPE)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="constant, linear, cosine, restarts, polynomial, inverse-sqrt or stable-decay.", rich_help_panel=RECIPE
        ),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Warm-up steps, or below 1 their share of all steps.", rich_help_panel=RECIPE)
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Clip gradients to this global norm; 0: never.", rich_help_panel=RECIPE)
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(min=0, help="Rank of adapters, which alone are trained; 0: all weights.", rich_help_panel=RECIPE),
    ] = None,
    packing: Annotated[
        bool, typer.Option("--packing", help="Ragged examples share rows: less time, the same scores.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the order in which the examples are trained on; 0, or the recipe's."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune the target on your data as you did, and give the exact derivative of the metric by each example and token.

    A positive score helps the metric. The scores of all examples go to --out; the extremes are shown.

    Examples:

        dpg attribute sft.jsonl --show 3

        dpg attribute sft.jsonl --target ./model --eval-text heldout.jsonl --out scores.parquet

        dpg attribute chats.parquet:messages --target ./instruct-model --eval-text heldout.txt --memory sqrt

        dpg attribute notes.txt --language es --epochs 3 --schedule cosine --warmup 0.05 --max-grad-norm 1

        dpg attribute sft.jsonl --target ./model --eval-text heldout.jsonl --recipe sft_config.yaml
    """
    from dpg_cli.attribution.attribute import Request, as_json
    from dpg_cli.attribution.attribute import attribute as run_attribution
    from dpg_cli.recipes import read_recipe

    options = _metric(metric, language, eval_text, overrides or [], bool(show))
    inner = {
        "states": memory,
        "max_length": max_length,
        "precision": precision,
        "lr": lr,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "epochs": epochs,
        "schedule": schedule,
        "warmup": warmup,
        "max_grad_norm": max_grad_norm,
        "packing": packing or None,
    }
    flags = {
        "device": device,
        "models": {"target": target},
        "metric": options,
        "inner": {key: value for key, value in inner.items() if value is not None},
        **({} if seed is None else {"seed": seed}),
        **({} if lora is None else {"lora": {"rank": lora}}),
    }
    understood = None if recipe is None else read_recipe(recipe)
    ours = [text for text in overrides or [] if not (show and text.startswith("metric."))]
    config = _settings(flags, ours, {} if understood is None else understood.settings)
    request = Request(
        data=data,
        out=out,
        prompts=prompts,
        limit=limit,
        keep=_choice("--keep", keep, ("start", "end")),  # type: ignore[arg-type]
        train_on=_choice("--train-on", train_on, ("auto", "last", "all")),  # type: ignore[arg-type]
        overwrite=overwrite,
        micro_batch=micro_batch,
        top=top,
        metric=metric if options["name"] == "custom" else None,
    )
    if show:
        _show_rows(config, request, show)
        return
    with _Display() as display:
        if understood is not None:
            for line in understood.text().splitlines():
                display.note(line)
        result = run_attribution(
            config, request, on_stage=display.stage, on_note=display.note, on_progress=display.progress
        )
    if as_json_:
        typer.echo(json.dumps({"scores": str(out), **as_json(result)}, indent=2, ensure_ascii=not shows_unicode()))
    else:
        _show(result, out)


def _metric(
    name: str, language: str | None, eval_text: str | None, overrides: list[str], showing: bool
) -> dict[str, Any]:
    """The metric's options. Where rows are only shown, any metric will do.

    Raises:
        UsageError: for flags that do not fit it.
    """
    from dpg_cli.settings.config import METRIC_NAMES

    if showing:
        return {"name": "norm"}
    if name not in METRIC_NAMES and ".py" not in name:
        require_metric(name)
    options: dict[str, Any] = {"name": name} if name in METRIC_NAMES else {"name": "custom", **custom_settings(name)}
    if options["name"] != "text-loss":
        given = [flag for flag, value in (("--language", language), ("--eval-text", eval_text)) if value is not None]
        if given:
            raise UsageError(f"{given[0]} is for --metric text-loss, not for {name}.", "Leave it out.")
        return options
    options |= {} if language is None else {"language": language}
    options |= {} if eval_text is None else {"file": eval_text}
    if len(options) == 1 and not any("metric." in text for text in overrides):
        raise UsageError("There is no held-out text to measure on.", "Give --eval-text or --language.")
    return options


def _settings(flags: dict[str, Any], overrides: list[str], recipe: dict[str, Any]) -> Config:
    """The settings of an attribution: defaults, then those of a recipe, then flags, then overrides."""
    from dpg_cli.attribution.attribute import DEFAULTS
    from dpg_cli.settings.presets import merge, resolve

    return resolve(merge(merge(DEFAULTS, {"metric": {"name": flags["metric"]["name"]}}), recipe), overrides, flags)


def _choice(flag: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"{flag} {value} is no choice.", suggestion(value, known, "It takes"))
    return value


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

    def note(self, line: str) -> None:
        """Something to know of the data."""
        self.console.print(Text(f"         {printable(line)}"))

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
            table.add_row(str(row.example_id), f"{row.score:+.3e}", scored_tokens(row.tokens, row.token_scores))
        console.print(table)
        console.print()
    measures = ", ".join(f"{name} {value:.4g}" for name, value in result.measures.items())
    lines = [
        f"Metric: {result.metric}. Φ {result.value_before:.4f} -> {result.value:.4f} ({measures}).",
        result.epsilon[0].upper() + result.epsilon[1:],
    ]
    if result.clipped_share is not None:
        lines.append(f"The gradient was clipped on {result.clipped_share:.0%} of the steps.")
    if result.precision_error is not None:
        lines.append(f"bf16: token scores of the first step are {result.precision_error:.1%} off those of float32.")
    memory = "" if result.peak_memory_mb is None else f", {result.peak_memory_mb:,.0f} MB at the peak"
    lines.append(f"{result.examples:,} examples in {result.inner_steps:,} steps, {result.seconds:.0f} s{memory}.")
    lines.append(f"Scores: {out}; how they were made: {out}.json")
    for line in lines:
        typer.echo(one_line(line))


def _show_rows(config: Config, request: Request, count: int) -> None:
    """The first rows as tokens, on stdout."""
    from dpg_cli.attribution.attribute import show

    found, tokens = show(config, request, count)
    console = Console(highlight=False, soft_wrap=True)
    for line in (found.understood.line(), *found.understood.notes(), mask_legend(console.is_terminal)):
        typer.echo(one_line(line))
    for number, row, texts in zip(found.numbers, found.rows, tokens, strict=False):
        console.print()
        console.print(Text(f"row {number}: {sum(row.label):,} of {len(row.ids):,} tokens count, {row.cut:,} cut away"))
        console.print(masked_tokens(texts, row.label, console.is_terminal))
