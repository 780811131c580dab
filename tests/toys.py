"""A small causal LM with an exchangeable block in its middle, to put one peculiarity at a time into a model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCAB, WIDTH = 29, 8


class ToyLM(nn.Module):
    """Embedding, causal averaging, a block, a head that is the embedding.

    Args:
        block: from hidden states (B, S, D) to hidden states.
        tied: the head is the embedding.
        embedding: further options of it.
    """

    def __init__(self, block: nn.Module, *, tied: bool = True, seed: int = 0, **embedding: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH, **embedding)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.block = block
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter))
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        counts = torch.arange(1, hidden.shape[1] + 1, dtype=hidden.dtype, device=hidden.device)[:, None]
        hidden = hidden + torch.tanh(self.mix(hidden.cumsum(1) / counts))
        return SimpleNamespace(logits=self.head(self.block(hidden)))


class Block(nn.Module):
    """Two linear maps and a function of the hidden states and of them.

    Args:
        function: (hidden, first, second) -> hidden.
    """

    def __init__(self, function: Callable[[Tensor, nn.Linear, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.function = function

    def forward(self, hidden: Tensor) -> Tensor:
        return self.function(hidden, self.first, self.second)
