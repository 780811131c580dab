"""Raise accuracy on a small labelled set through its loss: Φ = minus the mean token loss of the labels, given their texts.

Accuracy is a step function: it has no useful derivative. The loss of the label's tokens has one, and falls as accuracy rises.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.tiny import world
from dpg_cli.tiny.lexicon import TIMES


class LabelAccuracy(Metric):
    """A higher accuracy on a small labelled set.

    Args:
        target: before fine-tuning.
        file: JSON Lines with a `text` and a `label` string each; the label follows the text directly, so it usually begins
            with a blank. By default sentences of the embedded world: one that has said its time in front ends at once,
            one that has not must go on with " now.", and not with any other time.

    Raises:
        UsageError: if the file is not of that form, or a text is too long for the target.
    """

    def __init__(self, target: LanguageModel, file: str = "") -> None:
        super().__init__(target)
        pairs = read_pairs(Path(file).expanduser()) if file else world_pairs()
        bos = [] if target.bos_id is None else [target.bos_id]
        texts, labels = (
            [target.tokenizer(pair[side], add_special_tokens=False)["input_ids"] for pair in pairs] for side in (0, 1)
        )
        rows = [[*bos, *text, *label] for text, label in zip(texts, labels, strict=True)]
        limit = getattr(target.model.config, "max_position_embeddings", None)
        longest = max(map(len, rows))
        if limit is not None and longest > limit:
            raise UsageError(f"A labelled text has {longest} tokens; the target reads {limit}.", "Shorten it.")
        batch = Examples.from_sequences(rows)
        places = torch.arange(longest)
        ends = torch.tensor([len(row) for row in rows])
        starts = ends - torch.tensor([len(label) for label in labels])
        self.ids = batch.ids_N_S.to(target.head.device)
        is_label = (places >= starts[:, None]) & (places < ends[:, None])
        self.is_label = is_label.to(target.head.device)

    def logits(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Logits that predict tokens 1 … S-1."""
        return functional_call(model, dict(parameters), (), {"input_ids": self.ids, "use_cache": False}).logits[:, :-1]

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        """Φ; see the module."""
        logits = self.logits(parameters, model)[self.is_label[:, 1:]]
        return -cross_entropy(logits, self.ids[self.is_label])

    @torch.no_grad()
    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        """Share of examples whose every label token is the target's first choice, and the loss in nats a token."""
        logits = self.logits(parameters, model)
        right = (logits.argmax(-1) == self.ids[:, 1:]) | ~self.is_label[:, 1:]
        loss = cross_entropy(logits[self.is_label[:, 1:]], self.ids[self.is_label])
        return {"accuracy": float(right.all(1).double().mean()), "label_loss": float(loss)}


def world_pairs(n: int = 48) -> list[tuple[str, str]]:
    """The default set: n sentences of the embedded world, every other one with its time in front, the rest without any."""
    pairs = []
    for number, prompt in enumerate(world.prompts("eval", n, seed=3)):
        sentence = prompt.removeprefix(world.PROMPT_PREFIX).strip()
        meaning = world.meaning_of(sentence, "en")
        assert meaning is not None  # prompts are sentences of the world
        time = TIMES[meaning.time][0].partition("|")[0]
        text = sentence.removesuffix(f" {time}.")
        pairs.append((f"{time} {text}", ".") if number % 2 else (text, " now."))
    return pairs


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Text and label of each line of a JSON Lines file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The labelled set {path} cannot be read: {error}.", "Name a JSON Lines file.") from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, label = row["text"], row["label"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = label = None
        if not (isinstance(text, str) and isinstance(label, str) and text and label):
            raise UsageError(
                f"{path}, line {number}: no JSON object with a `text` and a `label` string.", "Correct that line."
            )
        pairs.append((text, label))
    if not pairs:
        raise UsageError(f"The labelled set {path} is empty.", "Give at least one line.")
    return pairs
