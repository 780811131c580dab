"""The arguments of a library call: one clear error for what cannot be meant, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.optimizers import OptimizerSpec
from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.records import Examples
from dpg_cli.errors import BadTypeError, BadValueError


def accepted(model: nn.Module, examples: Any, optimizer: Any, weights_N: Any = None) -> Examples:
    """The examples, as the run takes them.

    Raises:
        BadTypeError: if the examples or the optimiser are of another kind, naming the way to what is needed.
        BadValueError: for no examples, a token beyond the vocabulary, another device, or weights of another number.
    """
    if not isinstance(examples, Examples):
        raise BadTypeError(f"The examples are a {type(examples).__name__}, not Examples.", _constructor(examples))
    if not isinstance(optimizer, OptimizerSpec | Recipe):
        raise BadTypeError(f"The optimiser is a {_kind(optimizer)}, not an OptimizerSpec.", _spec_of(optimizer))
    if not len(examples):
        raise BadValueError("There is no example.")
    if weights_N is not None:
        shape = tuple(weights_N.shape) if isinstance(weights_N, Tensor) else None
        if shape is None:
            raise BadTypeError(f"weights_N is a {type(weights_N).__name__}, not a tensor.", "Use torch.tensor(...).")
        if shape != (len(examples),):
            raise BadValueError(f"weights_N has the shape {shape} for {len(examples)} examples.", "Give one a row.")
        if not bool(torch.isfinite(weights_N).all()):
            raise BadValueError("weights_N is not finite.")
    device = next(parameter.device for parameter in model.parameters())
    if examples.ids_N_S.device != device:
        raise BadValueError(
            f"The examples are on {examples.ids_N_S.device}, the model on {device}.",
            f"Use examples.to({str(device)!r}).",
        )
    return _within_vocabulary(model, examples)


def _within_vocabulary(model: Any, examples: Examples) -> Examples:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor) or not examples.ids_N_S.numel():
        return examples
    size = weight.shape[0]
    low, high = (int(end) for end in torch.aminmax(examples.ids_N_S))
    if low >= 0 and high < size:
        return examples
    wrong = examples.attention_N_S & ((examples.ids_N_S < 0) | (examples.ids_N_S >= size))
    if bool(wrong.any()):
        row, place = wrong.nonzero()[0].tolist()
        raise BadValueError(
            f"Token {place} of row {row} is {int(examples.ids_N_S[row, place])}; the model has {size} tokens.",
            "Was another tokeniser used, or one with added tokens? Then resize_token_embeddings first.",
        )
    ids = examples.ids_N_S.masked_fill(~examples.attention_N_S, 0)
    return replace(examples, ids_N_S=ids)


def _constructor(examples: Any) -> str:
    if hasattr(examples, "keys"):
        return "Use Examples.from_batch(batch)."
    if isinstance(examples, list | tuple) and examples and isinstance(examples[0], list | tuple):
        first = examples[0][0] if examples[0] else None
        if hasattr(first, "keys"):
            return "Use Examples.from_messages(tokenizer, conversations)."
        return "Use Examples.from_sequences(sequences)."
    return "Use Examples.from_dataset(dataset), from_batch, from_sequences or from_messages."


def _kind(optimizer: Any) -> str:
    if isinstance(optimizer, type):
        return f"class ({optimizer.__name__})"
    module = "torch.optim." if isinstance(optimizer, torch.optim.Optimizer) else ""
    return module + type(optimizer).__name__


def _spec_of(optimizer: Any) -> str:
    """The specification that a `torch.optim` optimiser would be, as a remedy."""
    general = "Use OptimizerSpec('adamw', lr=..., eps=..., ...), imported from dpg_cli.engine."
    if not isinstance(optimizer, torch.optim.Optimizer):
        return general
    group = optimizer.param_groups[0]
    decay = f", weight_decay={group['weight_decay']}" if group.get("weight_decay") else ""
    if isinstance(optimizer, torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        inner = f"'adamw', lr={group['lr']}, beta1={beta1}, beta2={beta2}, eps={group['eps']}{decay}"
    elif isinstance(optimizer, torch.optim.SGD):
        momentum = f", momentum={group['momentum']}" if group.get("momentum") else ""
        inner = f"'sgd', lr={group['lr']}{momentum}{decay}"
    else:
        return general
    return f"The run makes its own: use OptimizerSpec({inner})."
