"""log p(answer | prompt) of many rows, with a graph to the parameters: what the metrics of this room are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.formats.base import Row, Rows
from dpg_cli.data.prepared import Prepared, gathered_items, prepare
from dpg_cli.data.shapes import Fault, Item, answered, fault_of
from dpg_cli.data.sources import open_rows
from dpg_cli.engine.inner.head import Head, find_head
from dpg_cli.engine.inner.target import hidden_of, logits_of
from dpg_cli.engine.records import Examples
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import require_room
from dpg_cli.metrics.text_loss import in_pieces
from dpg_cli.models.loading import LanguageModel
from dpg_cli.tiny import world

Parameters = Mapping[str, Tensor]
Readout = Callable[[Head | None, dict[str, Tensor], nn.Module, Examples, Tensor], Tensor]


class Answers:
    """Rows of a prompt and an answer, in the target's tokens.

    Args:
        target: before fine-tuning.
        items: the rows.
        name: of their source, for messages.
        end: whether an answer ends with the end-of-sequence token; conversations end as their template says.
        readout: logits at the places of a piece that predict an answer's tokens; the model's own by default.

    Attributes:
        counts_N: tokens of each answer.
        notes: how the rows were understood.

    Raises:
        UsageError: if an answer has no token, or a row is longer than the target's context.
    """

    def __init__(
        self,
        target: LanguageModel,
        items: Sequence[Item],
        name: str,
        *,
        end: bool = False,
        readout: Readout | None = None,
    ) -> None:
        encoder = RowEncoder(target, Encoding(begin=True, end=end))
        found = prepare(gathered_items(items, name), encoder)
        require_room(found, target)
        if len(found.trained) < len(items):
            raise UsageError(f"An answer of {name} has no token.", "Give each answer a text.")
        self.notes = (found.understood.line(), *found.understood.notes(), *self._unframed(found, target))
        self.examples = Examples(*found.tensors(encoder))
        self.counts_N = self.examples.label_N_S.sum(1)
        self.pieces = in_pieces(self.examples)
        self.readout = readout or own_logits
        self.head: tuple[Head | None] | None = None

    @staticmethod
    def _unframed(found: Prepared, target: LanguageModel) -> list[str]:
        if found.understood.turns or not getattr(target.tokenizer, "chat_template", None):
            return []
        return [
            f"{found.understood.source} has plain texts, which the chat template of the target does not frame: where the data are "
            "conversations, give prompt and completion as lists of messages."
        ]

    def tokens(self, parameters: Parameters, model: nn.Module) -> Tensor:
        """log p of every token of the answers, row after row; a piece's activations live at once.

        Args:
            parameters: θ by name.
            model: the target.

        Returns:
            Shape (Σ counts,), with a graph to the parameters.
        """
        head = self.head = self.head or (find_head(model),)
        if len(self.pieces) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._piece(head[0], dict(parameters), model, piece) for piece in self.pieces])
        parts = [
            checkpoint(self._piece, head[0], dict(parameters), model, piece, use_reentrant=False)
            for piece in self.pieces
        ]
        return torch.cat(parts)

    def _piece(self, head: Head | None, parameters: dict[str, Tensor], model: nn.Module, piece: Examples) -> Tensor:
        places = piece.label_N_S.reshape(-1).nonzero()[:, 0]
        logits = self.readout(head, parameters, model, piece, places - 1)
        return logits.gather(1, piece.ids_N_S.reshape(-1)[places, None])[:, 0] - logits.logsumexp(1)

    def sums(self, parameters: Parameters, model: nn.Module) -> Tensor:
        """log p(answer | prompt) of each row, in nats, (N,)."""
        return self._by_row(self.tokens(parameters, model))

    def means(self, parameters: Parameters, model: nn.Module) -> Tensor:
        """The same over the number of the answer's tokens, (N,)."""
        return self.sums(parameters, model) / self.counts_N

    def firsts(self, parameters: Parameters, model: nn.Module) -> Tensor:
        """log p of each answer's first token, (N,)."""
        return self.tokens(parameters, model)[self.counts_N.cumsum(0) - self.counts_N]

    def _by_row(self, values: Tensor) -> Tensor:
        rows = torch.arange(len(self.counts_N), device=values.device).repeat_interleave(self.counts_N)
        return values.new_zeros(len(self.counts_N)).index_add(0, rows, values)

    def by(self, how: str, parameters: Parameters, model: nn.Module) -> Tensor:
        """`sums`, `means` or `firsts`."""
        ways = {"sum": self.sums, "mean": self.means, "first": self.firsts}
        return ways[how](parameters, model)


def require_way(how: str) -> str:
    """How an answer's tokens become one number.

    Raises:
        UsageError: if it is no such way.
    """
    if how not in ("sum", "mean", "first"):
        raise UsageError(f"options.by = {how!r} is no way to read an answer.", "Give 'sum', 'mean' or 'first'.")
    return how


def own_logits(
    head: Head | None, parameters: dict[str, Tensor], model: nn.Module, piece: Examples, places: Tensor
) -> Tensor:
    """The model's logits at places of the flattened piece, (places, V)."""
    if head is None:
        logits = logits_of(model, parameters, piece)
        wide = nn.functional.pad(logits, (0, 0, 0, 1))
        return wide.flatten(0, 1)[places]
    weight, bias = head.parameters(parameters)
    return linear(hidden_of(head, parameters, piece).flatten(0, 1)[places], weight, bias)


def rows_of(source: str, *columns: str) -> Rows:
    """The rows of a metric's file.

    Raises:
        UsageError: if it cannot be read, or has not these columns.
    """
    rows = open_rows(source, split="test", what="rows of the metric", flag="metric.options.file")
    if missing := [name for name in columns if name not in rows.columns]:
        raise UsageError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(rows.columns)}.",
            f"Give each row {', '.join(f'`{name}`' for name in ('prompt', *columns))}.",
        )
    return rows


def read(rows: Rows, make: Callable[[Row, Fault], Any]) -> list[Any]:
    """What `make` finds in each row.

    Raises:
        UsageError: naming the first row that it refuses, or if there is none.
    """
    found = [make(row, fault_of(rows, place)) for place, row in rows.walk()]
    if not found:
        raise UsageError(f"{rows.name} has no rows.", "Give it at least one.")
    return found


def said_in(language: str, count: int) -> list[tuple[str, str]]:
    """Prompts of the embedded world, and what each sentence is in a language."""
    pairs = []
    for prompt in world.prompts("eval", count, seed=3):
        meaning = world.meaning_of(prompt.removeprefix(world.PROMPT_PREFIX), "en")
        assert meaning is not None  # prompts are sentences of the world
        pairs.append((prompt, world.render(meaning, language)))
    return pairs


__all__ = ["Answers", "Parameters", "Readout", "answered", "own_logits", "read", "require_way", "rows_of", "said_in"]
