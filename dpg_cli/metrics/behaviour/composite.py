"""A sum of metrics: Φ = a + 0.5*b - c of named parts, each a metric of its own with its own options."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric, TargetMetric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.settings.config import MetricOptions

OPTIONS: TypeAdapter[Any] = TypeAdapter(MetricOptions)


class Composite(Metric):
    """A weighted sum of metrics.

    Args:
        target: before fine-tuning.
        sum: the expression: names of parts, numbers, + - * and parentheses, linear in the parts.
        parts: a table for each name: the settings of a [metric] section, or those of an installed metric as
            {metric = NAME, KEY = VALUE, ...}.

    Raises:
        UsageError: if the expression is no sum of the parts, or a part cannot be made.
    """

    def __init__(self, target: LanguageModel, sum: str, parts: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(target)
        self.weights = weights_of(sum)
        if missing := [name for name in self.weights if name not in parts]:
            raise UsageError(
                f"The sum names {missing[0]!r}, which is no part.", f"Parts: {', '.join(parts) or 'none'}."
            )
        if idle := [name for name in parts if name not in self.weights]:
            raise UsageError(f"The part {idle[0]!r} does not occur in the sum.", "Leave it out, or name it.")
        self.parts = {name: part(target, name, parts[name]) for name in self.weights}
        self.sum = sum

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        values = [weight * self.parts[name](parameters, model) for name, weight in self.weights.items()]
        return torch.stack(values).sum()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Each part's value, then its own measures, named after it."""
        found = {name: float(metric(parameters, model)) for name, metric in self.parts.items()}
        for name, metric in self.parts.items():
            found |= {f"{name}.{key}": value for key, value in metric.measures(parameters, model).items()}
        return found

    def describe(self) -> str:
        """The expression, and what each part is for."""
        return f"{self.sum}: " + "; ".join(f"{name} is {metric.describe()}" for name, metric in self.parts.items())


def part(target: LanguageModel, name: str, settings: Mapping[str, Any]) -> TargetMetric:
    """The metric of one part.

    Raises:
        UsageError: naming the part and what is wrong with its settings.
    """
    from dpg_cli.metrics.registry import build_metric  # which knows all metrics, this one among them

    given = dict(settings)
    if "metric" in given:
        path = given.pop("metric")
        given = {"name": "custom", "path": path, "options": given}
    if given.get("name") == "custom" and ":" in str(given.get("path", "")):
        raise UsageError(
            f"The part {name!r} names a file; code is run only where --metric names it.",
            "Install the metric as an entry point (docs/custom-metrics.md), and give its name.",
        )
    try:
        options = OPTIONS.validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"The part {name!r} is no metric's settings: {where} {first['msg'].lower()}.",
            "Write it as a [metric] section, or as {metric = NAME, ...}.",
        ) from None
    return build_metric(options, target)


def weights_of(expression: str) -> dict[str, float]:
    """The weight of each name in a linear expression.

    Raises:
        UsageError: if it is none.
    """
    fault = UsageError(
        f"options.sum = {expression!r} is no weighted sum of parts.", "For example: sum = 'german + 0.5*kept - length'."
    )
    try:
        tree = ast.parse(expression, mode="eval").body
        constant, weights = _linear(tree)
    except (SyntaxError, ValueError, RecursionError):
        raise fault from None
    if constant or not weights or not any(weights.values()):
        raise fault
    return weights


def _linear(node: ast.AST) -> tuple[float, dict[str, float]]:
    """Constant and weights of a tree of + - * over names and numbers."""
    if isinstance(node, ast.Name):
        return 0.0, {node.id: 1.0}
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value), {}  # type: ignore[arg-type]  # an int or a float
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return _scaled(_linear(node.operand), -1.0 if isinstance(node.op, ast.USub) else 1.0)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        left, right = _linear(node.left), _linear(node.right)
        right = _scaled(right, -1.0) if isinstance(node.op, ast.Sub) else right
        names = {**left[1], **right[1]}
        return left[0] + right[0], {name: left[1].get(name, 0.0) + right[1].get(name, 0.0) for name in names}
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        left, right = _linear(node.left), _linear(node.right)
        if not left[1]:
            return _scaled(right, left[0])
        if not right[1]:
            return _scaled(left, right[0])
    raise ValueError("not linear")


def _scaled(value: tuple[float, dict[str, float]], by: float) -> tuple[float, dict[str, float]]:
    return value[0] * by, {name: weight * by for name, weight in value[1].items()}
