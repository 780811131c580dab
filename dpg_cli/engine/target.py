"""First- and second-order passes of the target over a batch, by micro-batches.

Everything here works on any Hugging Face causal LM (a module whose call with `input_ids` returns `.logits`). The
first-order pass keeps the fast attention kernel; the dual pass takes the closed forms of `dual.py`. Where the LM head is a
standard one, both call the backbone alone and take the closed forms of `head.py`; else they go through the model's logits.
Gradients are accumulated in place, in views of one flat vector. Where several processes share a run, each takes its own
rows of a batch, and gradient and Hessian-vector product are summed over them; Z is the whole batch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from dpg_cli.engine.dual import DualMode, fused_activations
from dpg_cli.engine.head import Head, find_head, first_order, second_order
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.product import PlainMode, Precision
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples
from dpg_cli.engine.remembered import Piece, Remembered

Normalization = Literal["token", "example"]
CPU_TOKENS = 4096  # of an automatic micro-batch on the CPU: activations stay near the cores' caches


@dataclass(frozen=True)
class TargetRun:
    """A target with the fixed choices of its inner run.

    Attributes:
        model: the causal LM; its own parameters are never changed by the passes.
        space: its parameters as a flat vector.
        normalization: Z_t = valid tokens of the batch ("token"), or B × length, pads counted as zero ("example").
        length: sequence length of the examples, pads included; used by "example" alone.
        micro_batch: rows in memory at once; 0 takes about 4,096 tokens on the CPU, and all rows elsewhere.
        closed_head: take the LM head by closed forms where it is a standard one.
        precision: of the backbone's linear maps, see `product.py`.
        ranks: the processes that share the batches.
        head: that head, or None.
    """

    model: nn.Module
    space: ParameterSpace
    normalization: Normalization = "token"
    length: int = 1
    micro_batch: int = 0
    closed_head: bool = True
    precision: Precision = "float32"
    ranks: Ranks = ALONE
    head: Head | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "head", find_head(self.model) if self.closed_head else None)

    def normalizer(self, batch: Examples) -> float:
        """Z_t of a whole inner batch. It never depends on the data weights."""
        if self.normalization == "token":
            return float(max(1, int(batch.label_N_S.sum())))
        return float(len(batch) * self.length)

    def pieces(self, batch: Examples) -> Iterator[tuple[slice, Examples]]:
        """This rank's rows of the batch in micro-batches, each cut to its longest row."""
        own = self.ranks.shard(len(batch))
        rows = own.stop - own.start
        if not rows:
            return
        size = self.micro_batch
        if not size:
            size = max(1, CPU_TOKENS // batch.ids_N_S.shape[1]) if batch.ids_N_S.device.type == "cpu" else rows
        count = -(-rows // size)
        size = -(-rows // count)  # even ones
        for start in range(own.start, own.stop, size):
            stop = min(start + size, own.stop)
            yield slice(start, stop), batch.rows(start, stop)

    def leaves(self, theta: Tensor, into: Tensor | None) -> dict[str, Tensor]:
        """Views of θ by name to differentiate by; their gradients are added to `into` in place (None: no gradients)."""
        if into is None:
            return self.space.views(theta)
        leaves = {name: view.detach().requires_grad_() for name, view in self.space.views(theta).items()}
        for name, view in self.space.views(into).items():
            leaves[name].grad = view
        return leaves


def logits_of(model: nn.Module, parameters: dict[str, Tensor], piece: Examples) -> Tensor:
    """Logits that predict tokens 1 … S-1: shape (B, S-1, V)."""
    # Right-padded rows need no attention mask: a causal model never looks to the right, and pads carry no loss.
    output = functional_call(model, parameters, args=(), kwargs={"input_ids": piece.ids_N_S, "use_cache": False})
    return output.logits[:, :-1]


def hidden_of(head: Head, parameters: dict[str, Tensor], piece: Examples) -> Tensor:
    """The backbone's last hidden state, shape (B, S, D)."""
    kwargs = {"input_ids": piece.ids_N_S, "use_cache": False}
    return functional_call(head.base, head.base_parameters(parameters), (), kwargs).last_hidden_state


@dataclass(frozen=True)
class Labelled:
    """The trained tokens of a piece, flattened.

    Attributes:
        before_M: place in the flat (B · S) axis of the token *before* each, whose hidden state predicts it.
        ids_M: the tokens.
        mask_M: mask / Z of each.
        weighted_M: that times the data weight of its example.
    """

    before_M: Tensor
    ids_M: Tensor
    mask_M: Tensor
    weighted_M: Tensor

    @classmethod
    def of(cls, piece: Examples, weights_B: Tensor, scale: float) -> Labelled:
        """Flatten the piece's labels."""
        places = piece.label_N_S.reshape(-1).nonzero()[:, 0]
        rows = torch.div(places, piece.ids_N_S.shape[1], rounding_mode="floor")
        mask = weights_B.new_full((len(places),), scale)
        return cls(places - 1, piece.ids_N_S.reshape(-1)[places], mask, weights_B[rows] * scale)


def _backward(outputs: list[tuple[Tensor, Tensor]], leaves: dict[str, Tensor]) -> None:
    """Add the gradients of Σ <output, adjoint> to the leaves' `.grad`, in place."""
    live = [(output, bar) for output, bar in outputs if output.requires_grad]
    if live:
        torch.autograd.backward([o for o, _ in live], [b for _, b in live], inputs=list(leaves.values()))


def loss_gradient(
    run: TargetRun, theta: Tensor, batch: Examples, weights_B: Tensor, remembered: Remembered | None = None
) -> tuple[Tensor, float]:
    """g = ∇_θ Σ_i w_i Σ_s mask_is ℓ_is / Z, and the loss itself.

    Args:
        run: the target and its settings.
        theta: θ, shape (n,).
        batch: one inner batch.
        weights_B: data weights.
        remembered: takes products that a dual pass over this batch at this θ can use.

    Returns:
        The gradient, shape (n,), and the weighted loss; both of the whole batch.
    """
    total = torch.zeros_like(theta)
    leaves = run.leaves(theta, total)
    loss_sum = 0.0
    scale = 1.0 / run.normalizer(batch)
    with fused_activations(run.model):
        for rows, piece in run.pieces(batch):
            made = None if remembered is None else remembered.add()
            if run.head is None:
                loss_sum += _plain_gradient(run, leaves, piece, weights_B[rows], scale, made)
                continue
            tokens = Labelled.of(piece, weights_B[rows], scale)
            with torch.enable_grad(), PlainMode(run.precision, made):
                hidden = hidden_of(run.head, leaves, piece)
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            weight, bias = run.head.parameters(leaves)
            loss, bar = first_order(
                flat[tokens.before_M], weight.detach(), None if bias is None else bias.detach(), tokens.ids_M,
                tokens.weighted_M, weight.grad, None if bias is None else bias.grad,
            )  # fmt: skip
            loss_sum += loss
            if made is not None:
                made.keep_hidden_bar(bar)
            hidden_bar = torch.zeros_like(flat).index_copy_(0, tokens.before_M, bar).view_as(hidden)
            _backward([(hidden, hidden_bar)], leaves)
    return run.ranks.sum_(total), run.ranks.total(loss_sum)


def _plain_gradient(
    run: TargetRun, leaves: dict[str, Tensor], piece: Examples, weights_B: Tensor, scale: float, made: Piece | None
) -> float:
    """The same through the model's own logits."""
    with torch.enable_grad(), PlainMode(run.precision, made):
        logits = logits_of(run.model, leaves, piece)
        labels = piece.ids_N_S[:, 1:].masked_fill(~piece.label_N_S[:, 1:], -100)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        loss = (losses.sum(1) * weights_B).sum() * scale
    _backward([(loss, torch.ones_like(loss))], leaves)
    return float(loss.detach())


@dataclass(frozen=True)
class DualResult:
    """What a direction d in parameter space says of a batch.

    Attributes:
        token_B_S: <d, ∇ℓ_is>, mask_is / Z applied, without the data weights; column 0 is zero, and so are rows of
            other ranks.
        label_B_S_V: the same for every label, or None.
        hvp: ∇_θ <d, ∇L(θ)> of the whole batch, shape (n,), or None.
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
    hvp_into: Tensor | None = None,
    remembered: Remembered | None = None,
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
        hvp_into: add the product here instead of to new zeros.
        remembered: what `loss_gradient` left of this batch at this θ with these weights; used up.
    """
    scale = 1.0 / run.normalizer(batch)
    hvp = None
    if need_hvp:
        # over ranks only the product is summed, not what it is added to
        hvp = torch.zeros_like(theta) if hvp_into is None or run.ranks.world > 1 else hvp_into
    tokens = theta.new_zeros(batch.ids_N_S.shape)
    every: Tensor | None = None
    leaves, tangents = run.leaves(theta, hvp), run.space.views(direction)
    head = run.head
    for rows, piece in run.pieces(batch):
        made = None if remembered is None else remembered.next()
        with (
            torch.set_grad_enabled(need_hvp),
            forward_ad.dual_level(),
            DualMode(run.precision, made),
            fused_activations(run.model),
        ):
            duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
            output = logits_of(run.model, duals, piece) if head is None else hidden_of(head, duals, piece)
            primal, tangent = forward_ad.unpack_dual(output)
            tangent = torch.zeros_like(primal) if tangent is None else tangent
            del duals, output
        # The reverse runs outside the dual level: inside it, saved tensors would still carry their tangents.
        marked = Labelled.of(piece, weights_B[rows], scale)
        if need_labels and every is None:
            every = theta.new_zeros(*batch.ids_N_S.shape, primal.shape[-1] if head is None else head.layer.out_features)
        width = piece.ids_N_S.shape[1]
        piece_every = None if every is None else every[rows]
        if head is None:
            bars = _plain_second_order(primal, tangent, piece, marked, tokens[rows, :width], piece_every, need_hvp)
        else:
            known = None if made is None else made.hidden_bar
            bars, credit_M = _head_second_order(
                head, leaves, tangents, primal, tangent, marked, piece_every, need_hvp, known
            )
            tokens[rows, :width] = (
                theta.new_zeros(len(piece) * width).index_copy_(0, marked.before_M + 1, credit_M).view(-1, width)
            )
        if bars is not None:
            _backward(list(zip((primal, tangent), bars, strict=True)), leaves)
    if hvp is not None and hvp is not hvp_into:
        run.ranks.sum_(hvp)
        hvp = hvp if hvp_into is None else hvp_into.add_(hvp)
    return DualResult(tokens, every, hvp)


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
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """The adjoints of a piece's hidden states and tangents (`known`, or None), and the credits of its labelled tokens.

    The head's own adjoints go to the leaves' `.grad`, the credits of every label to `every` (rows, S, V).
    """
    width = hidden.shape[-1]
    flat, flat_t = hidden.detach().reshape(-1, width), tangent.detach().reshape(-1, width)
    weight, bias = head.parameters(leaves)
    places = None
    if every is not None:  # its rows may be longer than the piece's
        after, length = marked.before_M + 1, hidden.shape[1]
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
    )
    if result.hidden_bar is None or result.tangent_bar is None:
        return None, result.token_M
    first, second = (
        torch.zeros_like(flat).index_copy_(0, marked.before_M, bar).view_as(hidden)
        for bar in (result.hidden_bar, result.tangent_bar)
    )
    return (first, second), result.token_M


@torch.no_grad()
def _plain_second_order(
    logits: Tensor,
    tangent: Tensor,
    piece: Examples,
    marked: Labelled,
    token_to: Tensor,
    every: Tensor | None,
    need_hvp: bool,
) -> tuple[Tensor, Tensor] | None:
    """The same from the model's own logits: credits into `token_to`, and the adjoints of logits and tangents."""
    probs = torch.softmax(logits.detach(), -1)
    centred = tangent.detach() - (probs * tangent.detach()).sum(-1, keepdim=True)
    labels = piece.ids_N_S[:, 1:, None]
    flat, places = probs.new_zeros(piece.ids_N_S.numel()), marked.before_M + 1
    factor = flat.index_copy(0, places, marked.mask_M).view(piece.ids_N_S.shape)[:, 1:]
    token_to[:, 1:] = -centred.gather(-1, labels).squeeze(-1) * factor
    if every is not None:
        every[:, 1 : piece.ids_N_S.shape[1]] = centred.mul(-factor[..., None])
    if not need_hvp:
        return None
    weighted = flat.index_copy(0, places, marked.weighted_M).view(piece.ids_N_S.shape)[:, 1:, None]
    logits_bar = centred.mul_(probs).mul_(weighted)
    tangent_bar = probs.scatter_add_(-1, labels, -torch.ones_like(labels, dtype=probs.dtype)).mul_(weighted)
    return logits_bar, tangent_bar
