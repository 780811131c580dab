"""A custom metric, made and tried once at θ_0: its faults come to light before the first rollout, each in one line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dpg_cli.errors import DpgError, UsageError
from dpg_cli.escape import pasted
from dpg_cli.metrics import custom
from dpg_cli.metrics.custom import Factory, Reference
from dpg_cli.models.loading import LanguageModel
from dpg_cli.settings.config import CustomOptions

RESERVED = frozenset(
    {"step", "reward_mean", "reward_std", "reward_within_groups", "dead_groups", "gradient_median", "entropy", "lr"}
    | {"examples", "tokens", "completion_tokens", "well_formed", "well_formed_asked"}
    | {"same_completions", "sign_share", "elasticity", "sgd_lr", "phi_runs_mean", "phi_runs_std", "phi_error", "phi_z"}
    | {"seconds", "seconds_rollout", "seconds_metagradient", "seconds_policy"}
)
"""Names in `metrics.jsonl` that a measure would overwrite; so would any that begins with `policy_`."""


class UserMetric:
    """A custom metric behind the protocol: what its code raises becomes one line, its measures are floats.

    Args:
        inner: what the factory made.
        factory: where it came from.
    """

    def __init__(self, inner: Any, factory: Factory) -> None:
        self.inner = inner
        self.factory = factory

    @contextmanager
    def blame(self, part: str) -> Iterator[None]:
        """Turn an exception of the user's code into one line; --debug shows the whole."""
        try:
            yield
        except DpgError:
            raise
        except Exception as error:
            raise UsageError(
                f"The metric {self.factory.reference} raised {custom.said(error)} in {part}.",
                "Correct it; --debug shows where.",
            ) from error

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ(θ)."""
        with self.blame("__call__"):
            return self.inner(parameters, model)

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Its readable measures."""
        with self.blame("measures"), torch.no_grad():
            return {str(name): float(value) for name, value in self.inner.measures(parameters, model).items()}

    def describe(self) -> str:
        """Its description, on one line."""
        with self.blame("describe"):
            return " ".join(self.inner.describe().split())

    def record(self) -> dict[str, str]:
        """What run.json keeps of it."""
        return {
            "metric": str(self.factory.reference),
            "origin": self.factory.origin,
            "sha256": self.factory.sha256,
        }


class PicturedUserMetric(UserMetric):
    """One that draws a picture too."""

    def picture(self, parameters: Mapping[str, Tensor]) -> Image.Image:
        """Its picture."""
        with self.blame("picture"), torch.no_grad():
            return self.inner.picture(parameters)

    def tensors(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Its tensors; none where it has no such method."""
        with self.blame("tensors"), torch.no_grad():
            return dict(getattr(self.inner, "tensors", lambda _: {})(parameters))


def choose(options: CustomOptions, named: str | None) -> Reference:
    """Which metric is meant, and may be run.

    Args:
        options: of the settings; their `path` is a record.
        named: what the user gave as --metric.

    Raises:
        UsageError: if nothing is named, a file is named by the settings alone, or the two differ.
    """
    if named is None:
        if not options.path:
            raise UsageError(
                "The task custom needs a metric.",
                "Give --metric FILE.py:Name, or the name of an installed one (`dpg metrics list`).",
            )
        reference = custom.parse_reference(options.path, "metric.path")
        if reference.file is not None:
            raise UsageError(
                f"These settings name the metric file {reference}; a file is never run on the word of settings.",
                f"If you trust it, name it yourself: --metric {pasted(str(reference))}",
            )
        return reference
    reference = custom.parse_reference(named)
    if options.path and (recorded := custom.parse_reference(options.path, "metric.path")).name != reference.name:
        raise UsageError(
            f"These settings are for the metric {recorded.name!r}, not {reference.name!r}.", "Name that one."
        )
    return reference


def build_custom(options: CustomOptions, target: LanguageModel, named: str | None) -> UserMetric:
    """Load, make and try a custom metric.

    Args:
        options: of the settings.
        target: before fine-tuning.
        named: what the user gave as --metric; without it only installed metrics are loaded.

    Raises:
        UsageError: for whatever is wrong with it, in one line.
    """
    reference = choose(options, named)
    factory = custom.load(reference)
    if options.sha256 and options.sha256 != factory.sha256:
        raise UsageError(
            f"{reference} is not the file that these settings were made with: its sha256 begins with "
            f"{factory.sha256[:12] or '(none)'}, the recorded one with {options.sha256[:12]}.",
            f"Restore it, or read and name the copy in the run folder: --metric RUN/metric.py:{reference.name}",
        )
    custom.check_call(factory, target, options.options)
    made = UserMetric(None, factory)
    with made.blame("its construction"):
        inner = factory.make(target, **options.options)
    check_methods(inner, factory)
    metric = (PicturedUserMetric if hasattr(inner, "picture") else UserMetric)(inner, factory)
    trial(metric, target)
    return metric


def check_methods(inner: Any, factory: Factory) -> None:
    """Refuse an object that lacks a part of the protocol.

    Raises:
        UsageError: naming the part.
    """
    base = "Derive it from dpg_cli.metrics.base.Metric, or add it."
    if isinstance(inner, type) or not callable(inner) or isinstance(inner, Tensor):
        kind = f"the class {inner.__name__}" if isinstance(inner, type) else f"a {type(inner).__name__}"
        raise UsageError(f"{factory.reference} made {kind}, which is no metric: it cannot be called.", base)
    for name in ("measures", "describe"):
        if not callable(getattr(inner, name, None)):
            raise UsageError(f"The metric {factory.reference} has no method {name!r}.", base)


def trial(metric: UserMetric, target: LanguageModel) -> None:
    """Call every part of a metric once at θ_0.

    Raises:
        UsageError: for a value that is no finite scalar with a finite gradient, for measures that are no numbers or take
            a reserved name, for an empty description, and for a picture that is none.
    """
    who = f"The metric {metric.factory.reference}"
    leaves = {
        name: parameter.detach().requires_grad_()
        for name, parameter in target.model.named_parameters()
        if parameter.requires_grad
    }
    value = metric(leaves, target.model)
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{who} gave a {type(value).__name__}, not a tensor.", "Return the tensor itself, without float()."
        )
    if value.ndim != 0 or not value.is_floating_point():
        raise UsageError(
            f"{who} gave a tensor of shape {tuple(value.shape)} and type {value.dtype}.",
            "Φ is one real number: take a mean or a sum.",
        )
    if not math.isfinite(value.item()):
        raise UsageError(f"{who} is {value.item()} before any fine-tuning.", "Correct it: Φ must be finite.")
    check_gradient(metric, value, leaves, who)
    parameters = {name: leaf.detach() for name, leaf in leaves.items()}
    check_measures(metric, parameters, target.model, who)
    if not metric.describe():
        raise UsageError(f"{who} has an empty description.", "Let describe() say what its data is for.")
    if isinstance(metric, PicturedUserMetric):
        if not isinstance(metric.picture(parameters), Image.Image):
            raise UsageError(f"{who} draws no PIL image.", "Let picture() return a PIL.Image.Image.")
        if not all(isinstance(part, Tensor) for part in metric.tensors(parameters).values()):
            raise UsageError(f"{who} keeps something that is no tensor.", "Let tensors() return tensors by name.")


def check_gradient(metric: UserMetric, value: Tensor, leaves: dict[str, Tensor], who: str) -> None:
    """Refuse a value that does not depend on the parameters, or whose gradient is not finite."""
    alone = (
        "Compute it from `parameters`: call the target as functional_call(model, parameters, ...), and detach nothing."
    )
    if not value.requires_grad:
        raise UsageError(f"{who} has no graph to the target's parameters.", alone)
    with metric.blame("its backward pass"):
        grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    reached = {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}
    if not reached:
        raise UsageError(f"{who} does not depend on the target's parameters.", alone)
    for name, grad in reached.items():
        if not torch.isfinite(grad).all():
            raise UsageError(
                f"{who} has a gradient by {name} that is not finite.",
                "A root or a quotient at zero? Add a small constant inside it.",
            )


def check_measures(metric: UserMetric, parameters: dict[str, Tensor], model: nn.Module, who: str) -> None:
    """Refuse measures that are no finite numbers, or that would overwrite a figure of the log."""
    for name, number in metric.measures(parameters, model).items():
        if not name.isprintable() or not name or name in RESERVED or name.startswith("policy_"):
            raise UsageError(f"{who} has a measure named {name!r}, which is taken or not printable.", "Rename it.")
        if not math.isfinite(number):
            raise UsageError(f"{who} has the measure {name} = {number} before any fine-tuning.", "Correct it.")
