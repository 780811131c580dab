"""The target as its passes see it, and the first-order pass over a batch, by micro-batches.

Everything here works on any Hugging Face causal LM (a module whose call with `input_ids` returns `.logits`). The
first-order pass keeps the fast attention kernel. Where the LM head is a standard one, it calls the backbone alone and
takes the closed forms of `head.py`; else it goes through the model's logits. The second-order pass is `reverse/dual_pass.py`.
Gradients are accumulated in place, in views of one flat vector. Where several processes share a run, each takes its own
rows of a batch, and gradient and Hessian-vector product are summed over them; Z is the whole batch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpg_cli.engine.inner.attention.served import SAME, in_slabs, is_same, sharing
from dpg_cli.engine.inner.cuts import trying
from dpg_cli.engine.inner.head import Head, find_head, first_order, losses_of
from dpg_cli.engine.inner.packing import pack, unpack
from dpg_cli.engine.inner.prefixes import Shape, laid_out, neighbours, share
from dpg_cli.engine.inner.prepare import uncompiled
from dpg_cli.engine.inner.product import PlainMode, Precision
from dpg_cli.engine.inner.remembered import Piece, Remembered
from dpg_cli.engine.params import ParameterSpace, carrying
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples
from dpg_cli.engine.soft import Expected

Normalization = Literal["token", "example"]
TRIED = 12  # tokens of the examples that packing is tried on
CPU_TOKENS = 4096  # of an automatic micro-batch on the CPU: activations stay near the cores' caches
GROWN = 1.25  # times the longest example: a row with shared prefixes there, where that is more


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
        second_order: the pass that the reverse takes, see `reverse/selfcheck.py`.
        masked: the model must be told where padding is: it looks at the ids of its tokens for that otherwise.
        wide: a micro-batch keeps the width of its batch; else it is cut to its longest row.
        packing: examples of a batch share rows where the model can read them so (`packing.py`).
        share_prefixes: and have what they begin with in common once, where that is cheaper (`prefixes.py`).
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
    second_order: Literal["dual", "double", "difference", "one-sided"] = "dual"
    masked: bool = False
    wide: bool = False
    packing: bool = False
    share_prefixes: bool = False
    head: Head | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        closed = self.closed_head
        if self.as_it_runs and getattr(self.model, "_compiled_call_impl", None) is not None:
            closed = False  # its backbone alone is not what was compiled
        with uncompiled(self.model):
            object.__setattr__(self, "head", find_head(self.model) if closed else None)

    @property
    def as_it_runs(self) -> bool:
        """The model runs as its user runs it: nothing in it is replaced, and it carries θ as its own parameters."""
        return self.second_order in ("difference", "one-sided")

    @property
    def slabs(self) -> bool:
        """Attention may be taken in slabs (`attention/served.py`), which have one derivative, and tangents by the dual pass."""
        return self.second_order == "dual"

    def normalizer(self, batch: Examples) -> float:
        """Z_t of a whole inner batch. It never depends on the data weights."""
        if self.normalization == "token":
            return float(max(1, int(batch.label_N_S.sum())))
        return float(len(batch) * self.length)

    def arranged(self, batch: Examples) -> Examples:
        """The batch as the passes read it: with shared prefixes, packed, or as it is."""
        if self.head is None or self.second_order == "double" or self.masked or self.wide:
            return batch
        other = pack(batch) if self.packing else batch
        if not self.share_prefixes or self.as_it_runs:
            return other
        shared = share(batch, Shape.of(self.head), self.tokens_at_once(batch))
        return other if shared is None or shared.ids_N_S.numel() > other.ids_N_S.numel() else shared

    def tokens_at_once(self, batch: Examples) -> int:
        """Tokens of a row with shared prefixes, at most: those of a micro-batch, and of a rank's part of the batch."""
        rows, width = batch.ids_N_S.shape
        own = -(-rows // self.ranks.world) * width
        if self.micro_batch:
            return min(own, self.micro_batch * width)
        return min(own, max(CPU_TOKENS, int(GROWN * width))) if batch.ids_N_S.device.type == "cpu" else own

    def pieces(self, batch: Examples) -> Iterator[tuple[slice, Examples]]:
        """This rank's rows of the batch in micro-batches, each cut to its longest row where the model allows it."""
        own = self.ranks.shard(len(batch))
        rows = own.stop - own.start
        if not rows:
            return
        width = batch.ids_N_S.shape[1]
        size = self.rows_at_once(rows, width, batch.ids_N_S.device)
        if self.micro_batch and batch.layout is not None:  # which counts examples, and these rows may be longer
            size = max(1, min(size, self.micro_batch * (int(batch.layout.column_N_S.max()) + 1) // width))
        count = -(-rows // size)
        size = -(-rows // count)  # even ones
        for start in range(own.start, own.stop, size):
            stop = min(start + size, own.stop)
            piece = batch.take(torch.arange(start, stop)) if self.wide else batch.rows(start, stop)
            yield slice(start, stop), piece

    def rows_at_once(self, rows: int, length: int, device: torch.device) -> int:
        """Rows of a micro-batch, at most, of a batch of so many."""
        automatic = max(1, CPU_TOKENS // length) if device.type == "cpu" else rows
        return min(rows, self.micro_batch or automatic)

    def still(self, theta: Tensor) -> dict[str, Tensor]:
        """Views of θ by name that ask for no gradient."""
        return {name: nn.Parameter(view, requires_grad=False) for name, view in self.space.views(theta).items()}

    def leaves(self, theta: Tensor, into: Tensor | None) -> dict[str, Tensor]:
        """Views of θ by name to differentiate by; their gradients are added to `into` in place (None: no gradients)."""
        if into is None:
            return self.space.views(theta)
        leaves: dict[str, Tensor] = {
            name: nn.Parameter(view.detach()) for name, view in self.space.views(theta).items()
        }
        for name, view in self.space.views(into).items():
            leaves[name].grad = view
        return leaves


def shares_prefixes(piece: Examples) -> bool:
    """Whether examples of arranged rows share prefixes."""
    return piece.layout is not None and piece.layout.until_N_S is not None


def inputs_of(piece: Examples, masked: bool = False) -> dict[str, Any]:
    """What the model is called with."""
    # Right-padded rows need no attention mask: a causal model never looks to the right, and pads carry no loss.
    mask = {"attention_mask": piece.attention_N_S.to(torch.int64)} if masked else {}
    places = {} if piece.layout is None else {"position_ids": piece.layout.column_N_S}
    if shares_prefixes(piece):
        # with a mask, transformers does not take positions that begin anew for those of other examples
        mask = {"attention_mask": piece.attention_N_S.to(torch.int64)}
    return {"input_ids": piece.ids_N_S, "use_cache": False, **mask, **places}


def logits_of(model: nn.Module, parameters: dict[str, Tensor], piece: Examples, masked: bool = False) -> Tensor:
    """Logits that predict tokens 1 … S-1: shape (B, S-1, V)."""
    output: Any = functional_call(model, parameters, args=(), kwargs=inputs_of(piece, masked))
    return output.logits[:, :-1]


def hidden_of(head: Head, parameters: dict[str, Tensor], piece: Examples, masked: bool = False) -> Tensor:
    """The backbone's last hidden state, shape (B, S, D)."""
    with sharing(head.base, piece.layout):
        output: Any = functional_call(head.base, head.base_parameters(parameters), (), inputs_of(piece, masked))
    return output.last_hidden_state


@torch.no_grad()
def can_pack(run: TargetRun, examples: Examples) -> bool:
    """Whether two short examples have the same hidden states in one row as in rows of their own."""
    if run.head is None or run.second_order == "double" or run.masked or run.wide or examples.soft is not None:
        return False
    rows = (examples.attention_N_S.sum(1) > 1).nonzero()[:2, 0]
    apart = examples.take(rows).rows(0, len(rows))
    width = min(TRIED, apart.ids_N_S.shape[1])
    ids, attention, label = (
        nn.functional.pad(part[:, :width], (0, width)) for part in (apart.ids_N_S, apart.attention_N_S, apart.label_N_S)
    )
    wide = Examples(ids, attention, label)
    together = pack(wide)
    if together.layout is None:  # there are no two
        return True
    real = wide.attention_N_S
    ours = unpack(hidden_of(run.head, {}, together), together, wide)[real]
    theirs = hidden_of(run.head, {}, wide)[real]
    return bool((ours - theirs).abs().max() < 1e-3 * theirs.abs().max())


def shareable(run: TargetRun, batches: Iterable[Examples]) -> Examples | None:
    """The first of some batches whose examples would share prefixes, or None."""
    wanted = replace(run, share_prefixes=True)
    return next((batch for batch in batches if shares_prefixes(wanted.arranged(batch))), None)


_longest: WeakKeyDictionary[nn.Module, dict[torch.dtype, float]] = WeakKeyDictionary()  # examples that were tried


@torch.no_grad()
def can_share(run: TargetRun, batch: Examples) -> bool:
    """Whether examples of this batch have the same hidden states behind a prefix that they share as in rows of their own.

    Two of them are tried whole, and the beginning of one behind them in their row; once for a model and a length.
    """
    if run.head is None or not is_same(run.model):
        return False
    dtype, width = run.head.layer.weight.dtype, batch.ids_N_S.shape[1]
    known = _longest.setdefault(run.model, {})
    if known.get(dtype, 0) < width:
        known[dtype] = width if _reads_branches(run.head, batch) else 0
    return known[dtype] > 0


def _reads_branches(head: Head, batch: Examples) -> bool:
    context = getattr(getattr(head.base, "config", None), "max_position_embeddings", None)
    if any(buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2] == context for buffer in head.base.buffers()):
        return False  # a table of columns, which longer rows may not have
    lengths = batch.attention_N_S.sum(1)
    order, known = neighbours(batch.ids_N_S.cpu(), lengths.cpu())
    most, place = max((common, place) for place, common in enumerate(known))
    pair = order[place - 1 : place + 1]
    least = int(lengths[pair].min()) if len(pair) == 2 else 0
    if least < 2:
        return False
    tried = batch.take(torch.tensor([*pair, pair[0]])).rows(0, 3)
    column = torch.arange(tried.ids_N_S.shape[1], device=lengths.device)
    begins = (torch.arange(3, device=lengths.device)[:, None] < 2) | (column < TRIED)
    tried = replace(tried, attention_N_S=tried.attention_N_S & begins, label_N_S=tried.label_N_S & begins)
    prefix = min(most, least - 1)
    together = laid_out(tried, [[[(0, 0), (1, prefix)], [(2, 0)]]])
    try:
        with trying():
            ours, theirs = hidden_of(head, {}, together), hidden_of(head, {}, tried)
    except Exception:  # whatever a model makes of such rows
        return False
    own = tried.attention_N_S.clone()
    own[1, :prefix] = False  # these stand in the first example
    off = (unpack(ours, together, tried) - theirs)[own].abs().max()
    return bool(off <= SAME.get(ours.dtype, 1e-2) * theirs[own].abs().max())


@dataclass(frozen=True)
class Labelled:
    """The trained tokens of a piece, flattened.

    Attributes:
        places_M: their places in the flat (B · S) axis.
        before_M: the place of the token *before* each, whose hidden state predicts it; that of several, where they share a
            prefix that ends there.
        ids_M: the tokens.
        mask_M: mask / Z of each.
        weighted_M: that times the data weight of its example.
        expected: the distributions that they were drawn from, where the examples have them.
    """

    places_M: Tensor
    before_M: Tensor
    ids_M: Tensor
    mask_M: Tensor
    weighted_M: Tensor
    expected: Expected | None = None

    @property
    def trained(self) -> Expected | None:
        """The distributions, where they are what is trained on."""
        return self.expected if self.expected is not None and self.expected.train else None

    def spread(self, value_M: Tensor, like_B_S: Tensor) -> Tensor:
        """Numbers of these tokens in the piece's shape, zero elsewhere."""
        return value_M.new_zeros(like_B_S.numel()).index_copy_(0, self.places_M, value_M).view(like_B_S.shape)

    def gathered(self, bar_M_D: Tensor, like_B_S_D: Tensor) -> Tensor:
        """Adjoints of the hidden states that predict these tokens, summed where one predicts several; zero elsewhere."""
        flat = bar_M_D.new_zeros(like_B_S_D.shape).flatten(0, 1)
        return flat.index_add_(0, self.before_M, bar_M_D).view_as(like_B_S_D)

    @classmethod
    def of(cls, piece: Examples, weights_B: Tensor, scale: float) -> Labelled:
        """Flatten the piece's labels.

        Args:
            piece: rows of a batch.
            weights_B: data weights of these rows; of the examples that packed rows hold.
            scale: 1 / Z.
        """
        places, width, layout = piece.label_N_S.reshape(-1).nonzero()[:, 0], piece.ids_N_S.shape[1], piece.layout
        rows, before = torch.div(places, width, rounding_mode="floor"), places - 1
        if layout is not None and layout.before_N_S is not None:
            before = rows * width + layout.before_N_S.reshape(-1)[places]
        if layout is not None:
            rows = layout.owner_N_S.reshape(-1)[places]
        mask = weights_B.new_full((len(places),), scale)
        expected = None if piece.soft is None else Expected(piece.soft, places, not piece.drawn)
        return cls(places, before, piece.ids_N_S.reshape(-1)[places], mask, weights_B[rows] * scale, expected)


def backward(outputs: list[tuple[Tensor, Tensor]], leaves: dict[str, Tensor]) -> None:
    """Add the gradients of Σ <output, adjoint> to the leaves' `.grad`, in place."""
    live = [(output, bar) for output, bar in outputs if output.requires_grad]
    if live:
        torch.autograd.backward([o for o, _ in live], [b for _, b in live], inputs=list(leaves.values()))


def loss_gradient(
    run: TargetRun, theta: Tensor, batch: Examples, weights_B: Tensor, remembered: Remembered | None = None,
    losses_into: Tensor | None = None, need_gradient: bool = True,
) -> tuple[Tensor, float]:  # fmt: skip
    """g = ∇_θ Σ_i w_i Σ_s mask_is ℓ_is / Z, and the loss itself.

    Args:
        run: the target and its settings.
        theta: θ, shape (n,).
        batch: one inner batch.
        weights_B: data weights.
        remembered: takes products that a dual pass over this batch at this θ can use.
        losses_into: (B, S), float64; takes ℓ_is of the labelled tokens of this rank's rows.
        need_gradient: else only these are made, forwards, and g and the loss are zero.

    Returns:
        The gradient, shape (n,), and the weighted loss; both of the whole batch.
    """
    total = torch.zeros_like(theta) if need_gradient else theta.new_zeros(0)
    leaves = run.leaves(theta, total) if need_gradient else run.still(theta)
    loss_sum = 0.0
    scale = 1.0 / run.normalizer(batch)
    whole, batch = batch, run.arranged(batch)
    losses = None if losses_into is None else losses_into.new_zeros(batch.ids_N_S.shape)
    with fused_activations(run.model), carrying(run.model, leaves if run.as_it_runs else {}):
        for rows, piece in run.pieces(batch):
            own = None if losses is None else losses[rows, : piece.ids_N_S.shape[1]]
            made = None if remembered is None else remembered.add()
            if run.head is None:
                loss_sum += _plain_gradient(run, leaves, piece, weights_B[rows], scale, made, own)
                continue
            tokens = Labelled.of(piece, weights_B if piece.layout else weights_B[rows], scale)
            slabs = in_slabs(run.model, piece.ids_N_S.shape[1], run.slabs)
            with slabs, torch.set_grad_enabled(need_gradient), _maps(run, made):
                hidden = hidden_of(run.head, {} if run.as_it_runs else leaves, piece, run.masked)
            flat = hidden.detach().reshape(-1, hidden.shape[-1])
            weight, bias = run.head.parameters(leaves)
            q = None if tokens.trained is None else tokens.trained.q
            if not need_gradient:
                assert own is not None
                at = None if bias is None else bias.detach()
                own.copy_(tokens.spread(losses_of(flat[tokens.before_M], weight.detach(), at, tokens.ids_M, q), own))
                continue
            each = None if own is None else own.new_empty(len(tokens.ids_M))
            loss, bar = first_order(
                flat[tokens.before_M], weight.detach(), None if bias is None else bias.detach(), tokens.ids_M,
                tokens.weighted_M, weight.grad, None if bias is None else bias.grad,
                q, each,
            )  # fmt: skip
            if own is not None and each is not None:
                own.copy_(tokens.spread(each, own))
            loss_sum += loss
            if made is not None:
                made.keep_hidden_bar(bar)
            backward([(hidden, tokens.gathered(bar, hidden))], leaves)
    if losses is not None and losses_into is not None:
        losses_into.copy_(losses if batch.layout is None else unpack(losses, batch, whole))
    if not need_gradient:
        return total, 0.0
    return run.ranks.sum_(total), run.ranks.total(loss_sum)


def _maps(run: TargetRun, made: Piece | None) -> AbstractContextManager[object]:
    """How the linear maps of a first-order pass are computed."""
    return nullcontext() if run.as_it_runs else PlainMode(run.precision, made)


def _plain_gradient(
    run: TargetRun, leaves: dict[str, Tensor], piece: Examples, weights_B: Tensor, scale: float, made: Piece | None,
    losses_into: Tensor | None = None,
) -> float:  # fmt: skip
    """The same through the model's own logits; `losses_into` is (B, S)."""
    with in_slabs(run.model, piece.ids_N_S.shape[1], run.slabs), torch.enable_grad(), _maps(run, made):
        logits = logits_of(run.model, {} if run.as_it_runs else leaves, piece, run.masked)
        marked = Labelled.of(piece, weights_B, scale)
        if marked.trained is not None:
            found = nn.functional.pad(logits, (0, 0, 0, 1)).flatten(0, 1)[marked.before_M]
            q = marked.trained.q(slice(None))
            each = nn.functional.cross_entropy(found, q, reduction="none")
            loss = each @ marked.weighted_M
            if losses_into is not None:
                losses_into.copy_(marked.spread(each.detach().to(losses_into), losses_into))
        else:
            labels = piece.ids_N_S[:, 1:].masked_fill(~piece.label_N_S[:, 1:], -100)
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
            loss = (losses.sum(1) * weights_B).sum() * scale
            if losses_into is not None:
                losses_into[:, 1:] = losses.detach()
    backward([(loss, torch.ones_like(loss))], leaves)
    return float(loss.detach())


def _fused_gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """Within this context, activations that transformers spells out in eight elementwise calls are one fused call."""
    spelled = [module for module in model.modules() if type(module).__name__ == "NewGELUActivation"]
    for module in spelled:
        module.forward = _fused_gelu
    try:
        yield
    finally:
        for module in spelled:
            del module.forward
