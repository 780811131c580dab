"""The dual pass's own rules: PyTorch calls that are replaced by the closed forms of `forms/`.

The dual pass differentiates a forward-mode tangent in reverse. PyTorch 2.13 cannot do that through softmax (its tangent
formula modifies a saved tensor in place) nor through the fused attention kernels (which have no tangent at all), and the
reverse of its layer-norm tangent is wrong without a word (it takes mean and scale for constants). Linear maps and
activations it can do, but with more passes over memory than they need. So `DualMode` intercepts these calls, takes primal
and tangent apart, and computes both by one autograd function with a hand-derived reverse. Everything else keeps PyTorch's
own rules.

Where a model cuts its gradient (`detach`, `no_grad`, the `padding_idx` of an embedding), the g of the inner run is that of
stock PyTorch, not the derivative of the loss: g = Jᵀ c with another J. Its directional derivative <d, g> needs the tangents
of that J, which are cut where the gradient is; but the derivative of <d, g> by θ is the true one, in which what was cut
depends on θ like anything else. So here cut values keep their graph and lose their tangent (`inner/cuts.py` has the same
for the metric, which has no tangents).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dpg_cli.engine.inner.cuts import DETACHING, SWITCH
from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.remembered import Piece
from dpg_cli.engine.reverse.forms.table import REPLACED


def _cut(value: Any) -> Any:
    """The value without its tangent, its graph kept."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return forward_ad.unpack_dual(value).primal
    return value


class DualMode(TorchFunctionMode):
    """Within this context, the calls of the table of forms work on dual tensors, with a right reverse.

    Args:
        precision: of the linear maps, see `product.py`.
        piece: what the inner step's linear maps left of these rows.
    """

    def __init__(self, precision: Precision = "float32", piece: Piece | None = None) -> None:
        super().__init__()
        self.precision, self.piece = precision, piece
        self.enabled = True  # not torch's own flag, which is off within an autograd function too

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SWITCH:
            self.enabled = args[0]
        elif not self.enabled:
            return self._without_gradient(func, args, kwargs)
        if func in DETACHING:
            return _cut(args[0])
        found = REPLACED.get(func)
        if found is None:
            return func(*args, **kwargs)
        dual, with_products = found
        if with_products:
            return dual(*args, **kwargs, precision=self.precision, piece=self.piece)
        return dual(*args, **kwargs)

    def _without_gradient(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call under the model's own `no_grad`: no tangents, but a graph."""
        if self.piece is not None and func in (torch.nn.functional.linear, torch.addmm):
            weight = args[1] if func is torch.nn.functional.linear else args[2].mT
            self.piece.next(weight)  # the first-order pass has counted it
        with torch.enable_grad():
            return func(*tree_map(_cut, args), **tree_map(_cut, kwargs))
