"""Float64 everywhere: many models round to float32 within (norms, softmax, rotary tables, scans), which finite differences see.

Within `Exact`, float32 asked for by name is float64. It changes what models compute by rounding alone, and is in force for
the stock run and for ours alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _wide(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if type(value) in (list, tuple):
        return type(value)(_wide(part) for part in value)
    return value


class Exact(TorchFunctionMode):
    """Within this context, `.float()`, `.to(torch.float32)` and `dtype=torch.float32` mean float64, and so does the default."""

    def __enter__(self) -> Any:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        torch.set_default_dtype(self.before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return torch.Tensor.double(*args)
        return func(*_wide(tuple(args)), **{key: _wide(value) for key, value in (kwargs or {}).items()})
