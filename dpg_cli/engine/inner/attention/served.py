"""How a model of transformers comes to call attention in slabs: an implementation of ours in its registries, while a pass runs.

transformers asks two registries by the name in the model's configuration: one for the function that makes masks, one for the
function that attends. Under the name `NAME` a mask is no matrix, but what makes it (`seen.Indexed`), or None where it is
causal; and the attention takes slabs where there is such a mask, a cap or a sink, and PyTorch's own kernel elsewhere. Rows
shorter than `LONG` keep the model's own implementation, and so does a model with which ours is not the same: on a few
tokens, also as packed rows, the logits of both are compared.

Rows whose examples share prefixes (`../prefixes.py`) are read under that name whatever their length, since no other knows their mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.attention.plain import attention
from dpg_cli.engine.inner.attention.seen import Biased, Causal, Full, Given, Indexed, Seen
from dpg_cli.engine.inner.prepare import evaluating
from dpg_cli.engine.records import Layout

NAME = "dpg_slabs"
FROM = ("sdpa", "eager")  # implementations that ours stands for
LONG = 512  # tokens of a row from which ours is taken
TRIED = 12  # tokens that both are compared on
SAME = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative difference that is rounding


@dataclass(eq=False)
class Trial:
    """While one is on, our attention counts its calls.

    Attributes:
        masks: they are made where a causal flag would do.
    """

    masks: bool
    calls: int = 0


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)
_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)  # of rows whose examples share prefixes


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Seen | Tensor | None:
    """What stands for a mask; None for a causal one. The arguments are those of transformers' `sdpa_mask`.

    Rows whose examples share prefixes have a mask of their own (`sharing`), a matrix where they are short.

    Raises:
        NotImplementedError: for places that do not begin at 0, which a pass without a cache does not have.
    """
    if q_offset != 0 or kv_offset != 0 or mask_function is None:
        raise NotImplementedError("attention in slabs reads whole rows")
    layout = _layout.get()
    if layout is not None:
        return _branching(layout, mask_function, kv_length, use_vmap)
    trial = _trial.get()
    flagged = allow_is_causal_skip and not (trial is not None and trial.masks)
    padded = attention_mask is not None and not bool(attention_mask.all())
    local = local_size is not None and kv_length >= local_size
    if flagged and not padded and not local and q_length == kv_length:
        return None
    whole = mask_function
    if padded:
        assert attention_mask is not None
        given, inner = (
            nn.functional.pad(attention_mask, (0, max(0, kv_length - attention_mask.shape[-1]))),
            mask_function,
        )

        def whole(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return inner(b, h, i, j) & given[b, j]

    return Indexed(whole, torch.device(device), vmap=use_vmap)


def _branching(layout: Layout, mask_function: Callable[..., Any], length: int, vmap: bool) -> Seen | Tensor:
    """What each token of rows with shared prefixes sees: what is before it in its example, as `mask_function` has it by positions.

    Raises:
        NotImplementedError: for other rows than the layout's.
    """
    until, position = layout.until_N_S, layout.column_N_S
    if until is None or until.shape[1] != length:
        raise NotImplementedError("rows with shared prefixes are read whole")

    def whole(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i < until[b, j]) & mask_function(b, h, position[b, i], position[b, j])

    seen = Indexed(whole, until.device, vmap=vmap)
    if length >= LONG:
        return seen
    every = slice(0, length)
    return torch.stack([seen.seen(row, every, every) for row in range(len(until))])[:, None]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention. Its arguments are those of transformers' `sdpa_attention_forward`, a cap and a sink besides.

    Raises:
        NotImplementedError: for dropout, a bias that is learned, or shapes that slabs do not take.
    """
    trial = _trial.get()
    if trial is not None:
        trial.calls += 1
    plain = softcap is None and s_aux is None
    if plain and position_bias is None and (attention_mask is None or isinstance(attention_mask, Tensor)):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)
    if dropout or (position_bias is not None and position_bias.requires_grad) or query.ndim != 4:
        raise NotImplementedError("attention in slabs has neither dropout nor learned biases")
    seen: Seen
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        seen = Causal() if causal else Full()
    else:
        seen = Given(attention_mask) if isinstance(attention_mask, Tensor) else attention_mask
    if position_bias is not None:
        seen = Biased(seen, position_bias)
    out = attention(query, key, value, seen, scale=scaling, cap=softcap, sink=s_aux)
    return out.transpose(1, 2).contiguous(), None


@cache
def _register() -> None:
    """Ours in transformers' registries, where nothing else asks for it by its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


_same: WeakKeyDictionary[nn.Module, dict[torch.dtype, bool]] = WeakKeyDictionary()


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that the model's modules read, each once, with an implementation that ours stands for."""
    found = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    return [config for config in found.values() if getattr(config, "_attn_implementation_internal", None) in FROM]


@contextmanager
def _by(configs: list[Any]) -> Iterator[None]:
    """Within this context the configurations name ours."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@torch.no_grad()
def is_same(model: nn.Module) -> bool:
    """Whether the model calls our attention and gives what it gives with its own, tried once on a few tokens."""
    dtype = next(model.parameters()).dtype
    known = _same.setdefault(model, {})
    if dtype not in known:
        with evaluating(model):
            known[dtype] = _try(model)
    return known[dtype]


def _try(model: nn.Module) -> bool:
    configs = _configs(model)
    if not configs:
        return False
    _register()
    device = next(model.parameters()).device
    vocabulary = min(getattr(config, "vocab_size", None) or 2 for config in configs)
    ids = torch.arange(2 * TRIED, device=device).view(2, TRIED) % vocabulary
    half = torch.arange(TRIED // 2, device=device)
    packed = torch.cat((half, half)).expand(2, -1)
    calls = 0
    for masks, more in ((False, {}), (True, {}), (True, {"position_ids": packed})):
        try:
            own = _logits(model, ids, more)
        except (TypeError, ValueError):  # it takes no places
            continue
        trial = Trial(masks)
        token = _trial.set(trial)
        try:
            with _by(configs):
                ours = _logits(model, ids, more)
        except Exception:  # whatever a model makes of a mask that is no tensor
            return False
        finally:
            _trial.reset(token)
        if not float((ours - own).abs().max()) <= SAME.get(own.dtype, 1e-2) * float(own.abs().max()):
            return False
        calls += trial.calls
    return calls > 0


def _logits(model: nn.Module, ids: Tensor, more: dict[str, Tensor]) -> Tensor:
    made: Any = model(input_ids=ids, use_cache=False, **more)
    found: Tensor = made.logits
    return found


def note(model: nn.Module, length: int) -> str:
    """What is to be said of a model whose rows are so long; empty for nothing."""
    attends = getattr(getattr(model, "config", None), "num_attention_heads", None) is not None
    if length < LONG or not attends or is_same(model):
        return ""
    return f"Attention is the target's own: for rows of {length:,} tokens it may keep matrices of queries x keys."


@contextmanager
def sharing(model: nn.Module, layout: Layout | None) -> Iterator[None]:
    """Within this context the model reads rows of this layout, whose examples may share prefixes (`../prefixes.py`).

    Args:
        model: one for which `is_same` holds.
        layout: of the rows, or None.
    """
    if layout is None or layout.until_N_S is None:
        yield
        return
    token = _layout.set(layout)
    try:
        with _by(_configs(model)):
            yield
    finally:
        _layout.reset(token)


@contextmanager
def in_slabs(model: nn.Module, length: int, served: bool = True) -> Iterator[None]:
    """Within this context the model attends in slabs, where its rows are long and ours is the same.

    Args:
        model: the target.
        length: tokens of a row.
        served: false where it is to keep its own attention.
    """
    if not served or length < LONG or not is_same(model):
        yield
        return
    with _by(_configs(model)):
        yield
