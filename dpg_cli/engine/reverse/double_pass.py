"""The dual pass's numbers by reverse over reverse, for models that PyTorch cannot differentiate forwards.

Some models have autograd functions of their own (Bloom, RecurrentGemma), which have a backward but no tangent. For them

    z(θ) logits        c(z) = ∂L/∂z, closed form        G = Jᵀ c, by autograd with a graph        s = <d, G>

and one more reverse through all that gives ż = ∂s/∂c, since G is linear in c with the matrix Jᵀ, and ∂s/∂θ, the
Hessian-vector product. ż gives the credits as in `dual_pass.py`. The numbers are the same to rounding; a graph of the
backward is held besides the forward's, and neither closed forms nor remembered products are used.

G is taken by an alias of each parameter, ∂s/∂θ by the parameter itself. So an embedding that gives its padding row no
gradient is read twice: at θ, which s is differentiated by truly, and at a zero beside it, whose gradient is cut as stock
PyTorch cuts it. Models that cut their gradient elsewhere are refused here (`selfcheck.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dpg_cli.engine.inner.cuts import DETACHING, SWITCH, refuse_embedding
from dpg_cli.engine.inner.target import Labelled, TargetRun, fused_activations, logits_of
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.dual_pass import DualResult, from_logits
from dpg_cli.engine.soft import LabelSink
from dpg_cli.errors import UsageError

CUTTING = (
    "The target has autograd functions without a forward derivative, and cuts its gradient besides (detach or no_grad): "
    "no second derivative of it is right here."
)
BLANK = frozenset(  # what takes the shape of a tensor alone
    (
        torch.zeros_like,
        torch.ones_like,
        torch.empty_like,
        torch.full_like,
        torch.Tensor.new_zeros,
        torch.Tensor.new_ones,
        torch.Tensor.new_empty,
        torch.Tensor.new_full,
        torch.Tensor.new_tensor,
    )
)


def _any_float(made: Any) -> bool:
    return any(isinstance(one, Tensor) and one.is_floating_point() for one in tree_leaves(made))


class DoubleMode(TorchFunctionMode):
    """Within this context embeddings with a padding row are read twice, and cut gradients are refused.

    Args:
        leaves: θ by name; aliases: what the model is called with.
    """

    def __init__(self, leaves: dict[str, Tensor], aliases: dict[str, Tensor]) -> None:
        super().__init__()
        self.leaves = leaves
        self.names = {id(alias): name for name, alias in aliases.items()}
        self.beside: dict[str, Tensor] = {}
        self.enabled = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.embedding:
            return self._embedding(*args, **kwargs)
        if func is SWITCH:
            self.enabled = args[0]
        made = func(*args, **kwargs)
        if (func in DETACHING or not self.enabled) and func not in BLANK and _any_float(made):
            given = (*args, *kwargs.values())
            if any(isinstance(one, Tensor) and one.requires_grad for one in given):
                raise UsageError(CUTTING, "Load a variant of the model without them.")
        return made

    def _embedding(
        self,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        refuse_embedding(max_norm, scale_grad_by_freq)
        name = self.names.get(id(weight))
        if padding_idx is None or not weight.requires_grad:
            return nn.functional.embedding(ids, weight)
        if name is None:  # a weight that is computed from parameters
            raise UsageError(CUTTING, "Set padding_idx = None on its embedding.")
        if name not in self.beside:
            self.beside[name] = torch.zeros_like(weight, requires_grad=True)
        cut = nn.functional.embedding(ids, self.beside[name], padding_idx)
        return nn.functional.embedding(ids, self.leaves[name]) + cut


def double_pass(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    weights_B: Tensor,
    *,
    need_hvp: bool,
    need_labels: bool | Literal["factors"],
    hvp_into: Tensor | None = None,
    sink: LabelSink | None = None,
) -> DualResult:
    """What `dual_pass` gives, by double backward; its arguments are the same.

    Raises:
        UsageError: if the model cuts its gradient where this pass does not follow.
    """
    scale = 1.0 / run.normalizer(batch)
    hvp = None
    if need_hvp:
        hvp = torch.zeros_like(theta) if hvp_into is None or run.ranks.world > 1 else hvp_into
    tokens = theta.new_zeros(batch.ids_N_S.shape)
    every: Tensor | None = None
    for rows, piece in run.pieces(batch):
        leaves = run.leaves(theta, torch.zeros_like(theta) if hvp is None else hvp)
        aliases = {name: leaf.view_as(leaf) for name, leaf in leaves.items()}
        mode = DoubleMode(leaves, aliases)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), fused_activations(run.model):
            with mode:
                logits = logits_of(run.model, aliases, piece, run.masked)
            marked = Labelled.of(piece, weights_B[rows], scale)
            bar = logits_bar(logits if need_hvp else logits.detach(), piece, marked)
            if not bar.requires_grad:
                bar.requires_grad_()
            tangent = _differentiate(logits, bar, aliases, mode.beside, run.space.views(direction), leaves, need_hvp)
        if need_labels and every is None:
            every = theta.new_zeros(*batch.ids_N_S.shape, logits.shape[-1])
        width = piece.ids_N_S.shape[1]
        piece_every = None if every is None else every[rows]
        from_logits(logits, tangent, piece, marked, tokens[rows, :width], piece_every, False, sink)
    if hvp is not None and hvp is not hvp_into:
        run.ranks.sum_(hvp)
        hvp = hvp if hvp_into is None else hvp_into.add_(hvp)
    return DualResult(tokens, every, hvp)


def logits_bar(logits: Tensor, piece: Examples, marked: Labelled) -> Tensor:
    """c (p - e_y), or c (p - q) where distributions are trained on; zero where no label is; differentiable by the logits."""
    size = logits.shape[-1]
    factor = logits.new_zeros(piece.ids_N_S.numel()).index_copy(0, marked.places_M, marked.weighted_M)
    if marked.trained is None:
        chosen = nn.functional.one_hot(piece.ids_N_S[:, 1:].clamp(0, size - 1), size).to(logits)
    else:
        chosen = logits.new_zeros(piece.ids_N_S.numel(), size)
        chosen.index_copy_(0, marked.places_M, marked.trained.q(slice(None)).to(logits))
        chosen = chosen.view(*piece.ids_N_S.shape, size)[:, 1:]
    return (torch.softmax(logits, -1) - chosen) * factor.view(piece.ids_N_S.shape)[:, 1:, None]


def _differentiate(
    logits: Tensor,
    bar: Tensor,
    aliases: dict[str, Tensor],
    beside: dict[str, Tensor],
    directions: dict[str, Tensor],
    leaves: dict[str, Tensor],
    need_hvp: bool,
) -> Tensor:
    """ż; ∂s/∂θ is added to the leaves' gradients where it is needed."""
    by = [*aliases.values(), *beside.values()]
    along = [directions[name] for name in (*aliases, *beside)]
    grads = torch.autograd.grad(logits, by, bar, create_graph=True, allow_unused=True)
    slope = sum(
        ((grad * d).sum() for grad, d in zip(grads, along, strict=True) if grad is not None),
        start=logits.new_zeros(()),
    )
    if not slope.requires_grad:
        return torch.zeros_like(logits)
    needed = [bar, *leaves.values()] if need_hvp else [bar]
    found = torch.autograd.grad(slope, needed, allow_unused=True)
    for leaf, grad in zip(leaves.values(), found[1:], strict=False):
        if grad is not None and leaf.grad is not None:
            leaf.grad.add_(grad)
    return torch.zeros_like(logits) if found[0] is None else found[0]
