"""One small micro-batch of the real model, before the first inner step: is our number the one of its training?

    reading      mask, width, order and parameters that the model's forward pass needs (`reading.py`)
    first order  the tangent of the loss along d, by the dual pass, must be <d, g>, with g as stock PyTorch computes it
    second       the Hessian-vector product of the dual pass must be that of a double backward

Where the model has no forward derivative, or PyTorch's is wrong, the double backward takes over for the whole run
(`double_pass.py`), after its own check: <d, g> against differences of the loss. What fits neither is refused. It takes two
rows of at most `TOKENS` tokens, once for each model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.run import all_finite
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.ranks import ALONE
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.double_pass import double_pass
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.engine.reverse.reading import ROWS, TOKENS, TRIES, Unwritten, look, needs_mask, needs_width
from dpg_cli.errors import UsageError

Pass = Literal["dual", "double", "difference", "one-sided"]
WIDE = "Rows keep the width of their batch: this model reads a row otherwise where it is longer."
SMALL = 1 << 26  # parameters up to which the Hessian-vector products are compared: two more vectors of their number
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
        wide: the model reads a row otherwise where it is longer.
    """

    second_order: Pass = "dual"
    note: str = ""
    idle: frozenset[str] = frozenset()
    masked: bool = False
    wide: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen, a sentence each."""
        return ((WIDE,) if self.wide else ()) + ((self.note,) if self.note else ())

    def apply(self, run: TargetRun) -> TargetRun:
        """The run as it is to be made."""
        if self == Finding():
            return run
        space = ParameterSpace(run.model, self.idle, run.space.names) if self.idle else run.space
        return replace(run, space=space, second_order=self.second_order, masked=self.masked, wide=self.wide)


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
    pieces = small_pieces(run.model, examples)
    if not pieces:
        return Finding()
    masked = needs_mask(run, theta, examples)
    idle = look(replace(run, masked=masked), theta, pieces[0])
    wide = needs_width(replace(run, masked=masked), theta, pieces[0])
    reading = Finding(idle=idle, masked=masked, wide=wide)
    if reading != Finding():
        run = reading.apply(run)
        theta = run.space.read(run.model)
    faults: list[str] = []
    for piece in pieces:
        with Unwritten(run.model, theta):
            finding = _try(run, theta, piece, need_hvp, faults)
        if finding is not None:
            return replace(finding, idle=idle, masked=masked, wide=wide)
    raise UsageError(
        f"The metagradient of this target cannot be trusted: {faults[-1]}.",
        "A layer whose backward pass is not the derivative of its forward is the usual cause (straight-through rounding, a "
        "gradient hook, an autograd.Function of its own): replace it, or take another variant of the model.",
    )


def small_pieces(model: nn.Module, examples: Examples) -> list[Examples]:
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
