"""What differences need of a model, tried on two of its rows before the first inner step.

    reading  mask, width, order and parameters that the model's forward pass needs (`reading.py`)
    uncut    with everything left in that the model detaches, its gradient is the same: g is the gradient of a loss, and then
             the derivative of g along ḡ is that of <ḡ, g> by θ. (A padding row without gradient is followed, not refused.)
    slope    the credits along a direction, by differences, add up to <d, g>

It calls the model uncompiled. Rows are others, up to three times, where a router may stand at a tie.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.cuts import TrueMode
from dpg_cli.engine.inner.prepare import uncompiled
from dpg_cli.engine.inner.target import Labelled, TargetRun, logits_of, loss_gradient
from dpg_cli.engine.params import carrying
from dpg_cli.engine.ranks import ALONE
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.differences.stepping import Differences
from dpg_cli.engine.reverse.double_pass import logits_bar
from dpg_cli.engine.reverse.reading import ROWS, Unwritten, look, needs_mask, needs_width
from dpg_cli.engine.reverse.selfcheck import FIRST, Finding, small_pieces
from dpg_cli.errors import DegenerateError, UsageError

SLOPE = {torch.float32: 1e-2, torch.float64: 1e-5}
EXACT = "Set second_order = 'exact', or take another variant of the model."

_known: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Finding]] = WeakKeyDictionary()


def uncut(run: TargetRun, examples: Examples) -> Finding:
    """Try two rows, or remember how it went with this model.

    Raises:
        UsageError: if differences of this model's passes are not the derivative of its training.
    """
    dtype = next(parameter.dtype for parameter in run.model.parameters() if parameter.requires_grad)
    key = (dtype, run.space.size, run.second_order, tuple(type(module) for module in run.model.modules()))
    known = _known.setdefault(run.model, {})
    if key not in known:
        with torch.enable_grad(), uncompiled(run.model):
            known[key] = _check(replace(run, micro_batch=ROWS, ranks=ALONE, packing=False), examples)
    return known[key]


def _check(run: TargetRun, examples: Examples) -> Finding:
    theta, pieces = run.space.read(run.model), small_pieces(run.model, examples)
    finding = Finding(run.second_order)
    if not pieces:
        return finding
    finding = replace(finding, masked=needs_mask(run, theta, examples))
    run = finding.apply(run)
    finding = replace(finding, idle=look(run, theta, pieces[0]), wide=needs_width(run, theta, pieces[0]))
    run = finding.apply(run)
    theta = run.space.read(run.model)
    fault = ""
    for piece in pieces:
        with Unwritten(run.model, theta):
            fault = _fault(run, theta, piece)
        if not fault:
            return finding
    raise UsageError(f"Differences of this target's passes cannot be trusted: {fault}.", EXACT)


def _fault(run: TargetRun, theta: Tensor, piece: Examples) -> str:
    """What is wrong with the model on these rows; empty for nothing."""
    kind = theta.dtype if theta.dtype in FIRST else torch.float32
    stock, whole = (_gradient(run, theta, piece, cut) for cut in (True, False))
    size = float(torch.linalg.vector_norm(stock))
    error = float(torch.linalg.vector_norm(stock - whole)) / size if size > 0 else 0.0
    if not error < FIRST[kind]:
        return f"it cuts its gradient (detach or no_grad), which is {error:.1e} off that of its loss"
    weights = theta.new_ones(len(piece))
    direction, _ = loss_gradient(run, theta, piece, weights)
    total = 0.0
    for part in direction.split(run.space.sizes):  # every tensor of the model weighs the same, as in `selfcheck.py`
        length = float(torch.linalg.vector_norm(part))
        total += length
        if length > 0:
            part.div_(length)
    if not 0 < total < float("inf"):
        return ""  # nothing to compare; the run itself says what is not finite
    try:
        found = Differences(run, "")(theta, direction, piece, weights, need_hvp=False, need_labels=False)
    except DegenerateError as refusal:
        return refusal.cause.partition(": ")[2].rstrip(".")
    error = abs(float(found.token_B_S.double().sum()) - total) / total
    return "" if error < SLOPE[kind] else f"the slope of its loss is {error:.1e} off its gradient"


def _gradient(run: TargetRun, theta: Tensor, piece: Examples, cut: bool) -> Tensor:
    """g by the model's own logits, as it is cut, or with nothing cut; (n,)."""
    leaves: dict[str, Tensor] = {name: nn.Parameter(view.detach()) for name, view in run.space.views(theta).items()}
    with carrying(run.model, leaves), nullcontext() if cut else TrueMode():
        logits = logits_of(run.model, {}, piece, run.masked)
    marked = Labelled.of(piece, theta.new_ones(len(piece)), 1.0)
    bar = logits_bar(logits.detach(), piece, marked)
    found = torch.autograd.grad(logits, list(leaves.values()), bar, allow_unused=True)
    return run.space.flatten(found, theta)
