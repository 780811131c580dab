"""The questions of an attribution: one metric each, and the target that all of them are asked of.

one --metric             one query
--metric several times   one each, by the name of the metric
--metric-file FILE.toml  one a table, with the settings of `[metric]`, by the table's name
--query FILE             one a row of held-out text (Φ is minus its loss), or, by a column, one a group of rows
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dpg_cli.data.examples import RowEncoder
from dpg_cli.data.prepared import Gathered, gather, prepare
from dpg_cli.data.shapes import trained_text
from dpg_cli.data.sources import open_rows
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError, suggestion
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.metrics.merged import MergedMetric
from dpg_cli.metrics.registry import build_metric, require_room
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.models.lora import Lora, adapt, shell_of
from dpg_cli.runs.files import reading
from dpg_cli.settings.config import Config, CustomOptions, MetricOptions, TextLossOptions

SHOWN = 60  # characters of a query's text
OWN_NAMES = ("query_id", "id")  # columns that name a query


@dataclass(frozen=True)
class Query:
    """One question.

    Attributes:
        name: what it is called in the scores.
        options: of its metric; None for rows of text.
        build: makes the metric of a target.
        reads_text: it asks what the model says, and needs no merged weights where adapters are trained.
        rows: its rows, in words, for a fingerprint.
    """

    name: str
    build: Callable[[LanguageModel], TargetMetric]
    options: MetricOptions | None = None
    reads_text: bool = False
    rows: tuple[str, ...] = ()


def of_options(name: str, options: MetricOptions, named: str | None = None) -> Query:
    """A metric of the settings as a query.

    Args:
        name: of the query.
        options: of the metric.
        named: what the user gave as --metric; without it no file of a custom metric is run.
    """
    text = isinstance(options, TextLossOptions)
    return Query(name, lambda target: build_metric(options, target, named), options, text)


def of_file(path: Path, named: Sequence[str] = ()) -> list[Query]:
    """The queries of a TOML file: one a table, with the keys of `[metric]`.

    Args:
        path: the file.
        named: what the user gave as --metric: only these files of custom metrics are run.

    Raises:
        UsageError: naming what is wrong in it.
    """
    with reading(path):
        data = path.read_bytes()
    try:
        tables: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}.", "Give a table for each query.") from None
    if not tables:
        raise UsageError(f"{path} has no query.", 'Give a table for each: [mine] and name = "text-loss", and so on.')
    found, adapter = [], TypeAdapter[MetricOptions](MetricOptions)
    for name, table in tables.items():
        try:
            options = adapter.validate_python(table)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UsageError(f"{path}, [{name}] {key}: {first['msg']}.", "Its keys are those of [metric].") from None
        code = (
            isinstance(options, CustomOptions) and ".py" in options.path
        )  # an installed metric was installed by the user
        own = options.path if isinstance(options, CustomOptions) and code else None
        if own is not None and own not in named:
            raise UsageError(f"{path}, [{name}]: {own} is code of your own.", f"Name it too: --metric {own}")
        found.append(of_options(name, options, own))
    return found


def of_rows(source: str, by: str = "") -> list[Query]:
    """The queries of a source of held-out text: one a row, or one a value of a column.

    Args:
        source: see `data.sources`.
        by: that column; empty for one a row, by its `query_id` or `id`, or else its number.

    Raises:
        UsageError: for a column that is not there, or a name that comes twice.
    """
    found = gather(source, split="test", what="queries", flag="--query")
    names = _names(source, found, by)
    groups: dict[str, list[tuple[int, Any]]] = {}
    for name, item in zip(names, found.items, strict=True):
        groups.setdefault(name, []).append(item)
    if not by and len(groups) < len(names):
        twice = next(name for name in groups if len(groups[name]) > 1)
        raise UsageError(f"Two rows of {source} are called {twice!r}.", "Give --query-by a column to group them by.")
    return [_of_group(name, replace(found, items=items), source) for name, items in groups.items()]


def _names(source: str, found: Gathered, by: str) -> list[str]:
    """What each row's query is called."""
    columns = found.rows.columns
    column = by or next((name for name in OWN_NAMES if name in columns), "")
    if not column:
        return [str(number) for number, _ in found.items]
    if column not in columns:
        raise UsageError(f"{source} has no column {column!r}.", suggestion(column, columns, "It has"))
    rows = open_rows(source, split="test", what="queries", flag="--query")
    values = dict(enumerate(row.get(column) for _, row in rows.walk()))
    for number, _ in found.items:
        if not isinstance(values[number], str | int | bool):
            raise rows.fault(number, f"{column} is {values[number]!r}, no name of a query")
    return [str(values[number]) for number, _ in found.items]


def _of_group(name: str, found: Gathered, source: str) -> Query:
    texts = tuple(trained_text(item) for _, item in found.items)
    short = texts[0] if len(texts[0]) <= SHOWN else texts[0][: SHOWN - 3] + "..."
    about = repr(short) if len(texts) == 1 else f"{len(texts)} rows of {source}"

    def build(target: LanguageModel) -> TargetMetric:
        encoder = RowEncoder(target)
        rows = prepare(found, encoder)
        require_room(rows, target)
        return TextLossMetric(target.model, Examples(*rows.tensors(encoder)), about)

    return Query(name, build, None, True, tuple(f"{number} {item}" for number, item in found.items))


def queries_sum(queries: Sequence[Query]) -> str:
    """SHA-256 of what is asked."""
    plain = [
        [query.name, None if query.options is None else query.options.model_dump(mode="json"), query.rows]
        for query in queries
    ]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def require_distinct(queries: Sequence[Query]) -> None:
    """Refuse two queries of one name."""
    names = [query.name for query in queries]
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise UsageError(f"Two queries are called {twice!r}.", "Give them names in a --metric-file.")


def trained_with(
    target: LanguageModel, config: Config, queries: Sequence[Query]
) -> tuple[LanguageModel, list[TargetMetric]]:
    """The target as it is trained, and the metrics of its weights; with adapters, of the merged ones.

    Args:
        target: as it was loaded; its model is changed in place where it gets adapters.
        config: the settings.
        queries: what is asked.

    Raises:
        UsageError: if a metric or the adapters do not fit the target.
    """
    asked = config.lora
    if not asked.rank:
        return target, [query.build(target) for query in queries]
    bases = [None if query.reads_text else query.build(target) for query in queries]
    shell = shell_of(target.model)
    lora = Lora(asked.rank, asked.alpha, asked.modules, asked.rslora, asked.save)
    model: Any = adapt(target.model, lora, config.seed)
    adapted = replace(target, model=model.eval())
    return adapted, [
        query.build(adapted) if base is None else MergedMetric(base, shell, model)
        for query, base in zip(queries, bases, strict=True)
    ]
