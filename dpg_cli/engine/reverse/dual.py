"""The dual pass's own rules: PyTorch calls that are replaced by the closed forms of `forms/`.

The dual pass differentiates a forward-mode tangent in reverse. PyTorch 2.13 cannot do that through softmax (its tangent
formula modifies a saved tensor in place) nor through the fused attention kernels (which have no tangent at all), and the
reverse of its layer-norm tangent is wrong without a word (it takes mean and scale for constants). Linear maps and
activations it can do, but with more passes over memory than they need. So `DualMode` intercepts these calls, takes primal
and tangent apart, and computes both by one autograd function with a hand-derived reverse. Everything else keeps PyTorch's
own rules.
"""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.remembered import Piece
from dpg_cli.engine.reverse.forms.table import REPLACED


class DualMode(TorchFunctionMode):
    """Within this context, the calls of the table of forms work on dual tensors, with a right reverse.

    Args:
        precision: of the linear maps, see `product.py`.
        piece: what the inner step's linear maps left of these rows.
    """

    def __init__(self, precision: Precision = "float32", piece: Piece | None = None) -> None:
        super().__init__()
        self.precision, self.piece = precision, piece

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = REPLACED.get(func)
        if found is None:
            return func(*args, **kwargs)
        dual, with_products = found
        if with_products:
            return dual(*args, **kwargs, precision=self.precision, piece=self.piece)
        return dual(*args, **kwargs)
