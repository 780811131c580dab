"""A target made ready for an inner run, and given back as it was.

    unwrap     torch.compile and data-parallel wrappers are opened; a PEFT wrapper without adapters is its base
    refuse     what would make our number another than stock training's: sharded or quantised weights, gradient hooks,
               parameters that share memory without being one, embeddings that rescale themselves
    float32    bf16 and fp16 weights get float32 masters: a step of 1e-5 is lost in a bf16 weight
    experts    mixtures of experts take the implementation that has a second derivative

Where second derivatives are differences of ordinary passes (`reverse/differences/`), the target stays as its user runs it:
compiled code, experts' kernels and gradient checkpoints remain.

All of it is undone at the end. What was done is said in one sentence each, for `Metagradient.notes`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from dpg_cli.engine.inner.cuts import refuse_embedding, trying
from dpg_cli.errors import UsageError

HALVES = (torch.bfloat16, torch.float16)
DIFFERENTIABLE_EXPERTS = ("eager", "batched_mm")  # the other implementations have no forward derivative
OPENED = {  # wrappers whose content trains to the same weights: the attribute that holds it
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
REFUSED = {  # wrappers that own the training themselves
    "FullyShardedDataParallel": "its parameters are shards",
    "FSDPModule": "its parameters are shards",
    "DeepSpeedEngine": "it owns the optimiser",
    "PipelineModule": "its layers are on several processes",
    "ScriptModule": "it has no Python forward",
    "RecursiveScriptModule": "it has no Python forward",
    "LightningModule": "its forward is not the model's",
}
HOOKS = {
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward hook",
}


@contextmanager
def prepared(model: nn.Module, as_it_runs: bool = False) -> Iterator[tuple[nn.Module, list[str]]]:
    """The target itself, in eval mode, and what was done to it.

    Args:
        model: as it was given.
        as_it_runs: leave compiled code and experts as they are.

    Raises:
        UsageError: for a target that no metagradient here is right for, naming it and the remedy.
    """
    target = opened(model)
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(target))
        if as_it_runs:
            stack.enter_context(_compiled_as(model, target))
            stack.enter_context(_checkpointing(target))
        else:
            stack.enter_context(uncompiled(target))
        stack.enter_context(_float32(target, notes))
        if not as_it_runs:
            stack.enter_context(_differentiable_experts(target, notes))
        yield target, notes


def opened(model: nn.Module) -> nn.Module:
    """The target within its wrappers.

    Raises:
        UsageError: for a target that no metagradient here is right for, naming it and the remedy.
    """
    target = unwrap(model)
    refuse(target)
    return target


def unwrap(model: nn.Module) -> nn.Module:
    """The model within wrappers that leave its training as it is.

    Raises:
        UsageError: for any other wrapper, by its name.
    """
    while True:
        inner = unwrap_once(model)
        if inner is model:
            return model
        model = inner


def unwrap_once(model: nn.Module) -> nn.Module:
    """The model within its outermost wrapper; itself where there is none."""
    kinds = [kind.__name__ for kind in type(model).__mro__]
    for name, reason in REFUSED.items():
        if name in kinds:
            raise UsageError(
                f"The target is wrapped in {type(model).__name__}: {reason}.",
                "Give the model itself, whole, as from_pretrained loads it.",
            )
    holder = next((attribute for name, attribute in OPENED.items() if name in kinds), None)
    if holder is not None:
        inner: nn.Module = getattr(model, holder)
        return inner
    return _peft(model) if "PeftModel" in kinds else model


def _peft(model: Any) -> nn.Module:
    """A PEFT model: its base where it has no adapters, itself where they are weights beside the base's."""
    config = getattr(model, "peft_config", None) or {}
    if not config:
        return getattr(model.base_model, "model", model.base_model)
    for name, adapter in config.items():
        if getattr(adapter, "is_prompt_learning", False):
            raise UsageError(
                f"The adapter {name!r} of the target is {type(adapter).__name__}: it adds tokens that no example has.",
                "Use LoRA or another adapter of weights.",
            )
    return model


def refuse(model: nn.Module) -> None:
    """Refuse what would silently make our number another than that of the same training in stock PyTorch.

    Raises:
        UsageError: naming the part and the remedy.
    """
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None) is not None:
        raise UsageError(
            "The target is quantised: its weights are no floating-point numbers that a step could move.",
            "Load it without quantization_config, or give an unquantised copy.",
        )
    if hasattr(model, "_original_forward"):
        raise UsageError(
            "The target's forward is wrapped by accelerate's mixed precision.",
            "Give accelerator.unwrap_model(model, keep_fp32_wrapper=False), and precision='bf16' if it is meant.",
        )
    for name, module in model.named_modules():
        where = f"the module {name!r}" if name else "the target"
        kinds = {kind.__name__ for kind in type(module).__mro__}
        for kind, reason in REFUSED.items():
            if kind in kinds:
                raise UsageError(
                    f"In the target, {where} is a {kind}: {reason}.", "Give the model whole and unwrapped."
                )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            refuse_embedding(module.max_norm, module.scale_grad_by_freq)
        for attribute, what in HOOKS.items():
            if getattr(module, attribute, None):
                raise UsageError(
                    f"In the target, {where} has {what}: it changes the gradient, and no derivative knows how.",
                    "Remove it before the call (handle.remove()).",
                )
    _refuse_parameters(model)


def _refuse_parameters(model: nn.Module) -> None:
    places: list[tuple[torch.device, int, int, str]] = []
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_backward_hooks", None) or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UsageError(
                f"The parameter {name!r} of the target has a gradient hook: stock training would follow it, we do not.",
                "Remove it before the call (handle.remove()).",
            )
        if parameter.device.type == "meta":
            raise UsageError(
                f"The parameter {name!r} of the target is on the meta device: it has no values here.",
                "Load the model whole onto one device.",
            )
        if type(parameter).__name__ == "DTensor" or type(getattr(parameter, "data", None)).__name__ == "DTensor":
            raise UsageError(
                f"The parameter {name!r} of the target is sharded (DTensor).", "Give the model whole on each process."
            )
        if parameter.requires_grad and parameter.numel():
            storage = parameter.untyped_storage()
            size = parameter.element_size()
            start = storage.data_ptr() + int(parameter.storage_offset()) * size
            places.append((parameter.device, start, start + int(parameter.numel()) * size, name))
    places.sort(key=lambda place: (str(place[0]), place[1]))
    for (device, _, end, first), (other, start, _, second) in pairwise(places):
        if device == other and start < end:
            raise UsageError(
                f"The parameters {first!r} and {second!r} of the target share memory, but are two parameters: each would "
                "be trained by itself.",
                "Tie them (one nn.Parameter for both), or clone one.",
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _compiled_as(model: nn.Module, target: nn.Module) -> Iterator[None]:
    """What `torch.compile` made of the target is what a call of the target runs, though it was opened for its parameters."""
    outer: Any = model
    while outer is not target and type(outer).__name__ != "OptimizedModule":
        outer = unwrap_once(outer)
    if outer is target:
        yield
        return
    before = target._compiled_call_impl
    target._compiled_call_impl = outer.dynamo_ctx(target._call_impl)
    try:
        yield
    finally:
        target._compiled_call_impl = before


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Gradient checkpoints of transformers, which it only makes in training mode, where that mode changes nothing else."""
    parts = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    if not parts:
        yield
        return
    ids = torch.tensor([[0, 1]], device=next(model.parameters()).device)
    with torch.no_grad(), uncompiled(model), trying():
        before = model(input_ids=ids, use_cache=False).logits
        for part in parts:
            part.training = True  # of the layer itself; its dropout modules stay off
        same = torch.equal(before, model(input_ids=ids, use_cache=False).logits)
    try:
        for part in parts:
            part.training = same
        yield
    finally:
        for part in parts:
            part.training = False


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Without compiled code, where a part of the model is compiled: it is traced for its own parameters."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = dynamo is not None and any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _float32(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Half-precision weights and buffers in float32; the same bits afterwards."""
    halves = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dtype in HALVES]
    if not any(parameter.dtype in HALVES for parameter in model.parameters()):
        yield
        return
    before = [tensor.data for tensor in halves]
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in halves})
    notes.append(f"The target's weights are {' and '.join(kinds)}: the inner run keeps them in float32.")
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(halves, before, strict=True):
            tensor.data = data


@contextmanager
def _differentiable_experts(model: nn.Module, notes: list[str]) -> Iterator[None]:
    """Mixtures of experts by the loop over experts, whose second derivative PyTorch knows."""
    # transformers' dispatch reads the configuration that the module of the experts holds
    experts = [module for module in model.modules() if hasattr(module, "_apply_gate") and hasattr(module, "config")]
    configs: list[Any] = list({id(module.config): module.config for module in experts}.values())
    configs = [one for one in configs if one._experts_implementation not in (None, *DIFFERENTIABLE_EXPERTS)]
    before = [config._experts_implementation_internal for config in configs]
    if configs:
        notes.append(f"Experts ran as 'eager': {', '.join(sorted(set(before)))} has no second derivative.")
    try:
        for config in configs:
            config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._experts_implementation_internal = name
