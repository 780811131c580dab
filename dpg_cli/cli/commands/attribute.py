"""`dpg attribute DATA`: which of your fine-tuning examples help a metric, and which harm it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpg_cli.cli.attribution import AttributionDisplay, interruptible, show_result, show_rows
from dpg_cli.cli.metric_flags import custom_settings, require_metric
from dpg_cli.cli.tokens import shows_unicode
from dpg_cli.errors import UsageError, suggestion

if TYPE_CHECKING:
    from dpg_cli.attribution.queries import Query
    from dpg_cli.settings.config import Config

RECIPE = "Recipe: how the target is fine-tuned"
QUERIES = "Many questions at once"


def attribute(
    data: Annotated[
        str,
        typer.Argument(
            help="Your examples: a file (text, JSON, CSV, TSV, parquet; .gz, .zst, a pipe), a datasets folder (FOLDER#SPLIT) or a "
            "hub dataset; rows of text, prompt + completion, messages, or instruction + output; :COLUMN names one. docs/data.md."
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(help="The model to fine-tune: a folder, a hub name, tiny (the default) or prose."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="text-loss, pattern, norm; or your own: FILE.py:Name, which is run, or an installed one. Several times: a query "
            "each.",
            show_default="text-loss",
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="text-loss on held-out sentences of the embedded world: en, es, de, fr or it.")
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="text-loss on these held-out texts: a source as DATA.")] = None,
    query: Annotated[
        str | None,
        typer.Option(
            help="Many questions at once: a source as DATA, each row a text-loss of its own.", rich_help_panel=QUERIES
        ),
    ] = None,
    query_by: Annotated[
        str, typer.Option(help="A query is all rows with one value of this column.", rich_help_panel=QUERIES)
    ] = "",
    metric_file: Annotated[
        Path | None,
        typer.Option(help="TOML: a query a table, with the keys of [metric].", rich_help_panel=QUERIES),
    ] = None,
    at_once: Annotated[
        int,
        typer.Option(min=0, help="Queries that share a walk; 0: as many as fit in memory.", rich_help_panel=QUERIES),
    ] = 0,
    token_scores: Annotated[
        bool | None,
        typer.Option(
            "--token-scores/--no-token-scores",
            help="Scores of tokens too; of several queries only when asked for, or as tensors.",
            rich_help_panel=QUERIES,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Where the scores go: a name that ends in .parquet, .jsonl, .csv or .safetensors.")
    ] = Path("scores.parquet"),
    validate: Annotated[
        int,
        typer.Option(
            min=0,
            help="Can the scores be trusted? Retrain so many times without a random part of the data, and compare with what they "
            "predict. Scores of the same command are used again; an interrupted validation goes on.",
        ),
    ] = 0,
    leave_out: Annotated[float, typer.Option(help="The share of the examples that each of these leaves out.")] = 0.1,
    report: Annotated[
        bool,
        typer.Option("--report", help="Also write the scores as a page to look at, beside them with the ending .html."),
    ] = False,
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
        str | None,
        typer.Option(
            help="States of the fine-tuning: keep, sqrt (recompute) or offload (to disk). With the last two the same command goes on "
            "after an interruption."
        ),
    ] = None,
    micro_batch: Annotated[
        int, typer.Option(min=0, help="Examples in memory at once; 0 takes about 4,096 tokens.")
    ] = 0,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bf16: linear maps in bfloat16, all else in float32.")
    ] = None,
    second_order: Annotated[
        str | None,
        typer.Option(
            help="exact; difference: of ordinary passes, for any target; one-sided: of half as many, ten times the error; or auto: exact "
            "where it can be."
        ),
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
    from_checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Go on from there, with its weights and optimiser state: a checkpoint folder of the Trainer, or a .safetensors "
            "file. docs/recipes.md.",
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

        dpg attribute sft.jsonl --target ./model --query questions.jsonl --memory sqrt --top 10

        dpg attribute sft.jsonl --target ./model --eval-text heldout.jsonl --validate 40 --report
    """
    from dpg_cli.attribution.attribute import Request
    from dpg_cli.attribution.attribute import attribute as run_attribution
    from dpg_cli.attribution.outcome import as_json
    from dpg_cli.attribution.pace import Pace
    from dpg_cli.attribution.page import write_page
    from dpg_cli.attribution.validation import Wish, made_alike
    from dpg_cli.attribution.validation import validate as run_validation
    from dpg_cli.attribution.work import work_folder
    from dpg_cli.recipes import read_recipe

    asked = [] if show else _queries(metric or [], language, eval_text, query, query_by, metric_file, overrides or [])
    options = _first_metric(asked, metric or ["text-loss"], language, eval_text, query, overrides or [], bool(show))
    whole = from_checkpoint is not None and (from_checkpoint / "config.json").is_file()
    target = target or (str(from_checkpoint) if whole else "tiny")
    inner = {
        "states": memory,
        "max_length": max_length,
        "precision": precision,
        "second_order": second_order,
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
        metric=metric[0] if metric and options["name"] == "custom" else None,
        queries=tuple(asked),
        query=query or "",
        query_by=query_by,
        query_files=tuple(str(source) for source in (query, metric_file) if source is not None),
        checkpoint=from_checkpoint,
        width=at_once,
        token_scores=token_scores,
    )
    if show:
        show_rows(config, request, show)
        return
    if validate and not 0 < leave_out < 1:
        raise UsageError(f"--leave-out {leave_out:g} is no share of the examples.", "Give 0.1, for example.")
    known = bool(validate) and not overwrite and made_alike(config, request)
    if report:  # of scores that are there and stay, the page is made anew with the validation in it
        _check_page(out, overwrite or known)
    states = config.inner.states
    pace = Pace(states, min(at_once or len(asked), len(asked)) or 1, adapters=config.lora.rank > 0)
    with (
        AttributionDisplay(pace) as display,
        interruptible(display, None if states == "keep" else work_folder(out)),
    ):
        if understood is not None:
            for line in understood.text().splitlines():
                display.note(line)
        told = {"on_stage": display.stage, "on_note": display.note, "on_progress": display.progress}
        result = None if known else run_attribution(config, request, **told)  # type: ignore[arg-type]
        verdict = run_validation(config, request, Wish(validate, leave_out), **told) if validate else None  # type: ignore[arg-type]
    page = write_page(out) if report else None
    if as_json_:
        found: dict[str, Any] = {} if page is None else {"report": str(page)}
        found |= {} if verdict is None else {"validation": verdict.as_dict()}
        found |= {} if result is None else as_json(result)
        typer.echo(json.dumps({"scores": str(out), **found}, indent=2, ensure_ascii=not shows_unicode()))
        return
    if result is not None:
        show_result(result, out)
    for line in [] if verdict is None else verdict.lines():
        typer.echo(line)
    if page is not None:
        typer.echo(f"The page: {page}")


def _check_page(out: Path, overwrite: bool) -> None:
    """Refuse a page that cannot be made, before anything is computed."""
    if out.suffix.lower() == ".safetensors":
        raise UsageError("--report needs texts, and .safetensors has none.", "Let --out end in .parquet.")
    if out.with_suffix(".html").exists() and not overwrite:
        raise UsageError(f"{out.with_suffix('.html')} exists already.", "Name another --out, or add --overwrite.")


def _queries(
    metrics: list[str],
    language: str | None,
    eval_text: str | None,
    query: str | None,
    query_by: str,
    metric_file: Path | None,
    overrides: list[str],
) -> list[Query]:
    """What is asked, where it is more than one metric of the settings; empty where it is that.

    Raises:
        UsageError: for flags that do not fit together.
    """
    from pydantic import TypeAdapter

    from dpg_cli.attribution.queries import of_file, of_options, of_rows
    from dpg_cli.settings.config import MetricOptions

    if query_by and query is None:
        raise UsageError("--query-by groups the rows of --query.", "Give --query FILE.")
    if query is None and metric_file is None and len(metrics) < 2:
        return []
    if any(text.startswith("metric.") for text in overrides):
        raise UsageError("--set metric.KEY is for one metric.", "Put the settings of several into a --metric-file.")
    if "text-loss" not in metrics and not (language is None and eval_text is None):
        flag = "--language" if language is not None else "--eval-text"
        raise UsageError(f"{flag} is for --metric text-loss.", "Add that, or leave it out.")
    found = []
    for name in metrics:
        own = (language, eval_text) if name == "text-loss" else (None, None)
        options = TypeAdapter[MetricOptions](MetricOptions).validate_python(_metric(name, *own, [], False))
        found.append(of_options(name.rpartition(":")[2], options, name))
    if metric_file is not None:
        found += of_file(metric_file, metrics)
    return found + ([] if query is None else of_rows(query, query_by))


def _first_metric(
    asked: list[Query],
    metrics: list[str],
    language: str | None,
    eval_text: str | None,
    query: str | None,
    overrides: list[str],
    showing: bool,
) -> dict[str, Any]:
    """The metric of the settings: the only one, or the first of several queries that is one."""
    if not asked:
        return _metric(metrics[0], language, eval_text, overrides, showing)
    first = next((one.options for one in asked if one.options is not None), None)
    return {"name": "text-loss", "file": query} if first is None else first.model_dump(mode="json")


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
