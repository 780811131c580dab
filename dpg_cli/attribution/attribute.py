"""`dpg attribute` without its display: the metagradients of a user's own fine-tuning data, and no generator anywhere.

rows of the source -> examples (`data`) -> fine-tuning by the recipe -> a metagradient a query (`queries`) -> scores (`scores`)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpg_cli.attribution.checkpoint import read_checkpoint
from dpg_cli.attribution.groups import Task
from dpg_cli.attribution.key import file_sum, how_made, key_of
from dpg_cli.attribution.outcome import Answer, Attribution, against_gradient
from dpg_cli.attribution.queries import Query, of_options, queries_sum, require_distinct, trained_with
from dpg_cli.attribution.scores import check_place
from dpg_cli.attribution.table import ScoreTable, pieces
from dpg_cli.attribution.work import LASTING, WorkFolder, most_bytes, remove, require_same, work_folder, working
from dpg_cli.data.examples import Encoding, Keep, RowEncoder, TrainOn
from dpg_cli.data.prepared import Prepared, gather, prepare
from dpg_cli.data.sources import files_of
from dpg_cli.driver.recipe import inner_recipe
from dpg_cli.engine.inner.recipe import Plan, Recipe
from dpg_cli.engine.inner.start import Start
from dpg_cli.engine.records import Examples
from dpg_cli.errors import DegenerateError
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models.fingerprint import fingerprint
from dpg_cli.models.loading import LanguageModel, load_target, pick_device, quiet_transformers
from dpg_cli.recipes.trainer_mean import trainer_mean_note
from dpg_cli.runs.sessions import peak_memory_mb
from dpg_cli.settings.config import Config, CustomOptions, TextLossOptions

TOKENS = 4096  # of an automatic micro-batch

DEFAULTS: dict[str, Any] = {  # of `dpg attribute`, where they differ from a run's
    "task": "attribute",
    "models": {"target": "tiny", "untie_target": False},
    "inner": {"lr": 1e-4, "beta2": 0.95, "eps": 1e-3, "batch_size": 32, "order": "shuffled"},
}


@dataclass(frozen=True)
class Request:
    """What is to be attributed, besides the settings.

    Attributes:
        data: a source of rows, see `data/sources.py`.
        out: where the scores go.
        prompts: a source of what stands before each completion; empty where the rows have it themselves.
        limit: only the first so many rows; 0 takes all.
        keep: which end of a row longer than `inner.max_length` stays.
        train_on: see `data.examples.Encoding`.
        overwrite: whether earlier scores may be replaced.
        micro_batch: rows in memory at once; 0 takes about 4,096 tokens.
        top: how many helpful and harmful examples are returned.
        metric: what the user gave as --metric; without it no file of a custom metric is run.
        queries: what is asked; empty for the metric of the settings alone.
        query_files: files and folders that they are read from.
        query, query_by: of these the one whose rows are queries, and the column that groups them.
        checkpoint: where the run goes on from; None for a fresh one.
        width: queries that are walked at once; 0 takes as many as fit in memory.
        token_scores: write those of tokens too; None where there is one query, or the scores are tensors.
    """

    data: str
    out: Path
    prompts: str = ""
    limit: int = 0
    keep: Keep = "start"
    train_on: TrainOn = "auto"
    overwrite: bool = False
    micro_batch: int = 0
    top: int = 5
    metric: str | None = None
    queries: tuple[Query, ...] = ()
    query_files: tuple[str, ...] = ()
    query: str = ""
    query_by: str = ""
    checkpoint: Path | None = None
    width: int = 0
    token_scores: bool | None = None

    def as_dict(self) -> dict[str, Any]:
        """How the rows were read, for the record."""
        read = {
            "data": self.data,
            "prompts": self.prompts,
            "limit": self.limit,
            "keep": self.keep,
            "train_on": self.train_on,
        }
        return {**read, "query": self.query, "query_by": self.query_by}


def read_rows(
    config: Config, request: Request, on_stage: Callable[[str], None] = lambda name: None
) -> tuple[LanguageModel, Prepared, RowEncoder]:
    """The target, and the rows of a request as its tokens. The data is read first: what is wrong with it shows at once."""
    on_stage("reading the data")
    gathered = gather(request.data, contexts=request.prompts, limit=request.limit)
    on_stage("loading the target")
    target = load_target(config.models, pick_device(config.device))
    encoder = RowEncoder(target, Encoding(config.inner.max_length, request.keep, request.train_on))
    return target, prepare(gathered, encoder), encoder


def show(config: Config, request: Request, rows: int) -> tuple[Prepared, list[list[str]]]:
    """The rows of a request, and the text of each token of the first ones; nothing is trained."""
    target, found, _ = read_rows(config, request)
    return found, [pieces(target, row.ids) for row in found.rows[:rows]]


@dataclass(frozen=True)
class Setup:
    """A fine-tuning run with its questions, ready to be made.

    Attributes:
        target: as it is trained, with adapters where the settings have them.
        found, examples: all rows of the data, and those with something to train on.
        queries, metrics: what is asked.
        recipe, plan, start: of the run.
        made_of: fingerprint of the target, and of the checkpoint that it starts from.
        micro_batch: rows in memory at once.
    """

    target: LanguageModel
    found: Prepared
    examples: Examples
    queries: tuple[Query, ...]
    metrics: list[TargetMetric]
    recipe: Recipe
    plan: Plan
    start: Start | None
    made_of: dict[str, str]
    micro_batch: int


def asked_of(config: Config, request: Request) -> tuple[Query, ...]:
    """The queries of a request; the metric of the settings where it names none.

    Raises:
        UsageError: if two have one name.
    """
    queries = request.queries or (of_options("metric", config.metric, request.metric),)
    require_distinct(queries)
    return queries


def set_up(
    config: Config,
    request: Request,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Setup:
    """Read the data, load the target, make the metrics and the plan.

    Raises:
        UsageError: for whatever cannot be read or does not fit.
    """
    queries = asked_of(config, request)
    target, found, encoder = read_rows(config, request, on_stage)
    examples = Examples(*found.tensors(encoder))
    made_of = fingerprint(target)
    mean = trainer_mean_note(target.model, examples, config.inner.normalization)
    target, metrics = trained_with(target, config, queries)
    recipe = inner_recipe(config.inner, config.seed)
    plan, start = recipe.plan(examples), None
    for line in (found.understood.line(), *found.understood.notes(), *([mean] if mean else [])):
        on_note(line)
    for line in dict.fromkeys(line for metric in metrics for line in getattr(metric, "notes", ())):
        on_note(line)
    if request.checkpoint is not None:
        known = read_checkpoint(request.checkpoint, target.model, recipe, len(plan), config.lora)
        start, made_of = known.start, {**made_of, "checkpoint": fingerprint(target)["weights"]}
        on_note(known.note)
    micro_batch = request.micro_batch or max(1, TOKENS // examples.ids_N_S.shape[1])
    return Setup(target, found, examples, queries, metrics, recipe, plan, start, made_of, micro_batch)


def attribute(
    config: Config,
    request: Request,
    *,
    on_stage: Callable[[str], None] = lambda name: None,
    on_note: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Attribution:
    """Fine-tune the target on the data by the recipe of the settings, and write the metagradients of all examples.

    With states that are recomputed or on disk (`inner.states`), progress is kept in a folder beside the scores until these
    are written: after a kill the same call goes on, to the same scores.

    Args:
        config: models.target, metric, inner, lora and seed are used.
        request: the data, what is asked, and where the scores go.
        on_stage, on_note: called with the name of each stage, and with what the user should know of the data and of what
            the engine chose for the target.
        on_progress: called as progress(phase, steps done, of how many).

    Raises:
        UsageError: for whatever cannot be read or written, or will not fit in memory.
        DegenerateError: if the inner run diverges or a metagradient is not finite.
    """
    started, inner = time.perf_counter(), config.inner
    queries = asked_of(config, request)
    check_place(request.out, inputs(config, request), request.overwrite)
    setup = set_up(config, request, on_stage, on_note)
    target, found, examples, metrics = setup.target, setup.found, setup.examples, setup.metrics
    made_of, recipe, plan, start, micro_batch = setup.made_of, setup.recipe, setup.plan, setup.start, setup.micro_batch
    task = Task(
        target, examples, recipe, plan, start, inner.states, inner.packing, inner.share_prefixes, micro_batch,
        inner.second_order,
    )  # fmt: skip
    tokens_read = max(getattr(metric, "tokens_read", 0) for metric in metrics)
    width = task.width(len(queries), request.width, tokens_read)
    if width < len(queries):
        on_note(f"{len(queries)} queries are walked {width} at a time, each time with a fine-tuning run of its own.")
    with torch.no_grad():
        parameters = dict(target.model.named_parameters())
        before = [float(metric(parameters, target.model)) for metric in metrics]
    key = key_of(
        config, found, made_of, target.head.device, inputs(config, replace(request, data="", prompts="")),
        **{"--keep": request.keep, "--train-on": request.train_on, "--micro-batch": micro_batch, "width": width},
        **{"the queries": queries_sum(queries), "Φ before": before},
    )  # fmt: skip
    with _work(request, task, width, key, on_note) as work:
        on_stage("fine-tuning and attributing")
        with quiet_transformers():  # it would warn of pads without a mask; a causal model needs none
            result = task.run(metrics, width, work, on_progress)
        for note in result.notes:
            on_note(note)
        on_stage("writing the scores")
        table = ScoreTable(found, target, result.example_Q_N, result.token_Q_N_S)
        answers = [
            Answer(query.name, metric.describe(), value, was, measures, *table.extremes(number, request.top))
            for number, (query, metric, was, value, measures) in enumerate(
                zip(queries, metrics, before, result.values, result.measures, strict=True)
            )
        ]
        record = {
            **how_made(config, found, made_of, result.gradient_median, result.notes),
            **_asked(queries, answers),
            "inner_steps": task.steps,
            "first_step": 0 if start is None else start.step,
            "request": request.as_dict(),
            "data_sha256": next((file_sum(path) for path in files_of(request.data)), ""),
        }
        table.write(request.out, [query.name for query in queries], record, request.token_scores)
        if work is not None:
            remove(work.folder)
    return Attribution(
        answers=answers,
        examples=len(examples),
        inner_steps=task.steps,
        data=found.understood.as_dict(),
        gradient_median=result.gradient_median,
        epsilon=against_gradient(inner, result.gradient_median),
        notes=result.notes,
        precision_error=result.stats.get("precision_error"),
        difference_error=result.stats.get("difference_error"),
        clipped_share=result.stats.get("clipped_share"),
        seconds=time.perf_counter() - started,
        peak_memory_mb=peak_memory_mb(),
        width=width,
    )


@contextmanager
def _work(
    request: Request, task: Task, width: int, key: dict[str, Any], on_note: Callable[[str], None]
) -> Iterator[WorkFolder | None]:
    """The work folder beside the scores; None where states are kept in memory, which ends with the process.

    Raises:
        UsageError: if it was begun otherwise, or the disk is too small.
    """
    folder = work_folder(request.out)
    if task.memory not in LASTING:
        if folder.is_dir():
            require_same(folder, json.loads(json.dumps(key)))
        yield None
        return
    trained, element = task.target.trained_count, task.target.head.element_size()
    needed = most_bytes(task.memory, task.steps, trained, element, width, task.examples.ids_N_S.numel())
    begun = folder.is_dir()
    with working(folder, key, needed) as work:
        on_note(f"{'Goes on from' if begun else 'Keeps its progress in'} {folder}, at most {needed / 1e6:,.0f} MB.")
        try:
            yield work
        except DegenerateError:  # it would end so again
            remove(folder)
            raise


def _asked(queries: Sequence[Query], answers: list[Answer]) -> dict[str, Any]:
    """What a record says of its queries: of one, beside all else."""
    asked = [
        {
            "name": query.name,
            "about": answer.metric,
            "phi_before": answer.value_before,
            "phi": answer.value,
            "measures": answer.measures,
            "metric": None if query.options is None else query.options.model_dump(mode="json"),
        }
        for query, answer in zip(queries, answers, strict=True)
    ]
    return {"queries": asked} if len(asked) > 1 else {key: value for key, value in asked[0].items() if key != "name"}


def inputs(config: Config, request: Request) -> list[Path]:
    """Files and folders that are read, none of which scores may be written onto."""
    named = [request.data, request.prompts, *request.query_files, str(request.checkpoint or "")]
    for options in (config.metric, *(query.options for query in request.queries)):
        if isinstance(options, TextLossOptions):
            named.append(options.file.replace("{language}", options.language))
        if isinstance(options, CustomOptions):
            named += [options.path, *(value for value in options.options.values() if isinstance(value, str))]
    return [path for name in dict.fromkeys(named) for path in files_of(name)]
