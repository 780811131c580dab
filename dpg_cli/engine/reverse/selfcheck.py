"""One small micro-batch of the real model, before the first inner step: is our number the one of its training?

    masked       where logits change with the attention mask, though padding is on the right, it is passed on
    causal       the logits of a token must not change with the tokens after it
    idle         parameters that are read, but that no gradient reaches (behind a `detach`), stay as they are, as
                 `torch.optim` leaves them: no weight decay
    first order  the tangent of the loss along d, by the dual pass, must be <d, g>, with g as stock PyTorch computes it
    second       the Hessian-vector product of the dual pass must be that of a double backward
    unwritten    the forward pass must leave parameters and buffers as they are

Where the model has no forward derivative, or PyTorch's is wrong, the double backward takes over for the whole run
(`double_pass.py`), after its own check: <d, g> against differences of the loss. What fits neither is refused. It takes two
rows of at most `TOKENS` tokens, once for each model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dpg_cli.engine.inner.cuts import reached_from
from dpg_cli.engine.inner.run import all_finite
from dpg_cli.engine.inner.target import TargetRun, logits_of, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.ranks import ALONE
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.double_pass import double_pass
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.errors import UsageError

SecondOrder = Literal["dual", "double"]
TOKENS, ROWS = 12, 2
SMALL = 1 << 26  # parameters up to which the Hessian-vector products are compared: two more vectors of their number
TRIES = 3  # other rows, before a model is refused: a tie in a router may go either way
FIRST = {torch.float32: 1e-3, torch.float64: 1e-5}  # relative errors that are rounding
SECOND = {torch.float32: 2e-2, torch.float64: 1e-4}
DIFFERENCE = {torch.float32: (1e-3, 5e-2), torch.float64: (1e-5, 1e-3)}  # step by the size of θ, and tolerance


@dataclass(frozen=True)
class Finding:
    """What the check chose.

    Attributes:
        second_order: the pass that gives credits and Hessian-vector products.
        note: why, where it is not the dual pass; else empty.
        idle: parameters that no gradient reaches.
        masked: the model needs the attention mask.
    """

    second_order: SecondOrder = "dual"
    note: str = ""
    idle: frozenset[str] = frozenset()
    masked: bool = False

    def apply(self, run: TargetRun) -> TargetRun:
        """The run as it is to be made."""
        if self == Finding():
            return run
        space = ParameterSpace(run.model, self.idle, run.space.names) if self.idle else run.space
        return replace(run, space=space, second_order=self.second_order, masked=self.masked)


_known: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Finding]] = WeakKeyDictionary()


def selfcheck(run: TargetRun, examples: Examples, *, need_hvp: bool = True) -> Finding:
    """Try a micro-batch, or remember how it went with this model.

    Args:
        run: the target and its settings.
        examples: what it is to be trained on; the first rows are taken.
        need_hvp: the run has more than one step.

    Raises:
        UsageError: if no pass gives the number of stock training, naming what is in the way.
    """
    model = run.model
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.requires_grad)
    key = (dtype, run.space.size, need_hvp, tuple(type(module) for module in model.modules()))
    known = _known.setdefault(model, {})
    if key not in known:
        alone = replace(run, precision="float32", micro_batch=ROWS, ranks=ALONE)
        with torch.enable_grad():
            known[key] = _check(alone, run.space.read(model), examples, need_hvp)
    return known[key]


def _check(run: TargetRun, theta: Tensor, examples: Examples, need_hvp: bool) -> Finding:
    pieces = _pieces(run.model, examples)
    if not pieces:
        return Finding()
    masked = needs_mask(run, theta, examples)
    idle = look(replace(run, masked=masked), theta, pieces[0])
    if idle or masked:
        run = Finding(idle=idle, masked=masked).apply(run)
        theta = run.space.read(run.model)
    faults: list[str] = []
    for piece in pieces:
        with Unwritten(run.model, theta):
            finding = _try(run, theta, piece, need_hvp, faults)
        if finding is not None:
            return replace(finding, idle=idle, masked=masked)
    raise UsageError(
        f"The metagradient of this target cannot be trusted: {faults[-1]}.",
        "A layer whose backward pass is not the derivative of its forward is the usual cause (straight-through rounding, a "
        "gradient hook, an autograd.Function of its own): replace it, or take another variant of the model.",
    )


def _pieces(model: nn.Module, examples: Examples) -> list[Examples]:
    """A few small pieces of the examples; every token but the first is trained, and none is an embedding's padding."""
    rows = (examples.attention_N_S.sum(1) > 1).nonzero()[:, 0][: ROWS * TRIES]
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    padding = {module.padding_idx for module in embeddings if module.padding_idx is not None}
    other = next(number for number in range(len(padding) + 1) if number not in padding)
    pieces = []
    for start in range(0, len(rows), ROWS):
        ids = examples.ids_N_S[rows[start : start + ROWS], :TOKENS]
        attention = examples.attention_N_S[rows[start : start + ROWS], :TOKENS]
        for number in padding:
            ids = ids.masked_fill(ids == number, other)
        label = attention.clone()
        label[:, 0] = False
        pieces.append(Examples(ids, attention, label).rows(0, ROWS))
    return pieces


class Touched(TorchFunctionMode):
    """Which of some tensors are arguments of torch functions.

    Args:
        named: the tensors.
    """

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.names = {id(tensor): name for name, tensor in named.items()}
        self.found: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in tree_leaves((args, kwargs)):
            name = self.names.get(id(given))
            if name is not None:
                self.found.add(name)
        return func(*args, **kwargs)


@torch.no_grad()
def needs_mask(run: TargetRun, theta: Tensor, examples: Examples) -> bool:
    """Whether the logits of real tokens are others with the attention mask, on rows as they are."""
    piece = examples.rows(0, min(len(examples), ROWS * TRIES))
    piece = Examples(piece.ids_N_S[:, :TOKENS], piece.attention_N_S[:, :TOKENS], piece.label_N_S[:, :TOKENS])
    parameters = run.space.views(theta)
    try:
        with_mask = logits_of(run.model, parameters, piece, True)
    except TypeError:  # it takes none
        return False
    without = logits_of(run.model, parameters, piece)
    difference = (with_mask - without).abs().amax(-1)[piece.attention_N_S[:, 1:]]
    return bool(difference.numel()) and float(difference.max()) > 1e-3 * float(without.abs().max())


def look(run: TargetRun, theta: Tensor, piece: Examples) -> frozenset[str]:
    """The parameters that no gradient reaches though they are read.

    Raises:
        UsageError: for a model whose logits depend on later tokens, or that gives no logits for each token.
    """
    ids = piece.ids_N_S
    kind = type(run.model).__name__
    leaves: dict[str, Tensor] = {name: nn.Parameter(view.detach()) for name, view in run.space.views(theta).items()}
    touched = Touched(leaves)
    with Unwritten(run.model, theta), torch.enable_grad(), touched:
        logits = logits_of(run.model, leaves, piece, run.masked)
    if logits.ndim != 3 or logits.shape[1] != ids.shape[1] - 1:
        raise UsageError(
            f"The target ({kind}) gives logits of shape {tuple(logits.shape)} for {tuple(ids.shape)} tokens.",
            "A causal language model gives one row of logits for each token.",
        )
    reached = reached_from(logits)
    idle = {name for name in touched.found if id(leaves[name]) not in reached}
    logits = logits.detach()
    # the last real token of each row replaced: nothing before it may move
    last = (piece.attention_N_S.sum(1) - 1)[:, None]
    changed = ids.scatter(1, last, torch.where(ids.gather(1, last) == 0, 1, 0))
    with torch.no_grad():
        moved = logits_of(run.model, run.space.views(theta), replace(piece, ids_N_S=changed), run.masked)
    before = torch.arange(logits.shape[1], device=ids.device)[None] < last
    difference = (moved - logits).abs().amax(-1)[before]
    if difference.numel() and float(difference.max()) > 1e-3 * float(logits.abs().max()):
        raise UsageError(
            f"The target ({kind}) is no causal language model: its logits depend on the tokens after them.",
            "Take a decoder, or set is_decoder = True in its configuration.",
        )
    return frozenset(idle)


class Unwritten:
    """Within this context the model's parameters and buffers must stay as they are.

    Raises:
        UsageError: naming one that was written to.
    """

    def __init__(self, model: nn.Module, theta: Tensor) -> None:
        self.model, self.theta = model, theta

    def _state(self) -> dict[str, tuple[Tensor, int]]:
        named = (("its trained weights", self.theta), *self.model.named_parameters(), *self.model.named_buffers())
        return {name: (tensor, tensor._version) for name, tensor in named}

    def __enter__(self) -> None:
        self.before = self._state()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        for name, (tensor, version) in self._state().items():
            old, old_version = self.before.get(name, (None, -1))
            if old is tensor and version == old_version:
                continue
            if old is not None and old is not tensor and old.shape == tensor.shape and torch.equal(old, tensor):
                continue
            raise UsageError(
                f"The target's forward pass writes to {name!r}: its steps would depend on how often it was called.",
                "Freeze it (a norm's track_running_stats, a router's bias), or take another variant of the model.",
            )


def _try(run: TargetRun, theta: Tensor, piece: Examples, need_hvp: bool, faults: list[str]) -> Finding | None:
    """A finding, or None with a fault more."""
    weights = theta.new_ones(len(piece))
    grad, _ = loss_gradient(run, theta, piece, weights)
    # every tensor of the model weighs the same in <d, g> = Σ |g_k|; d is written over g
    direction, total = grad, 0.0
    for part in direction.split(run.space.sizes):
        length = float(torch.linalg.vector_norm(part))
        total += length
        if length > 0:
            part.div_(length)
    del grad
    if not (total > 0 and total < float("inf")):
        return Finding()  # nothing to compare; the run itself says what is not finite
    kind = theta.dtype if theta.dtype in FIRST else torch.float32
    why, product = "", None
    try:
        dual = dual_pass(run, theta, direction, piece, weights, need_hvp=need_hvp, need_labels=False)
        error = abs(float(dual.token_B_S.double().sum()) - total) / total
        if not error < FIRST[kind]:
            why = f"its tangents are {error:.1e} off its gradient"
        product = dual.hvp
        del dual
    except (NotImplementedError, RuntimeError) as fault:
        if isinstance(fault, torch.cuda.OutOfMemoryError):
            raise
        why = f"PyTorch cannot differentiate it forwards ({str(fault).splitlines()[0][:120].rstrip('.')})"
    if not why and (product is None or len(theta) > SMALL):
        return Finding()
    if not why and product is not None and not all_finite(product):
        return Finding()

    def second() -> tuple[float, Tensor | None]:
        result = double_pass(run, theta, direction, piece, weights, need_hvp=need_hvp, need_labels=False)
        return float(result.token_B_S.double().sum()), result.hvp

    if why:
        return _double(run, theta, direction, piece, weights, total, kind, why, second, faults)
    try:
        _, other = second()
    except (NotImplementedError, RuntimeError, UsageError):
        return Finding()  # no second opinion to be had; a model that cuts its gradient is one that `dual.py` follows
    assert product is not None and other is not None
    scale = float(torch.linalg.vector_norm(other))
    error = float(torch.linalg.vector_norm(product - other)) / scale if scale > 0 else 0.0
    if error < SECOND[kind]:
        return Finding()
    why = f"its forward-over-reverse derivative is {error:.1e} off the double backward"
    return _double(run, theta, direction, piece, weights, total, kind, why, second, faults)


def _double(
    run: TargetRun,
    theta: Tensor,
    direction: Tensor,
    piece: Examples,
    weights: Tensor,
    total: float,
    kind: torch.dtype,
    why: str,
    second: Callable[[], tuple[float, Tensor | None]],
    faults: list[str],
) -> Finding | None:
    """The double backward, if it and the differences of the loss agree with <d, g>."""
    try:
        value, _ = second()
    except (NotImplementedError, RuntimeError) as fault:
        faults.append(f"{why}, nor twice backwards ({str(fault).splitlines()[0][:120].rstrip('.')})")
        return None
    if not abs(value - total) < FIRST[kind] * total:
        faults.append(f"{why}, and its double backward is {abs(value - total) / total:.1e} off")
        return None
    step, tolerance = DIFFERENCE[kind]
    h = step * float(torch.linalg.vector_norm(theta)) / float(torch.linalg.vector_norm(direction))
    losses = [loss_gradient(run, theta + sign * h * direction, piece, weights)[1] for sign in (1, -1)]
    error = abs((losses[0] - losses[1]) / (2 * h) - total) / total
    if not error < tolerance:
        faults.append(f"the slope of its loss is {error:.1e} off its gradient")
        return None
    return Finding("double", f"Second derivatives by double backward: {why}.")
