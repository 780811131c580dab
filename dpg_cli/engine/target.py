"""First- and second-order passes of the target over a batch, by micro-batches.

Everything here works on any Hugging Face causal LM (a module whose call with `input_ids` and `attention_mask` returns
`.logits`). The first-order pass keeps the fast attention kernel; the dual pass takes the closed forms of `dual.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from dpg_cli.engine.dual import DualMode
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.records import Examples

Normalization = Literal["token", "example"]


@dataclass(frozen=True)
class TargetRun:
    """A target with the fixed choices of its inner run.

    Attributes:
        model: the causal LM; its own parameters are never changed by the passes.
        space: its parameters as a flat vector.
        normalization: Z_t = valid tokens of the batch ("token"), or B × length, pads counted as zero ("example").
        length: sequence length of the examples, pads included; used by "example" alone.
        micro_batch: rows in memory at once; 0 takes all.
    """

    model: nn.Module
    space: ParameterSpace
    normalization: Normalization = "token"
    length: int = 1
    micro_batch: int = 0

    def normalizer(self, batch: Examples) -> float:
        """Z_t of a whole inner batch. It never depends on the data weights."""
        if self.normalization == "token":
            return float(max(1, int(batch.label_N_S.sum())))
        return float(len(batch) * self.length)

    def pieces(self, batch: Examples) -> Iterator[tuple[slice, Examples]]:
        """The batch in micro-batches, each cut to its longest row."""
        size = self.micro_batch or len(batch)
        for start in range(0, len(batch), size):
            yield slice(start, min(start + size, len(batch))), batch.rows(start, start + size)


def logits_of(model: nn.Module, parameters: dict[str, Tensor], piece: Examples) -> Tensor:
    """Logits that predict tokens 1 … S-1: shape (B, S-1, V)."""
    # Right-padded rows need no attention mask: a causal model never looks to the right, and pads carry no loss.
    output = functional_call(model, parameters, args=(), kwargs={"input_ids": piece.ids_N_S, "use_cache": False})
    return output.logits[:, :-1]


def loss_gradient(run: TargetRun, theta: Tensor, batch: Examples, weights_B: Tensor) -> tuple[Tensor, float]:
    """g = ∇_θ Σ_i w_i Σ_s mask_is ℓ_is / Z, and the loss itself.

    Args:
        run: the target and its settings.
        theta: θ, shape (n,).
        batch: one inner batch.
        weights_B: data weights.

    Returns:
        The gradient, shape (n,), and the weighted loss.
    """
    total = torch.zeros_like(theta)
    loss_sum = 0.0
    scale = 1.0 / run.normalizer(batch)
    for rows, piece in run.pieces(batch):
        leaves = {name: view.detach().requires_grad_() for name, view in run.space.views(theta).items()}
        logits = logits_of(run.model, leaves, piece)
        labels = piece.ids_N_S[:, 1:].masked_fill(~piece.label_N_S[:, 1:], -100)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        loss = (losses.sum(1) * weights_B[rows]).sum() * scale
        total += run.space.flatten(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True), theta)
        loss_sum += float(loss.detach())
    return total, loss_sum


@dataclass(frozen=True)
class DualResult:
    """What a direction d in parameter space says of a batch.

    Attributes:
        token_B_S: <d, ∇ℓ_is>, mask_is / Z applied, without the data weights; column 0 is zero.
        label_B_S_V: the same for every label, or None.
        hvp: ∇_θ <d, ∇L(θ)>, shape (n,), or None.
    """

    token_B_S: Tensor
    label_B_S_V: Tensor | None
    hvp: Tensor | None


def dual_pass(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    weights_B: Tensor,
    *,
    need_hvp: bool,
    need_labels: bool,
) -> DualResult:
    """Token credits and the Hessian-vector product in one forward-over-reverse pass (DESIGN §2, step 4).

    The tangent ż of the logits along d gives each token's credit, ℓ̇_is = Σ_u p_u ż_u - ż_y. The scalar
    Σ w ℓ̇ mask / Z = <d, ∇L> has closed-form derivatives c p ⊙ (ż - Σ p ż) by the logits and c (p - e_y) by their
    tangents, so that no derivative of log-softmax is ever formed by autograd; one reverse pass through the dual
    forward carries them to the parameters.

    Args:
        run: the target and its settings.
        theta: θ_t, shape (n,).
        direction: d = ḡ_t, shape (n,).
        batch: the inner batch of step t.
        weights_B: data weights.
        need_hvp: also reverse through the dual forward (not needed at t = 0).
        need_labels: also keep the credit of every label.
    """
    scale = 1.0 / run.normalizer(batch)
    hvp = torch.zeros_like(theta) if need_hvp else None
    tokens = theta.new_zeros(batch.ids_N_S.shape)
    every: Tensor | None = None
    for rows, piece in run.pieces(batch):
        with torch.set_grad_enabled(need_hvp), forward_ad.dual_level(), DualMode():
            primals = {name: view.detach().requires_grad_(need_hvp) for name, view in run.space.views(theta).items()}
            tangents = run.space.views(direction)
            duals = {name: forward_ad.make_dual(primal, tangents[name]) for name, primal in primals.items()}
            logits, tangent = forward_ad.unpack_dual(logits_of(run.model, duals, piece))
        # The reverse runs outside the dual level: inside it, saved tensors would still carry their tangents.
        tangent = torch.zeros_like(logits) if tangent is None else tangent
        with torch.no_grad():
            probs = torch.softmax(logits.detach(), -1)
            centred = tangent.detach() - (probs * tangent.detach()).sum(-1, keepdim=True)
            labels = piece.ids_N_S[:, 1:, None]
            factor = piece.label_N_S[:, 1:].to(probs.dtype) * scale
            width = piece.ids_N_S.shape[1]
            tokens[rows, 1:width] = -centred.gather(-1, labels).squeeze(-1) * factor
            if need_labels:
                if every is None:
                    every = theta.new_zeros(*batch.ids_N_S.shape, probs.shape[-1])
                every[rows, 1:width] = centred.mul(-factor[..., None])
            if hvp is None:
                continue
            weighted = (factor * weights_B[rows, None])[..., None]
            logits_bar = centred.mul_(probs).mul_(weighted)
            tangent_bar = probs.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=probs.dtype)).mul_(weighted)
        pieces = torch.autograd.grad(
            (logits, tangent), list(primals.values()), (logits_bar, tangent_bar), allow_unused=True
        )
        hvp += run.space.flatten(pieces, theta)
    return DualResult(tokens, every, hvp)
