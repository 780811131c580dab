"""Which parameters of a model an optimiser of whole matrices takes as such."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the trainable matrices that are neither an embedding's nor the LM head's.

    What torch.optim.Muon is meant for ("2D parameters of neural network hidden layers"); all else goes to AdamW.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(parameter) for parameter in cast(Any, head).parameters()} if head is not None else set()
    named = model.named_parameters()
    return {name for name, p in named if p.requires_grad and p.ndim == 2 and id(p) not in outer}
