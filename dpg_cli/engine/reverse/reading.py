"""How a target reads its rows: on a few tokens, before anything is trained.

masked     where logits change with the attention mask, though padding is on the right, it is passed on
wide       where the logits of a row's beginning change with the row's length, rows keep the width of their batch, as a
           collator pads them
causal     the logits of a token must not change with the tokens after it
idle       parameters that are read, but that no gradient reaches (behind a `detach`), stay as they are, as
           `torch.optim` leaves them: no weight decay
unwritten  the forward pass must leave parameters and buffers as they are
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dpg_cli.engine.inner.cuts import reached_from
from dpg_cli.engine.inner.target import TargetRun, logits_of
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError

TOKENS, ROWS = 12, 2
TRIES = 3  # other rows, before a model is refused: a tie in a router may go either way
CHANGED = 1e-3  # of the largest logit: what is no rounding
LEAK = 1e-4, 1e-6  # of what a changed token moves after it, and of the largest logit: what rounding moves before it


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
    return bool(difference.numel()) and float(difference.max()) > CHANGED * float(without.abs().max())


def longest(piece: Examples) -> Examples:
    """The longest row of a piece."""
    return piece.take(piece.attention_N_S.sum(1).argmax()[None]).rows(0, 1)


@torch.no_grad()
def needs_width(run: TargetRun, theta: Tensor, piece: Examples) -> bool:
    """Whether the logits of a row's beginning are others in a row that ends there."""
    parameters = run.space.views(theta)
    row = longest(piece)
    length = row.ids_N_S.shape[1]
    whole = logits_of(run.model, parameters, row, run.masked)
    for end in {length - 1, (length + 1) // 2}:
        if end < 2:
            continue
        cut = Examples(row.ids_N_S[:, :end], row.attention_N_S[:, :end], row.label_N_S[:, :end])
        moved = (logits_of(run.model, parameters, cut, run.masked) - whole[:, : end - 1]).abs().max()
        if float(moved) > CHANGED * float(whole.abs().max()):
            return True
    return False


def look(run: TargetRun, theta: Tensor, piece: Examples) -> frozenset[str]:
    """The parameters that no gradient reaches though they are read.

    Raises:
        UsageError: for a model whose logits depend on later tokens, or that gives no logits for each token.
    """
    ids = piece.ids_N_S
    leaves: dict[str, Tensor] = {name: nn.Parameter(view.detach()) for name, view in run.space.views(theta).items()}
    touched = Touched(leaves)
    with Unwritten(run.model, theta), torch.enable_grad(), touched:
        logits = logits_of(run.model, leaves, piece, run.masked)
    if logits.ndim != 3 or logits.shape[1] != ids.shape[1] - 1:
        raise UsageError(
            f"The target ({type(run.model).__name__}) gives logits of shape {tuple(logits.shape)} for {tuple(ids.shape)} "
            "tokens.",
            "A causal language model gives one row of logits for each token.",
        )
    reached = reached_from(logits)
    del logits
    refuse_foresight(run, theta, piece)
    return frozenset(name for name in touched.found if id(leaves[name]) not in reached)


@torch.no_grad()
def refuse_foresight(run: TargetRun, theta: Tensor, piece: Examples) -> None:
    """Each token of a row changed in turn: nothing before it may move.

    Raises:
        UsageError: for a model whose logits depend on later tokens.
    """
    row = longest(piece)
    length = row.ids_N_S.shape[1]
    many = row.take(torch.zeros(length, dtype=torch.int64))  # the first stays, row j has another token j
    at = torch.arange(1, length, device=row.ids_N_S.device)
    changed = many.ids_N_S.clone()
    changed[at, at] = torch.where(changed[at, at] == 0, 1, 0)
    logits = logits_of(run.model, run.space.views(theta), replace(many, ids_N_S=changed), run.masked)
    moved = (logits[1:] - logits[:1]).abs().amax(-1)
    before = torch.arange(length - 1, device=at.device)[None] < at[:, None]
    early, late = float(moved[before].max()), float(moved.masked_fill(before, 0).max())
    size = float(logits.abs().max())
    if early > (max(LEAK[0] * late, LEAK[1] * size) if late else CHANGED * size):
        raise UsageError(
            f"The target ({type(run.model).__name__}) is no causal language model: its logits depend on the tokens after "
            "them.",
            "Take a decoder, or set is_decoder = True in its configuration.",
        )


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
