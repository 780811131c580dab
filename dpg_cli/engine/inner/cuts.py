"""Where a model's gradient is not the derivative of its forward: what is cut, and the true derivative of the metric.

Some models cut their gradient on purpose: an embedding's `padding_idx` (transformers gives every embedding the padding
token's), `detach` in a straight-through estimator or a gate, `no_grad` around all but the last of several loops. Stock
training follows the gradient that is left, and so does the inner run. But Φ(θ_T) depends on θ_T through what was cut too,
as finite differences do, so ∂Φ/∂θ_T must not be cut. `TrueMode` leaves out the cuts of the model alone: what the metric
itself detaches stays detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dpg_cli.errors import UsageError

DETACHING: frozenset[Any] = frozenset((torch.Tensor.detach, torch.detach, torch.Tensor.data.__get__))  # type: ignore[attr-defined]
SWITCH = torch._C._set_grad_enabled  # what `no_grad` calls at its beginning and at its end


def refuse_embedding(max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """Refuse the options of an embedding that no metagradient here follows.

    Raises:
        UsageError: naming the option.
    """
    if max_norm is not None:
        raise UsageError(
            "An embedding of the target has max_norm: its forward pass changes its own weights, which no gradient sees.",
            "Set max_norm = None on it.",
        )
    if scale_grad_by_freq:
        raise UsageError(
            "An embedding of the target has scale_grad_by_freq: its gradient depends on what else is in the micro-batch.",
            "Set scale_grad_by_freq = False on it.",
        )


class TrueMode(TorchFunctionMode):
    """Within this context nothing is cut: `detach`, `no_grad` and `padding_idx` leave the graph as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True  # not torch's own flag, which is off within an autograd function too

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DETACHING:
            return args[0].view_as(args[0])
        if func is torch.nn.functional.embedding:
            return _whole_embedding(*args, **kwargs)
        if func is SWITCH:
            self.enabled = args[0]
        elif not self.enabled:
            return self._whole(func, args, kwargs)
        return func(*args, **kwargs)

    def _whole(self, func: Any, args: Any, kwargs: Any) -> Any:
        with torch.enable_grad():
            return func(*args, **kwargs)


def _whole_embedding(
    ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, *others: Any, **named: Any
) -> torch.Tensor:
    return nn.functional.embedding(ids, weight)


_trying: ContextVar[bool] = ContextVar("trying", default=False)


@contextmanager
def trying() -> Iterator[None]:
    """Within this context the engine itself calls a model to see what it is."""
    token = _trying.set(True)
    try:
        yield
    finally:
        _trying.reset(token)


@contextmanager
def true_derivative(model: nn.Module, carries: Callable[[], bool] = bool) -> Iterator[None]:
    """Within this context the model and its backbone are differentiated truly, where gradients are asked for at all.

    Args:
        model: what a metric is given.
        carries: whether the model's own parameters are just now those of θ_T, by `params.carrying`.

    Raises:
        UsageError: if the model itself is called under `no_grad` while it carries θ_T: it was once the way to θ_0.
    """
    parts = {id(part): part for part in (model, getattr(model, "base_model", model)) if isinstance(part, nn.Module)}

    def whole(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                with TrueMode():
                    return forward(*args, **kwargs)
            if carries() and not _trying.get():
                raise UsageError(
                    "The metric calls model(...) under no_grad: the model carries the weights after fine-tuning.",
                    "For what the untouched target gives, call it when the metric is made, and keep the result.",
                )
            return forward(*args, **kwargs)

        return call

    before = {key: part.__dict__.get("forward") for key, part in parts.items()}
    for part in parts.values():
        part.forward = whole(part.forward)
    try:
        yield
    finally:
        for key, part in parts.items():
            own = before[key]
            if own is None:
                del part.forward
            else:
                part.forward = own


def reached_from(value: torch.Tensor) -> set[int]:
    """The ids of the leaves in which the graph of a value ends."""
    seen: set[Any] = set()
    found: set[int] = set()
    waiting: list[Any] = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found
