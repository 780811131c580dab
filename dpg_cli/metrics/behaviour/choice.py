"""Multiple choice: Φ = mean over questions of log p(right) - log Σ_wrong p(wrong), the margin of the right answer.

With `by = "first"` every choice counts by its first token: log-probabilities of one context differ as its logits do, so that
the margin is one of logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.data.formats.base import Row
from dpg_cli.data.shapes import Fault, Item, Pair, answered
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.behaviour.answers import Answers, read, require_way, rows_of, said_in
from dpg_cli.models.loading import LanguageModel

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class MultipleChoice(Metric):
    """Questions answered rightly, by the margin of the right choice.

    Args:
        target: before fine-tuning.
        file: any source of rows with `prompt` (or `question`), `choices` (a list of texts) and `answer` (which of them is
            right: its number from 0, its letter from A, or its text). By default prompts of the embedded world with the
            sentence in English and in German, of which the German one is right.
        by: what of a choice counts: the "sum" of its tokens, their "mean", or the "first".

    Raises:
        UsageError: naming the first row that is not of that form.
    """

    def __init__(self, target: LanguageModel, file: str = "", by: str = "sum") -> None:
        super().__init__(target)
        self.way = require_way(by)
        rows = read(rows_of(file, "choices", "answer"), question) if file else default()
        self.answers = Answers(target, [item for found, _ in rows for item in found], file or "the embedded choices")
        self.notes = self.answers.notes
        device = self.answers.counts_N.device
        self.sizes = [len(found) for found, _ in rows]
        self.right_Q = torch.tensor([right for _, right in rows], device=device)
        if self.way == "first":
            self._require_first_tokens()

    def _require_first_tokens(self) -> None:
        """Refuse a question whose right choice begins as a wrong one does: the margin would be of nothing."""
        label_N_S = self.answers.examples.label_N_S
        first_N = self.answers.examples.ids_N_S.gather(1, label_N_S.int().argmax(1, keepdim=True))[:, 0]
        for number, (tokens, right) in enumerate(zip(first_N.split(self.sizes), self.right_Q.tolist(), strict=True)):
            if tokens.tolist().count(int(tokens[right])) > 1:
                raise UsageError(
                    f"The right choice of question {number + 1} begins with the same token as a wrong one.",
                    "Let options.by be 'sum' or 'mean'.",
                )

    def margins(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """The margin of each question's right choice, in nats, (Q,)."""
        values_N = self.answers.by(self.way, parameters, model)
        margins = []
        for values, right in zip(values_N.split(self.sizes), self.right_Q.tolist(), strict=True):
            wrong = torch.cat([values[:right], values[right + 1 :]])
            margins.append(values[right] - wrong.logsumexp(0))
        return torch.stack(margins)

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        return self.margins(parameters, model).mean()

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Share of questions whose right choice is the likeliest, and the mean margin."""
        values_N = self.answers.by(self.way, parameters, model)
        best = torch.stack([values.argmax() for values in values_N.split(self.sizes)])
        right = (best == self.right_Q).double().mean()
        return {"accuracy": float(right), "margin": float(self.margins(parameters, model).mean())}


def question(row: Row, fault: Fault) -> tuple[list[Item], int]:
    """The choices of a row, each after its prompt, and the place of the right one."""
    choices = row.get("choices")
    if isinstance(choices, Mapping):  # of lm-eval's and ARC's kind: text and label lists
        labels, choices = choices.get("label"), choices.get("text")
    else:
        labels = None
    if not isinstance(choices, list) or len(choices) < 2:
        raise fault("`choices` is no list of two or more")
    right = place_of(row.get("answer"), choices, labels)
    if right is None:
        raise fault("`answer` is neither the number (from 0), the letter (from A) nor the text of one of its choices")
    return [answered(row, choice, fault) for choice in choices], right


def place_of(answer: Any, choices: list[Any], labels: Any = None) -> int | None:
    """Which choice an answer names; None where it names none, or more than one."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if not isinstance(answer, str):
        return None
    if choices.count(answer) == 1:
        return choices.index(answer)
    if isinstance(labels, list) and len(labels) == len(choices) and labels.count(answer) == 1:
        return labels.index(answer)
    place = LETTERS.find(answer.strip().upper()) if len(answer.strip()) == 1 else -1
    return place if 0 <= place < len(choices) else None


def default() -> list[tuple[list[Item], int]]:
    """Prompts of the embedded world: the sentence in English or in German?"""
    english, german = said_in("en", 32), said_in("de", 32)
    return [([Pair(*one), Pair(*other)], 1) for one, other in zip(english, german, strict=True)]
