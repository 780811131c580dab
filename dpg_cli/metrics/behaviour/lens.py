"""The logit lens: Φ = mean log p of given answers as read from the hidden state after block L, by the model's final norm and head.

What a model "already says" halfway through (nostalgebraist, "interpreting GPT: the logit lens", 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from dpg_cli.data.shapes import Pair, items, shape_of
from dpg_cli.engine.inner.head import Head, find_head
from dpg_cli.engine.inner.target import inputs_of
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.behaviour.answers import Answers, require_way, rows_of, said_in
from dpg_cli.models.loading import LanguageModel


class LogitLens(Metric):
    """Answers that can be read from a hidden state early in the model.

    Args:
        target: before fine-tuning.
        layer: L; 0 is the embedding, 1 the output of the first block.
        file: any source of rows with a prompt and a completion. By default prompts of the embedded world, and the same
            sentences in German.
        by: what of an answer counts: the "first" token, the "mean" or the "sum" of all.

    Raises:
        UsageError: if the layer does not exist, or the target's final norm or head is not found.
    """

    def __init__(self, target: LanguageModel, layer: int = 1, file: str = "", by: str = "first") -> None:
        super().__init__(target)
        self.way, self.layer = require_way(by), layer
        self.norm = final_norm(target, layer)
        if file:
            rows = rows_of(file)
            found = [item for _, item in items(rows, shape_of(rows))]
        else:
            found = [Pair(*pair) for pair in said_in("de", 32)]
        self.answers = Answers(target, found, file or "the embedded answers", readout=self.logits)
        self.notes = self.answers.notes

    def logits(
        self, head: Head | None, parameters: dict[str, Tensor], model: nn.Module, piece: Examples, places: Tensor
    ) -> Tensor:
        """What the lens reads at places of a flattened piece, (places, V)."""
        assert head is not None  # `final_norm` has seen to it
        inputs = {**inputs_of(piece), "output_hidden_states": True}
        output: Any = functional_call(head.base, head.base_parameters(parameters), (), inputs)
        states = output.hidden_states[self.layer].flatten(0, 1)[places]
        norm = head.base.get_submodule(self.norm)
        prefix = f"{head.prefix}{self.norm}."
        own = {name.removeprefix(prefix): value for name, value in parameters.items() if name.startswith(prefix)}
        return linear(functional_call(norm, own, (states,)), *head.parameters(parameters))

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return self.answers.by(self.way, parameters, model).mean()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Mean log-probability by the lens, in nats."""
        return {"lens": float(self(parameters, model))}


@torch.no_grad()
def final_norm(target: LanguageModel, layer: int) -> str:
    """The name, within the backbone, of the norm that makes the last hidden state.

    Raises:
        UsageError: if the layer does not exist, or there is no such norm before a standard head.
    """
    head = find_head(target.model)
    if head is None:
        raise UsageError(f"The target {target.name!r} has no standard LM head to read with.", "Take another target.")
    seen: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output))
        for name, module in head.base.named_modules()
        if name and "norm" in type(module).__name__.lower()
    ]
    try:
        ids = torch.arange(min(2, head.layer.out_features), device=head.layer.weight.device)[None]
        output: Any = head.base(input_ids=ids, use_cache=False, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = output.hidden_states
    if not 0 <= layer < len(states) - 1:
        raise UsageError(
            f"The target has no layer {layer} before its last.", f"Give options.layer from 0 to {len(states) - 2}."
        )
    last = output.last_hidden_state
    names = [name for name, value in seen.items() if isinstance(value, Tensor) and value.shape == last.shape]
    found = [name for name in names if torch.equal(seen[name], last)]
    if not found:
        raise UsageError(f"The final norm of the target {target.name!r} was not found.", "Take another target.")
    return found[-1]
