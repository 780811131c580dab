"""What a selection really does: two fine-tunings by stock PyTorch, on all of the data and on what stays, and Φ of both.

The prediction is first order and keeps the batches as they were; retraining draws them anew from the smaller file, as anybody's
trainer would. Where the two differ, that is the finding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpg_cli.attribution.attribute import DEFAULTS
from dpg_cli.attribution.queries import Query, of_options, of_rows
from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.prepared import gather, prepare
from dpg_cli.errors import UsageError
from dpg_cli.evidence.stock import PLAIN, UNWATCHED, Watcher, train
from dpg_cli.evidence.stock_plan import Row, StockPlan, stock_order
from dpg_cli.models.fingerprint import fingerprint
from dpg_cli.models.loading import load_target, pick_device
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.selection.select import read_selection
from dpg_cli.settings.config import Config, CustomOptions, MetricOptions
from dpg_cli.settings.inner import InnerConfig
from dpg_cli.settings.presets import merge, resolve


@dataclass(frozen=True)
class Change:
    """Φ of one query.

    Attributes:
        name: of the query.
        before: before any fine-tuning.
        whole, kept: after fine-tuning on all of the data, and on what stays.
        predicted: the change that the scores predict.
        measures: readable measures after the two.
    """

    name: str
    before: float
    whole: float
    kept: float
    predicted: float
    measures: tuple[dict[str, float], dict[str, float]]

    @property
    def measured(self) -> float:
        """The change that came."""
        return self.kept - self.whole


@dataclass(frozen=True)
class Retrained:
    """The verdict on a selection.

    Attributes:
        changes: of each query, the one that it was made by first.
        examples: trained on in both.
        steps: optimiser steps of both.
    """

    changes: list[Change]
    examples: tuple[int, int]
    steps: tuple[int, int]

    @property
    def verified(self) -> bool:
        """Φ of the query that it was made by changed in the predicted direction."""
        first = self.changes[0]
        return first.measured * first.predicted > 0

    @property
    def reason(self) -> str:
        """Why it is not verified."""
        first = self.changes[0]
        return f"phi changed by {first.measured:+.4g}, predicted {first.predicted:+.4g}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        queries = [{**vars(change), "measured": change.measured} for change in self.changes]
        return {"verified": self.verified, "queries": queries, "examples": self.examples, "steps": self.steps}

    def lines(self) -> list[str]:
        """For people."""
        whole, kept = self.examples
        found = [
            f"{PLAIN.about} on all {whole:,} examples ({self.steps[0]} steps), and on the {kept:,} that stay ({self.steps[1]})"
        ]
        for change in self.changes:
            found.append(
                f"{change.name}: phi {change.whole:.6g} -> {change.kept:.6g}, changed by {change.measured:+.4g}; "
                f"predicted {change.predicted:+.4g}; before fine-tuning {change.before:.6g}"
            )
            found += [
                f"  {key}: {value:.6g} -> {change.measures[1][key]:.6g}"
                for key, value in change.measures[0].items()
                if key in change.measures[1] and key != "phi"
            ]
        return found


def retrain(
    path: Path, device_name: str = "auto", named_metric: str | None = None, watch: Watcher = UNWATCHED
) -> Retrained:
    """Fine-tune twice and compare.

    Args:
        path: what `dpg select` wrote.
        device_name: where to train.
        named_metric: what the user gives as --metric; without it no file of a custom metric is run.
        watch: told of stages and progress.

    Raises:
        UsageError: if it is no selection, its data or target are not what they were, or the recipe is none for this.
    """
    made = read_selection(path)
    if made is None:
        raise UsageError(f"{path} is no selection.", "Name what `dpg select` wrote.")
    record, device = made["scores_record"], pick_device(device_name)
    if made.get("weighed"):
        raise UsageError("A weighed selection needs a trainer that reads weights.", "Select by --drop or --keep.")
    config, queries = settings_of(record), queries_of(record, named_metric)
    request, inner = record["request"], config.inner
    if inner.packed_rows or record.get("first_step"):
        raise UsageError("Packed rows and warm starts are not retrained here.", "Retrain by your own trainer.")
    if config.models.target and fingerprint(load_target(config.models, device)) != record.get("fingerprint"):
        raise UsageError(f"The target {config.models.target} is not what it was.", "Run `dpg attribute` again.")
    values: list[list[float]] = []
    measures: list[list[dict[str, float]]] = []
    counts: list[int] = []
    steps: list[int] = []
    before: list[float] = []
    for source, what in ((made["source"], "all of the data"), (str(path), "what stays")):
        watch.stage(f"fine-tuning on {what}")
        target = load_target(config.models, device)
        metrics = [query.build(target) for query in queries]
        if not before:
            before = _read(metrics, target.model)[0]
        encoder = RowEncoder(target, Encoding(inner.max_length, request["keep"], request["train_on"]))
        if request.get("prompts"):
            raise UsageError("Prompts of a file of their own are not retrained here.", "Put them into the rows.")
        found = prepare(gather(source, limit=0 if source == str(path) else request.get("limit", 0)), encoder)
        rows = [Row(found.rows[place].ids, found.rows[place].label) for place in found.trained]
        plan = plan_of(rows, inner, config.seed)
        model: Any = adapt(target.model, Lora.of(config.lora), config.seed) if config.lora.rank else target.model
        train(model.eval(), plan, inner, watch.progress)
        if config.lora.rank:
            target = replace(target, model=model.merge_and_unload())
        phi, own = _read(metrics, target.model)
        values.append(phi)
        measures.append(own)
        counts.append(len(rows))
        steps.append(len(plan.steps))
    changes = [
        Change(name, before[n], values[0][n], values[1][n], predicted, (measures[0][n], measures[1][n]))
        for n, (name, predicted) in enumerate(made["predicted"].items())
    ]
    first = list(made["predicted"]).index(made["query"])
    order = [changes[first], *(change for n, change in enumerate(changes) if n != first)]
    return Retrained(order, (counts[0], counts[1]), (steps[0], steps[1]))


@torch.no_grad()
def _read(metrics: Sequence[Any], model: Any) -> tuple[list[float], list[dict[str, float]]]:
    """Φ and measures of each query."""
    parameters = dict(model.named_parameters())
    return [float(metric(parameters, model)) for metric in metrics], [
        metric.measures(parameters, model) for metric in metrics
    ]


def settings_of(record: dict[str, Any]) -> Config:
    """The settings of an attribution, from its record.

    Raises:
        UsageError: if the record lacks them.
    """
    try:
        known = {
            "models": record["target"],
            "metric": {"name": "norm"},
            "inner": record["recipe"],
            "lora": record["lora"],
            "seed": record["seed"],
        }
    except KeyError as error:
        raise UsageError(f"The record of the scores has no {error}.", "Run `dpg attribute` again.") from None
    return resolve(merge(DEFAULTS, known), [], {})


def queries_of(record: dict[str, Any], named: str | None) -> list[Query]:
    """What was asked, from the record.

    Raises:
        UsageError: if a metric is a file that the user has not named, or the questions are gone.
    """
    request = record["request"]
    asked = record.get("queries") or [{"name": "metric", "metric": record.get("metric")}]
    rows = of_rows(request["query"], request["query_by"]) if request.get("query") else []
    of_text = {query.name: query for query in rows}
    found = []
    for entry in asked:
        if entry.get("metric") is None:
            if entry["name"] not in of_text:
                raise UsageError(f"The question {entry['name']!r} is not there any more.", "Run `dpg attribute` again.")
            found.append(of_text[entry["name"]])
            continue
        options = resolve(merge(DEFAULTS, {"metric": entry["metric"]}), [], {}).metric
        own = isinstance(options, CustomOptions) and ".py:" in options.path
        if own and named != _path(options):
            raise UsageError("The metric is code of your own.", f"Name it: --metric {_path(options)}")
        found.append(of_options(entry["name"], options, named if own else None))
    return found


def _path(options: MetricOptions) -> str:
    return options.path if isinstance(options, CustomOptions) else ""


def plan_of(rows: list[Row], inner: InnerConfig, seed: int) -> StockPlan:
    """The batches that a trainer makes of rows: in the recipe's order, the last one smaller, or dropped."""
    size, count = inner.batch_size * inner.accumulation or len(rows), len(rows)
    each = max(1, count // size if inner.drop_last else -(-count // size))
    total = inner.max_steps or math.ceil(inner.epochs * each)
    steps: list[list[int]] = []
    while len(steps) < total:
        order = stock_order(count, inner, seed, len(steps) // each)
        steps += [order[start : start + size] for start in range(0, each * size, size)]
    return StockPlan(rows, steps[:total], [[number] for number in range(count)], size, inner.epochs)
