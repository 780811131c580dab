"""Steer an activation: Φ = mean over prompts of <h_L, d>, the hidden state after block L along a unit direction d.

d points from the mean hidden state of the texts `away` to that of the texts `toward`, both read before fine-tuning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.registry import encode, texts_of
from dpg_cli.models.loading import LanguageModel
from dpg_cli.tiny import world


class SteerDirection(Metric):
    """Activations of given prompts that lean towards one kind of text and away from another.

    Args:
        target: before fine-tuning.
        layer: L; 0 is the embedding, 1 the output of the first block, -1 that of the last.
        prompts: texts whose hidden states are steered; by default eight prompts of the embedded world.
        toward, away: texts that span the direction, such as the two sides of contrast pairs; by default German and English
            sentences of the embedded world. Each of the three is a list of texts or a source of rows (docs/data.md).

    Raises:
        UsageError: if the layer does not exist or the two kinds of text are not told apart there.
    """

    def __init__(
        self,
        target: LanguageModel,
        layer: int = -1,
        prompts: str | Sequence[str] = (),
        toward: str | Sequence[str] = (),
        away: str | Sequence[str] = (),
    ) -> None:
        super().__init__(target)
        self.layer = layer
        self.prompts = encode(texts_of(prompts, world.prompts("eval", 8, seed=0)), target)
        parameters = dict(target.model.named_parameters())
        with torch.no_grad():
            there, here = (
                self.state(parameters, target.model, encode(texts_of(texts, default), target))
                for texts, default in (
                    (toward, world.sentences("eval", "de", 32, seed=0)),
                    (away, world.sentences("eval", "en", 32, seed=0)),
                )
            )
            gap = there - here
            if not float(gap.norm()) > 0:
                raise UsageError("`toward` and `away` have one mean hidden state.", "Give texts that differ.")
            self.direction = gap / gap.norm()
            self.before = float(self.state(parameters, target.model, self.prompts) @ self.direction)
            self.gap = float(gap.norm())

    def state(self, parameters: Mapping[str, Tensor], model: nn.Module, texts: Examples) -> Tensor:
        """Mean hidden state of a batch's tokens after block L, (width,)."""
        inputs = {"input_ids": texts.ids_N_S, "use_cache": False, "output_hidden_states": True}
        layers = functional_call(model, dict(parameters), (), inputs).hidden_states
        if not -len(layers) <= self.layer < len(layers):
            raise UsageError(
                f"The target has no layer {self.layer}.", f"Give one of {-len(layers)} to {len(layers) - 1}."
            )
        return layers[self.layer][texts.attention_N_S].mean(0)

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return self.state(parameters, model, self.prompts) @ self.direction

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """The projection, and its change as a share of the distance between the two kinds of text."""
        projection = float(self(parameters, model))
        return {"projection": projection, "share_of_gap": (projection - self.before) / self.gap}
