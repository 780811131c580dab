"""Raise accuracy on a small labelled set through its loss: Φ = minus the mean token loss of the labels, given their texts.

Accuracy is a step function: it has no useful derivative. The loss of the label's tokens has one, and falls as accuracy rises.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.prepared import gathered_items, prepare
from dpg_cli.data.shapes import Pair, fault_of, sound
from dpg_cli.data.sources import open_rows
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.tiny import world
from dpg_cli.tiny.lexicon import TIMES

NAMES = (("text", "prompt"), ("label", "completion"))  # columns of the text and of its label


class LabelAccuracy(Metric):
    """A higher accuracy on a small labelled set.

    Args:
        target: before fine-tuning.
        file: any source of rows with a `text` (or `prompt`) and a `label` (or `completion`) each; the label follows the text
            directly, so it usually begins with a blank. By default sentences of the embedded world: one that has said its
            time in front ends at once, one that has not must go on with " now.", and not with any other time.

    Raises:
        UsageError: if the file is not of that form, or a text is too long for the target.
    """

    def __init__(self, target: LanguageModel, file: str = "") -> None:
        super().__init__(target)
        encoder = RowEncoder(target, Encoding(begin=True, end=False))
        found = prepare(gathered_items(read_pairs(file) if file else world_pairs(), file or "the texts"), encoder)
        if found.understood.cut:
            longest = found.rows.longest
            raise UsageError(f"A labelled text has {longest} tokens; the target reads {target.context}.", "Shorten it.")
        ids_N_S, _, self.is_label = found.tensors(encoder)
        self.ids = ids_N_S

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


def world_pairs(n: int = 48) -> list[Pair]:
    """The default set: n sentences of the embedded world, every other one with its time in front, the rest without any."""
    pairs = []
    for number, prompt in enumerate(world.prompts("eval", n, seed=3)):
        sentence = prompt.removeprefix(world.PROMPT_PREFIX).strip()
        meaning = world.meaning_of(sentence, "en")
        assert meaning is not None  # prompts are sentences of the world
        time = TIMES[meaning.time][0].partition("|")[0]
        text = sentence.removesuffix(f" {time}.")
        pairs.append(Pair(f"{time} {text}", ".") if number % 2 else Pair(text, " now."))
    return pairs


def read_pairs(source: str) -> list[Pair]:
    """Text and label of each row of a source.

    Raises:
        UsageError: naming the first row without the two.
    """
    rows = open_rows(source, split="test", what="labelled set", flag="file")
    names = [next((name for name in known if name in rows.columns), known[0]) for known in NAMES]
    pairs = []
    for place, row in rows.walk():
        text, label = (row.get(name) for name in names)
        if not (isinstance(text, str) and isinstance(label, str) and text and label):
            raise rows.fault(place, f"no `{names[0]}` and `{names[1]}` that are texts")
        sound(text + label, names[0], fault_of(rows, place))
        pairs.append(Pair(text, label))
    return pairs
