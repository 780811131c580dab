"""The one place where a row becomes an example: its token ids, and which of them are trained on.

A row becomes what stock fine-tuning (TRL's `SFTTrainer`) makes of it: the whole is tokenised at once with the tokeniser's
own special tokens, the end-of-sequence token follows a text or completion that does not end with it, and a conversation is
what the chat template writes. `tokens` places the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dpg_cli.data.conversations import chat_template
from dpg_cli.data.shapes import Asked, Chat, Fault, Item, Pair, Text, sound, trained_text
from dpg_cli.data.tokens import TokenRows, Tokens, Written, check_ids, tokenise
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel, quiet_transformers

TrainOn = Literal["auto", "last", "all"]
Keep = Literal["start", "end"]


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens.

    Attributes:
        max_length: longest sequence in tokens; 0: the target's context.
        keep: which end of a longer one stays.
        train_on: "auto": a text, a completion, the assistant's turns; "last": of those turns the last; "all": everything.
        begin: a beginning-of-sequence token stands first where the target has one, whether its tokeniser adds it or not.
        end: the end-of-sequence token follows a text or completion.
    """

    max_length: int = 0
    keep: Keep = "start"
    train_on: TrainOn = "auto"
    begin: bool = False
    end: bool = True


class RowEncoder:
    """Turns rows into token ids and masks for one target.

    Args:
        target: gives the tokeniser, the context and the number of embedded ids.
        how: see `Encoding`.
    """

    def __init__(self, target: LanguageModel, how: Encoding | None = None) -> None:
        self.target, self.tokenizer, self.how = target, target.tokenizer, how or Encoding()
        self.template = chat_template(target.tokenizer, target.name)
        limits = [limit for limit in (self.how.max_length, target.context) if limit]
        self.longest = min(limits) if limits else None
        self.embedded = target.model.get_input_embeddings().weight.shape[0]

    def __call__(self, items: Sequence[Item], faults: Sequence[Fault]) -> list[Tokens]:
        """Rows as tokens, in their order.

        Args:
            items: what the rows mean.
            faults: how each is refused.

        Raises:
            UsageError: naming the first row that cannot be read.
        """
        marked: dict[int, Tokens] = {}
        written: dict[int, Written] = {}
        with quiet_transformers():  # of texts longer than the tokeniser expects: they are cut, and counted
            for place, (item, fault) in enumerate(zip(items, faults, strict=True)):
                item = self.settled(item)
                tokens = self._by_marks(item, fault) if isinstance(item, Chat) else None
                if tokens is None:
                    written[place] = self.write(item, fault)
                else:
                    marked[place] = tokens
            found = marked | dict(zip(written, tokenise(self.tokenizer, list(written.values())), strict=True))
        rows = [found[place] for place in range(len(items))]
        for tokens, fault in zip(rows, faults, strict=True):
            check_ids(tokens.ids, self.embedded, self.tokenizer, self.target.name, fault)
        return [self._finished(tokens) for tokens in rows]

    def settled(self, item: Item) -> Item:
        """A question and its answer in the form that the tokeniser has: a conversation, or a text with a blank line."""
        if not isinstance(item, Asked):
            return item
        if self.template is None:
            return Pair(f"{item.question}\n\n", item.answer)
        return Chat([{"role": "user", "content": item.question}, {"role": "assistant", "content": item.answer}], 1)

    def write(self, item: Item, fault: Fault) -> Written:
        """A row as text, and what of it is trained on."""
        if isinstance(item, Chat):
            return self._conversation(item, fault)
        assert not isinstance(item, Asked)
        context = item.context if isinstance(item, Pair) else ""
        body, end = trained_text(item), self.tokenizer.eos_token if self.how.end else ""
        text = context + (body if body.endswith(end) else body + end)
        if isinstance(item, Text) or self.how.train_on == "all":
            return Written(text, None, not self.how.begin, None, text if context else body)
        return Written(text, [(len(context), len(text))], not self.how.begin, context, body)

    def _conversation(self, chat: Chat, fault: Fault) -> Written:
        """A conversation as its template writes it."""
        if self.template is None:
            raise UsageError(
                f"The examples are conversations, and the tokeniser of {self.target.name!r} has no chat template.",
                "Take an instruct model, or give the columns of text: DATA:COLUMN and --prompts DATA:COLUMN.",
            )
        whole, spans, before = self.template.written(chat, fault, turns=self.how.train_on != "all")
        sound(whole, "messages", fault)
        if self.how.train_on == "all":
            return Written(whole, None, False, None, whole)
        if not spans:
            raise fault("there is no turn of the assistant to train on")
        spans = spans[-1:] if self.how.train_on == "last" else spans
        shown = "".join(whole[start:end] for start, end in spans)
        return Written(whole, spans, False, before if chat.context is not None else None, shown)

    def _by_marks(self, chat: Chat, fault: Fault) -> Tokens | None:
        """A conversation masked by its template's marks; None where there are none, or they miss a turn with a content."""
        if self.template is None or not self.template.marked or not self.tokenizer.is_fast:
            return None
        if chat.context is not None or self.how.train_on == "all":
            return None
        text, ids, mask, offsets = self.template.marks(chat, fault)
        runs = _runs(mask)
        turns = [m for m in chat.messages if m["role"] == "assistant" and (m.get("content") or m.get("tool_calls"))]
        if len(runs) < max(1, len(turns)):
            return None
        if self.how.train_on == "last":
            runs = runs[-1:]
            mask = [place in runs[0] for place in range(len(mask))]
        shown = "".join(text[offsets[run.start][0] : offsets[run.stop - 1][1]] for run in runs)
        return Tokens(ids, mask, shown)

    def _finished(self, tokens: Tokens) -> Tokens:
        """A row with the beginning-of-sequence token that is asked for, cut; nothing predicts its first token."""
        bos = [self.target.bos_id] if self.how.begin and self.target.bos_id is not None else []
        ids, label = [*bos, *tokens.ids], [*(False for _ in bos), *tokens.label]
        over = max(0, len(ids) - (self.longest or len(ids)))
        part = slice(None, len(ids) - over) if self.how.keep == "start" else slice(over, None)
        ids, label = ids[part], label[part]
        return replace(tokens, ids=ids, label=[False, *label[1:]] if label else [], cut=over)


def padded(rows: TokenRows, target: LanguageModel, places: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as one batch on the target's device, padded at the right: what `engine.Examples` is made of.

    Args:
        rows: all of them.
        target: its padding token, and the device.
        places: which of them, in their order.

    Returns:
        Token ids (N, S), int64; real tokens, bool; trained tokens, bool.
    """
    every, chosen = rows.lengths, np.zeros(len(rows), dtype=bool)
    chosen[places] = True
    lengths, own = torch.from_numpy(every[chosen]), torch.from_numpy(np.repeat(chosen, every))
    attention = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.full(attention.shape, target.pad_id, dtype=torch.int64)
    ids[attention] = torch.frombuffer(rows.ids, dtype=torch.int32)[own].long()
    label = torch.zeros_like(attention)
    label[attention] = torch.frombuffer(rows.label, dtype=torch.bool)[own]
    device = target.head.device
    return ids.to(device), attention.to(device), label.to(device)


def _runs(mask: Sequence[bool]) -> list[range]:
    """The stretches of a mask that are True."""
    begins = [place for place, bit in enumerate(mask) if bit and not (place and mask[place - 1])]
    ends = [place + 1 for place, bit in enumerate(mask) if bit and not (place + 1 < len(mask) and mask[place + 1])]
    return [range(begin, end) for begin, end in zip(begins, ends, strict=True)]
