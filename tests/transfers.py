"""Counting what waits for a device: every place where a number or a shape goes from tensors to Python, by the function that asks.

On a GPU each of these lets the host wait until all that was launched is done. They are counted on the CPU: scalars that are read
(`float(x)`, `.item()`, `bool(x)`), shapes that depend on values (`nonzero`, a boolean index), and tensors that become lists or arrays.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HOUSE = Path(__file__).parent.parent / "dpg_cli"
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"}
SHAPES = {"aten::nonzero", "aten::masked_select", "aten::unique_consecutive", "aten::_unique2"}


def place(frame: FrameType | None) -> str:
    """The innermost function of ours that is at work: `room/module.py:function`."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(HOUSE):
            name = frame.f_code.co_name
            if not name.startswith("<"):  # a comprehension belongs to its function
                return f"{path.relative_to(HOUSE)}:{name}"
        frame = frame.f_back
    return "elsewhere"


class Transfers(TorchDispatchMode):
    """Counts them while it is on.

    Attributes:
        counts: by place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        masked = name in ("aten::index", "aten::index_put_", "aten::index_put") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if (masked and name == "aten::index") or name in READS or name in SHAPES:
            self.counts[place(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))

    def also(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count what no operator tells: lists and arrays of whole tensors, and copies to the host."""

        def counted(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
                self.counts[place(sys._getframe(1))] += 1
                return method(tensor, *arguments, **named)

            return call

        for name in ("tolist", "cpu", "numpy"):
            monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
