"""The second-order pass of the target over a batch, by micro-batches: token credits and the Hessian-vector product.

It takes the closed forms of `forms/`, put in place by `dual.py`, and where the LM head is a standard one those of
`head.py`; else it goes through the model's logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpg_cli.engine.inner.attention.served import in_slabs
from dpg_cli.engine.inner.head import Head
from dpg_cli.engine.inner.packing import unpack
from dpg_cli.engine.inner.remembered import Piece, Remembered
from dpg_cli.engine.inner.target import Labelled, TargetRun, backward, fused_activations, hidden_of, logits_of
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.dual import DualMode
from dpg_cli.engine.reverse.head import second_order
from dpg_cli.engine.soft import LabelSink


@dataclass(frozen=True)
class DualResult:
    """What a direction d in parameter space says of a batch.

    Attributes:
        token_B_S: <d, ∇ℓ_is>, mask_is / Z applied, without the data weights; column 0 is zero, and so are rows of
            other ranks.
        label_B_S_V: the same for every label, or None.
        hvp: ∇_θ <d, ∇L(θ)> of the whole batch, shape (n,), or None.
        factor_B_S_2D: what every label's credit is made of (`soft.py`): the hidden state that predicts each token, and its tangent;
            zero where nothing is trained and on rows of other ranks; None unless asked for.
    """

    token_B_S: Tensor
    label_B_S_V: Tensor | None
    hvp: Tensor | None
    factor_B_S_2D: Tensor | None = None


def dual_pass(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    weights_B: Tensor,
    *,
    need_hvp: bool,
    need_labels: bool | Literal["factors"],
    hvp_into: Tensor | None = None,
    remembered: Remembered | None = None,
    sink: LabelSink | None = None,
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
        need_labels: also keep the credit of every label, or what it is made of: "factors", of a standard head alone.
        hvp_into: add the product here instead of to new zeros.
        remembered: what `loss_gradient` left of this batch at this θ with these weights; used up.
        sink: is given the credits of every label chunk by chunk, where the batch has distributions (`Examples.soft`).
    """
    scale, whole = 1.0 / run.normalizer(batch), batch
    batch = run.arranged(batch)
    hvp = None
    if need_hvp:
        # over ranks only the product is summed, not what it is added to
        hvp = torch.zeros_like(theta) if hvp_into is None or run.ranks.world > 1 else hvp_into
    tokens = theta.new_zeros(batch.ids_N_S.shape)
    every: Tensor | None = None
    factored: Tensor | None = None
    leaves, tangents = run.leaves(theta, hvp), run.space.views(direction)
    head = run.head
    for rows, piece in run.pieces(batch):
        made = None if remembered is None else remembered.next()
        with (
            torch.enable_grad(),  # `DualMode` tells the model's own no_grad by it; without `into` no leaf asks for a graph
            in_slabs(run.model, piece.ids_N_S.shape[1], run.slabs),
            forward_ad.dual_level(),
            DualMode(run.precision, made),
            fused_activations(run.model),
        ):
            duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
            output = (
                logits_of(run.model, duals, piece, run.masked)
                if head is None
                else hidden_of(head, duals, piece, run.masked)
            )
            primal, tangent = forward_ad.unpack_dual(output)
            tangent = torch.zeros_like(primal) if tangent is None else tangent
            del duals, output
        # The reverse runs outside the dual level: inside it, saved tensors would still carry their tangents.
        marked = Labelled.of(piece, weights_B if piece.layout else weights_B[rows], scale)
        if need_labels is True and every is None:
            every = theta.new_zeros(*batch.ids_N_S.shape, primal.shape[-1] if head is None else head.layer.out_features)
        width = piece.ids_N_S.shape[1]
        piece_every = None if every is None else every[rows]
        if head is None:
            bars = from_logits(primal, tangent, piece, marked, tokens[rows, :width], piece_every, need_hvp, sink)
        else:
            if need_labels == "factors":
                factored = factors_into(factored, primal, tangent, marked, batch, rows, width)
            known = None if made is None else made.hidden_bar
            bars, credit_M = _head_second_order(
                head, leaves, tangents, primal, tangent, marked, piece_every, need_hvp, known, sink, made
            )
            tokens[rows, :width] = marked.spread(credit_M, piece.ids_N_S)
        if bars is not None:
            backward(list(zip((primal, tangent), bars, strict=True)), leaves)
    if hvp is not None and hvp is not hvp_into:
        run.ranks.sum_(hvp)
        hvp = hvp if hvp_into is None else hvp_into.add_(hvp)
    if batch.layout is not None:
        tokens, every = unpack(tokens, batch, whole), None if every is None else unpack(every, batch, whole)
        factored = None if factored is None else unpack(factored, batch, whole)
    return DualResult(tokens, every, hvp, factored)


def factors_into(
    total: Tensor | None, hidden: Tensor, tangent: Tensor, marked: Labelled, batch: Examples, rows: slice, width: int
) -> Tensor:
    """Put a piece's hidden states and tangents, those that predict its labelled tokens, where the tokens are, (B, S, 2D).

    Args:
        total: of the batch; made where there is none yet.
        hidden, tangent: of the piece, (b, s, D), or of its labelled tokens alone, (M, D).
        marked: its labelled tokens.
        batch: which the piece is of.
        rows: its rows there.
        width: its columns.
    """
    size = hidden.shape[-1]
    if total is None:
        total = hidden.new_zeros(*batch.ids_N_S.shape, 2 * size)
    after = marked.places_M
    row, column = torch.div(after, width, rounding_mode="floor") + rows.start, after % width
    for number, values in enumerate((hidden.detach(), tangent.detach())):
        chosen = values if values.ndim == 2 else values.reshape(-1, size)[marked.before_M]
        total[row, column, number * size : (number + 1) * size] = chosen
    return total


def _head_second_order(
    head: Head,
    leaves: dict[str, Tensor],
    tangents: dict[str, Tensor],
    hidden: Tensor,
    tangent: Tensor,
    marked: Labelled,
    every: Tensor | None,
    need_hvp: bool,
    known: Tensor | None,
    sink: LabelSink | None,
    made: Piece | None,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """The adjoints of a piece's hidden states and tangents (`known`, or None), and the credits of its labelled tokens.

    The head's own adjoints go to the leaves' `.grad`, the credits of every label to `every` (rows, S, V).
    """
    width = hidden.shape[-1]
    flat, flat_t = hidden.detach().reshape(-1, width), tangent.detach().reshape(-1, width)
    weight, bias = head.parameters(leaves)
    places = None
    if every is not None:  # its rows may be longer than the piece's
        after, length = marked.places_M, hidden.shape[1]
        places = torch.div(after, length, rounding_mode="floor") * every.shape[1] + after % length
    result = second_order(
        flat[marked.before_M],
        flat_t[marked.before_M],
        weight.detach(),
        tangents.get(head.weight),
        None if bias is None else bias.detach(),
        None if head.bias is None else tangents.get(head.bias),
        marked.ids_M,
        marked.weighted_M,
        need_hvp=need_hvp,
        weight_into=weight.grad,
        bias_into=None if bias is None else bias.grad,
        mask_M=marked.mask_M,
        labels_into=None if every is None else every.view(-1, every.shape[-1]),
        places_M=places,
        tangent_bar=known,
        expected=marked.expected,
        sink=sink,
    )
    if result.hidden_bar is None or result.tangent_bar is None:
        return None, result.token_M
    if made is not None and made.room.recording:
        made.keep_hidden_bar(result.tangent_bar)
    first, second = (marked.gathered(bar, hidden) for bar in (result.hidden_bar, result.tangent_bar))
    return (first, second), result.token_M


@torch.no_grad()
def from_logits(
    logits: Tensor,
    tangent: Tensor,
    piece: Examples,
    marked: Labelled,
    token_to: Tensor,
    every: Tensor | None,
    need_hvp: bool,
    sink: LabelSink | None,
) -> tuple[Tensor, Tensor] | None:
    """The same from the model's own logits: credits into `token_to`, and the adjoints of logits and tangents."""
    probs = torch.softmax(logits.detach(), -1)
    centred = tangent.detach() - (probs * tangent.detach()).sum(-1, keepdim=True)
    labels = piece.ids_N_S[:, 1:, None]
    flat, places = probs.new_zeros(piece.ids_N_S.numel()), marked.places_M
    factor = flat.index_copy(0, places, marked.mask_M).view(piece.ids_N_S.shape)[:, 1:]
    target = None  # what p is compared with, where it is a distribution
    if marked.trained is not None:
        width = probs.shape[-1]
        target = probs.new_zeros(piece.ids_N_S.numel(), width).index_copy_(0, places, marked.trained.q(slice(None)))
        target = target.view(*piece.ids_N_S.shape, width)[:, 1:]
    found = centred.gather(-1, labels).squeeze(-1) if target is None else torch.linalg.vecdot(target, centred)
    token_to[:, 1:] = -found * factor
    if every is not None:
        every[:, 1 : piece.ids_N_S.shape[1]] = centred.mul(-factor[..., None])
    if sink is not None and marked.expected is not None:
        credit = torch.nn.functional.pad(centred, (0, 0, 0, 1)).flatten(0, 1)[marked.before_M]
        credit.mul_(-marked.mask_M[:, None])
        q = marked.expected.q(slice(None))
        sink.add(marked.expected.labels, marked.expected.places_M, marked.ids_M, q, credit)
    if not need_hvp:
        return None
    weighted = flat.index_copy(0, places, marked.weighted_M).view(piece.ids_N_S.shape)[:, 1:, None]
    logits_bar = centred.mul_(probs).mul_(weighted)
    if target is None:
        probs.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=probs.dtype))
    else:
        probs.sub_(target)
    return logits_bar, probs.mul_(weighted)
