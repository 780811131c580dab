"""Credits and the Hessian-vector product from differences of ordinary passes: for any model that trains at all.

At θ± = θ ± ε d the model runs forwards and backwards as its user runs it: any attention kernel, compiled code, functions of
its own, checkpoints. With h its hidden states (or its logits, where the head is no standard one) and g = Jᵀ h̄ its gradient

    ḣ = (h₊ - h₋) / 2ε        credits by `head.py`, from (h₊ + h₋) / 2 and ḣ        ∇<d, ∇L> = (g₊ - g₋) / 2ε

each with an error of ε². The head's part of the credits has no difference in it, and the two gradients are summed into one
vector piece by piece, so that what is rounded there is small. How long the step ε is: `stepping.py`. Source: DESIGN §7.

Kinks and jumps between the two sides show in how uneven these are: |D₊ - D₋| / |D₊ + D₋|, with D± = ±(g± - g) / ε and the inner
run's g, or with hidden states where no product is asked for. In a smooth model that goes by ε; a kink or a jump on one side makes
it as large as its share of the difference, however few rows meet it.

An embedding that gives its padding row no gradient is read at θ for padding tokens, with its gradient: stock training's
<d, g> does not change with that row, but ∂<d, g>/∂θ is the true one. Models that cut their gradient elsewhere are refused
(`selfcheck.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dpg_cli.engine.inner.head import first_order
from dpg_cli.engine.inner.packing import unpack
from dpg_cli.engine.inner.prepare import uncompiled
from dpg_cli.engine.inner.target import Labelled, TargetRun, backward, fused_activations, hidden_of, logits_of
from dpg_cli.engine.params import carrying
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.double_pass import logits_bar
from dpg_cli.engine.reverse.dual_pass import DualResult, factors_into, from_logits
from dpg_cli.engine.reverse.head import second_order
from dpg_cli.engine.soft import LabelSink


@dataclass(frozen=True)
class Differenced(DualResult):
    """A `DualResult` by differences.

    Attributes:
        moved_B_S: how far the prediction of a token went to either side: its hidden state (or its logits, without what they
            all share) by its own length, and its loss in nats, as one number; 0 where nothing is trained.
        uneven: how far the two sides are from one another, relative to their sum; None where that was not asked for.
    """

    moved_B_S: Tensor = field(kw_only=True)
    uneven: float | None = field(default=None, kw_only=True)


def difference_pass(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    batch: Examples,
    weights_B: Tensor,
    epsilon: float,
    *,
    need_hvp: bool,
    need_labels: bool | Literal["factors"],
    sink: LabelSink | None = None,
    one_sided: bool = False,
    judged: bool = False,
    gradient: Tensor | None = None,
    clip: float = 1.0,
) -> Differenced:
    """What `dual_pass` gives, by central differences; its arguments are the same but for these.

    Args:
        epsilon: ε, the step along the direction.
        one_sided: h at θ stands for h₋, and `hvp` has g₊ / ε alone, from which g / ε is yet to be taken.
        judged: also measure how uneven the two sides are: where a product is asked for by `gradient`, else by the hidden states
            at θ, which takes one more forward pass.
        gradient, clip: c g at θ, shape (n,), not changed; and c.
    """
    scale, whole = 1.0 / run.normalizer(batch), batch
    batch = run.arranged(batch)
    hvp = torch.zeros_like(theta) if need_hvp else None
    ahead = torch.zeros_like(theta) if need_hvp and judged and gradient is not None else hvp  # takes g₊ / 2ε
    lean = theta.new_zeros(batch.ids_N_S.shape) if judged and not need_hvp else None
    tokens = theta.new_zeros(batch.ids_N_S.shape)
    moved = torch.zeros_like(tokens)
    every: Tensor | None = None
    factored: Tensor | None = None
    head, side = run.head, torch.empty_like(theta)
    for rows, piece in run.pieces(batch):
        marked = Labelled.of(piece, weights_B if piece.layout else weights_B[rows], scale)
        found = []
        for shift, into in ((epsilon, hvp), (0.0, None)) if one_sided else ((epsilon, ahead), (-epsilon, hvp)):
            torch.add(theta, direction, alpha=shift, out=side)
            found.append(_side(run, side, into, piece, marked, direction, shift, 1.0 if one_sided else 0.5))
        middle = found[1] if one_sided else (found[0] + found[1]) / 2
        tangent = (found[0] - found[1]) / (epsilon if one_sided else 2 * epsilon)
        del found
        apart = None if lean is None else middle - _side(run, theta, None, piece, marked, direction, 0.0, 0.0)
        size = tangent.shape[-1] if head is None else head.layer.out_features
        if need_labels is True and every is None:
            every = theta.new_zeros(*batch.ids_N_S.shape, size)
        width = piece.ids_N_S.shape[1]
        piece_every = None if every is None else every[rows]
        token_to = tokens[rows, :width]
        if head is None:
            from_logits(middle, tangent, piece, marked, token_to, piece_every, False, sink)
            middle, tangent = (
                logits.flatten(0, 1) - logits.mean(-1).flatten()[:, None] for logits in (middle, tangent)
            )
            own = theta.new_zeros(len(piece), width)
            own[:, 1:] = _movement(middle, tangent, epsilon).view(-1, width - 1) * piece.label_N_S[:, 1:]
        else:
            if need_labels == "factors":
                factored = factors_into(factored, middle, tangent, marked, batch, rows, width)
            credit_M = _credits(run, theta, direction, middle, tangent, marked, piece, piece_every, sink)
            own_M = _movement(middle, tangent, epsilon)
            token_to.copy_(marked.spread(credit_M, token_to))
            own = marked.spread(own_M, token_to)
        moved[rows, :width] = own.hypot(token_to * (epsilon / scale))
        if lean is not None and apart is not None:
            ratio = _ratio(apart, tangent.view_as(apart), epsilon)
            lean[rows, :width] = (
                marked.spread(ratio, token_to) if head is not None else nn.functional.pad(ratio, (1, 0))
            )
    uneven = None
    if lean is not None:
        leans, credits = (run.ranks.total(float(each.double().square().sum())) for each in (lean * tokens, tokens))
        uneven = math.sqrt(leans / credits) if credits else 0.0
    if hvp is not None and ahead is not None and ahead is not hvp and gradient is not None:
        hvp.add_(ahead)
        run.ranks.sum_(hvp)
        run.ranks.sum_(ahead)
        between = ahead.mul_(2).sub_(gradient, alpha=1 / (clip * epsilon)).sub_(hvp)
        uneven = float(torch.linalg.vector_norm(between) / torch.linalg.vector_norm(hvp).clamp_min(_tiny(hvp)))
    elif hvp is not None:
        run.ranks.sum_(hvp)
    if batch.layout is not None:
        tokens, every = unpack(tokens, batch, whole), None if every is None else unpack(every, batch, whole)
        moved = unpack(moved, batch, whole)
        factored = None if factored is None else unpack(factored, batch, whole)
    return Differenced(tokens, every, hvp, factored, moved_B_S=moved, uneven=uneven)


def _movement(middle: Tensor, tangent: Tensor, epsilon: float) -> Tensor:
    """|ε ḣ| / |h| along the last axis."""
    length = torch.linalg.vector_norm(middle, dim=-1)
    return torch.linalg.vector_norm(tangent, dim=-1).mul_(epsilon) / length.clamp_min(_tiny(middle))


def _ratio(apart: Tensor, tangent: Tensor, epsilon: float) -> Tensor:
    """|(h₊ + h₋) / 2 - h| / |ε ḣ| along the last axis; 0 where nothing moved."""
    length = torch.linalg.vector_norm(tangent, dim=-1).mul_(epsilon)
    return torch.linalg.vector_norm(apart, dim=-1) / length.clamp_min(_tiny(length))


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny


def _side(
    run: TargetRun, theta: Tensor, hvp: Tensor | None, piece: Examples, marked: Labelled, direction: Tensor, shift: float,
    share: float,
) -> Tensor:  # fmt: skip
    """At θ + shift · d: the hidden states that predict labels, (M, D), or all logits, (B, S - 1, V).

    The gradient times share / shift is added to `hvp`.
    """
    leaves = run.still(theta) if hvp is None else run.leaves(theta, hvp)
    with torch.set_grad_enabled(hvp is not None), as_it_runs(run, leaves, piece, direction, shift):
        if run.head is None:
            logits = logits_of(run.model, {}, piece, run.masked)
            if hvp is not None:
                bar = logits_bar(logits.detach(), piece, marked).mul_(share / shift)
                backward([(logits, bar)], leaves)
            return logits.detach()
        hidden = hidden_of(run.head, {}, piece, run.masked)
        flat = hidden.detach().reshape(-1, hidden.shape[-1])
        before = flat[marked.before_M]
        if hvp is not None:
            weight, bias = run.head.parameters(leaves)
            _, bar = first_order(
                before, weight.detach(), None if bias is None else bias.detach(), marked.ids_M,
                marked.weighted_M * (share / shift), weight.grad, None if bias is None else bias.grad,
                None if marked.trained is None else marked.trained.q,
            )  # fmt: skip
            backward([(hidden, marked.gathered(bar, hidden))], leaves)
        return before


@contextmanager
def as_it_runs(
    run: TargetRun, leaves: dict[str, Tensor], piece: Examples, direction: Tensor, shift: float
) -> Iterator[None]:
    """Within this context the model has these parameters: also in what is computed again while it goes backwards."""
    with ExitStack() as stack:
        stack.enter_context(fused_activations(run.model))
        stack.enter_context(carrying(run.model, leaves))
        if reads_padding(run, piece):
            ways = run.space.views(direction)
            stack.enter_context(WholeEmbeddings({id(leaf): ways[name] for name, leaf in leaves.items()}, shift))
            stack.enter_context(uncompiled(run.model))
        yield


def reads_padding(run: TargetRun, piece: Examples) -> bool:
    """Whether tokens of these rows are read from a row of an embedding that has no gradient."""
    padding = {module.padding_idx for module in run.model.modules() if isinstance(module, nn.Embedding)}
    real = piece.ids_N_S[piece.attention_N_S]
    return any(bool(torch.eq(real, number).any()) for number in padding if number is not None)


class WholeEmbeddings(TorchFunctionMode):
    """Within this context a padding row has its gradient, and is read at θ.

    Args:
        directions: d of each parameter, by the id of what the model is called with.
        shift: how far along them the parameters are.
    """

    def __init__(self, directions: dict[int, Tensor], shift: float) -> None:
        super().__init__()
        self.directions, self.shift = directions, shift

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.embedding:
            return func(*args, **(kwargs or {}))
        return self._embedding(*args, **(kwargs or {}))

    def _embedding(
        self, ids: Tensor, weight: Tensor, padding_idx: int | None = None, *others: Any, **named: Any
    ) -> Tensor:
        found = nn.functional.embedding(ids, weight)
        direction = self.directions.get(id(weight))
        if padding_idx is None or direction is None:
            return found
        back = direction[padding_idx] * self.shift
        return found - (ids == padding_idx % len(weight)).unsqueeze(-1) * back


def _credits(
    run: TargetRun, theta: Tensor, direction: Tensor, hidden_M_D: Tensor, tangent_M_D: Tensor, marked: Labelled,
    piece: Examples, every: Tensor | None, sink: LabelSink | None,
) -> Tensor:  # fmt: skip
    """The credits of the labelled tokens, from hidden states and their tangents."""
    head = run.head
    assert head is not None
    leaves, tangents = run.leaves(theta, None), run.space.views(direction)
    weight, bias = head.parameters(leaves)
    places = None
    if every is not None:
        after, length = marked.places_M, piece.ids_N_S.shape[1]
        places = torch.div(after, length, rounding_mode="floor") * every.shape[1] + after % length
    return second_order(
        hidden_M_D,
        tangent_M_D,
        weight.detach(),
        tangents.get(head.weight),
        None if bias is None else bias.detach(),
        None if head.bias is None else tangents.get(head.bias),
        marked.ids_M,
        marked.weighted_M,
        need_hvp=False,
        weight_into=None,
        bias_into=None,
        mask_M=marked.mask_M,
        labels_into=None if every is None else every.view(-1, every.shape[-1]),
        places_M=places,
        expected=marked.expected,
        sink=sink,
    ).token_M
