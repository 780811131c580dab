"""The dual pass's own rules: which PyTorch calls are replaced by the closed forms of `dual_forms.py`.

The dual pass differentiates a forward-mode tangent in reverse. PyTorch 2.13 cannot do that through softmax (its tangent
formula modifies a saved tensor in place) nor through the fused attention kernels (which have no tangent at all), and the
reverse of its layer-norm tangent is wrong without a word (it takes mean and scale for constants). Linear maps and
activations it can do, but with more passes over memory than they need. So `DualMode` intercepts these calls, takes primal
and tangent apart, and computes both by one autograd function with a hand-derived reverse. Everything else keeps PyTorch's
own rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from dpg_cli.engine.inner.product import Precision
from dpg_cli.engine.inner.remembered import Piece
from dpg_cli.engine.reverse.forms import Activation, Attention, LayerNorm, Linear, Softmax


def _split(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Primal and tangent of a dual tensor, zeros where it has none."""
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def dual_softmax(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """`torch.softmax` on dual tensors."""
    moved = scores.to(dtype) if dtype is not None else scores
    primal, tangent = _split(moved.movedim(dim, -1))
    return forward_ad.make_dual(*Softmax.apply(primal, tangent)).movedim(-1, dim)


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` on dual tensors.

    Raises:
        ValueError: for dropout, which the metagradient of a deterministic run has no place for.
    """
    if dropout_p:
        raise ValueError("attention dropout must be off in the dual pass; call model.eval()")
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if key.shape[:-2] != query.shape[:-2]:  # multi-query attention: one head of keys for all
        key, value = (part.expand(*query.shape[:-2], *part.shape[-2:]) for part in (key, value))
    bias = None
    if is_causal or attn_mask is not None:
        keep = attn_mask
        if keep is None:
            keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        if keep.dtype == torch.bool:
            bias = torch.zeros(keep.shape, dtype=query.dtype, device=query.device).masked_fill_(~keep, -torch.inf)
        else:
            bias = keep.detach()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = [part for tensor in (query, key, value) for part in _split(tensor)]
    return forward_ad.make_dual(*Attention.apply(*parts, bias, scale))


def dual_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """`torch.nn.functional.layer_norm` on dual tensors.

    Raises:
        NotImplementedError: for a normalisation over more than the last axis, which no language model here uses.
    """
    if len(normalized_shape) != 1:
        raise NotImplementedError(f"layer norm over {len(normalized_shape)} axes has no dual form here")
    weight = x.new_ones(normalized_shape[0]) if weight is None else weight
    bias = x.new_zeros(normalized_shape[0]) if bias is None else bias
    return forward_ad.make_dual(*LayerNorm.apply(*_split(x), *_split(weight), *_split(bias), eps))


def _parts(tensor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Primal and tangent of a dual tensor, None where it has none."""
    if tensor is None:
        return None, None
    primal, tangent = forward_ad.unpack_dual(tensor)
    return primal, tangent


def dual_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    precision: Precision = "float32",
    piece: Piece | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` on dual tensors."""
    if weight.ndim != 2:
        raise NotImplementedError(f"a linear map with a weight of {weight.ndim} axes has no dual form here")
    products = None if piece is None else piece.next(weight)
    return forward_ad.make_dual(*Linear.apply(*_parts(x), *_parts(weight), *_parts(bias), precision, products))


def dual_addmm(
    bias: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    precision: Precision = "float32",
    piece: Piece | None = None,
) -> Tensor:
    """`torch.addmm` on dual tensors: what GPT-2 calls its linear maps by."""
    if beta != 1 or alpha != 1 or bias.ndim != 1:
        return torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
    return dual_linear(x, weight.mT, bias, precision=precision, piece=piece)


def dual_gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu` on dual tensors."""
    return forward_ad.make_dual(*Activation.apply(*_split(x), "gelu_tanh" if approximate == "tanh" else "gelu"))


def dual_silu(x: Tensor, inplace: bool = False) -> Tensor:
    """`torch.nn.functional.silu` on dual tensors."""
    return forward_ad.make_dual(*Activation.apply(*_split(x), "silu"))


_REPLACED: dict[Any, Any] = {
    torch.nn.functional.linear: dual_linear,
    torch.addmm: dual_addmm,
    torch.nn.functional.gelu: dual_gelu,
    torch.nn.functional.silu: dual_silu,
    torch.nn.functional.layer_norm: dual_layer_norm,
    torch.layer_norm: dual_layer_norm,
    torch.nn.functional.scaled_dot_product_attention: dual_attention,
    torch.softmax: dual_softmax,
    torch.Tensor.softmax: dual_softmax,
}


class DualMode(TorchFunctionMode):
    """Within this context, the calls of `_REPLACED` work on dual tensors, with a right reverse.

    Args:
        precision: of the linear maps, see `product.py`.
        piece: what the inner step's linear maps left of these rows.
    """

    def __init__(self, precision: Precision = "float32", piece: Piece | None = None) -> None:
        super().__init__()
        self.precision, self.piece = precision, piece

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax:
            kwargs.pop("_stacklevel", None)
            return dual_softmax(*args, **kwargs)
        if func in (torch.nn.functional.linear, torch.addmm):
            kwargs |= {"precision": self.precision, "piece": self.piece}
        return _REPLACED.get(func, func)(*args, **kwargs)
