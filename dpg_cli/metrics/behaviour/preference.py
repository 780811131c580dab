"""Preference pairs: Φ = mean log σ(β m), m = log p(chosen) - log p(rejected), less its value at θ_0 with `reference`.

With the reference this is minus the loss of direct preference optimisation (Rafailov et al., arXiv 2305.18290), θ_0 as π_ref.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dpg_cli.data.formats.base import Row
from dpg_cli.data.shapes import Chat, Fault, Item, Pair, answered, messages_of
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.behaviour.answers import Answers, read, require_way, rows_of, said_in
from dpg_cli.models.loading import LanguageModel


class PreferencePairs(Metric):
    """Chosen answers likelier than rejected ones.

    Args:
        target: before fine-tuning.
        file: any source of rows with `prompt`, `chosen` and `rejected` (texts, or lists of messages; without a prompt the two
            are whole conversations that part at their last message). By default prompts of the embedded world, the sentence
            in German chosen over the one in English.
        beta: β, larger than 0.
        reference: take each margin from its value before fine-tuning.
        by: what of an answer counts: the "sum" of its tokens or their "mean".

    Raises:
        UsageError: naming the first row that is not of that form.
    """

    def __init__(
        self, target: LanguageModel, file: str = "", beta: float = 1.0, reference: bool = False, by: str = "sum"
    ) -> None:
        super().__init__(target)
        if beta <= 0:
            raise UsageError(f"options.beta = {beta:g} is not larger than 0.", "Give 0.1 or 1, for example.")
        self.beta, self.way = beta, require_way(by)
        pairs = read(rows_of(file, "chosen", "rejected"), preference) if file else default()
        self.answers = Answers(target, [item for pair in pairs for item in pair], file or "the embedded pairs")
        self.notes = self.answers.notes
        self.before = torch.zeros(len(pairs), dtype=target.head.dtype, device=target.head.device)
        if reference:
            with torch.no_grad():
                self.before = self.margins(dict(target.model.named_parameters()), target.model)

    def margins(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """m of each pair, in nats, (pairs,)."""
        chosen, rejected = self.answers.by(self.way, parameters, model).unflatten(0, (-1, 2)).unbind(1)
        return chosen - rejected - self.before

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return logsigmoid(self.beta * self.margins(parameters, model)).mean()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Share of pairs with a margin above 0, and the mean margin."""
        margins = self.margins(parameters, model)
        return {"preferred": float((margins > 0).double().mean()), "margin": float(margins.mean())}


def preference(row: Row, fault: Fault) -> tuple[Item, Item]:
    """The chosen and the rejected answer of a row, each after its prompt."""
    if row.get("prompt") is None and row.get("question") is None:
        chosen, rejected = (messages_of(row.get(name), name, fault) for name in ("chosen", "rejected"))
        if not chosen or chosen[:-1] != rejected[:-1]:
            raise fault(
                "without a `prompt`, `chosen` and `rejected` are conversations that differ in their last message"
            )
        return Chat(chosen, len(chosen) - 1), Chat(rejected, len(rejected) - 1)
    return answered(row, row.get("chosen"), fault), answered(row, row.get("rejected"), fault)


def default() -> list[tuple[Item, Item]]:
    """Prompts of the embedded world, German over English."""
    german, english = said_in("de", 32), said_in("en", 32)
    return [(Pair(*one), Pair(*other)) for one, other in zip(german, english, strict=True)]
