"""What people have at hand, as padded rows: lists of ids, what a tokeniser or collator gives, data sets, messages.

Each function gives (ids, attention, label), (N, S) tensors; `Examples` has a constructor for each. What a row means here is
what TRL's SFT trainer makes of it: labels of -100, `completion_mask` or `assistant_masks` are not trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpg_cli.errors import BadTypeError, BadValueError

IGNORED = -100  # the label of a token that is not trained
MASKS = ("completion_mask", "assistant_masks")  # 1 on what is trained
READ = frozenset(("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", *MASKS))
HARMLESS = frozenset(("special_tokens_mask", "offset_mapping", "length"))  # they change nothing that a model computes


class Padded(NamedTuple):
    """Rows padded on the right: ids int64, attention and label bool, each (N, S)."""

    ids_N_S: Tensor
    attention_N_S: Tensor
    label_N_S: Tensor


def pad(sequences: Sequence[Sequence[int]], trained: Sequence[Sequence[bool]], pad_id: int) -> Padded:
    """Rows of ids and whether each token is trained; a row's first token never is.

    Raises:
        BadValueError: if there is no row, or one is empty.
    """
    if not len(sequences) or not all(len(sequence) for sequence in sequences):
        raise BadValueError("Examples need rows of at least one token each.", "Leave empty ones out.")
    length = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    attention = torch.zeros(len(sequences), length, dtype=torch.bool)
    label = torch.zeros_like(attention)
    for row, (sequence, marks) in enumerate(zip(sequences, trained, strict=True)):
        ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.int64)
        attention[row, : len(sequence)] = True
        label[row, : len(sequence)] = torch.as_tensor(marks, dtype=torch.bool)
    label[:, 0] = False
    return Padded(ids, attention, label)


def from_sequences(sequences: Sequence[Sequence[int]], pad_id: int, prefix: int | Sequence[int]) -> Padded:
    """Lists of ids, of which the first `prefix` (one number, or one a row) are context alone."""
    prefixes = [prefix] * len(sequences) if isinstance(prefix, int) else [int(one) for one in prefix]
    if len(prefixes) != len(sequences):
        raise BadValueError(f"There are {len(prefixes)} prefixes for {len(sequences)} sequences.", "Give one a row.")
    trained = [
        [place >= context for place in range(len(ids))] for ids, context in zip(sequences, prefixes, strict=True)
    ]
    return pad(sequences, trained, pad_id)


def from_batch(batch: Mapping[str, Any]) -> Padded:
    """What a tokeniser or a data collator gives (a `BatchEncoding` or a dict), padded on either side.

    Args:
        batch: `input_ids`; `attention_mask` (all ones when absent), `labels` (all tokens when absent; -100 on those that
            are not trained), `completion_mask` or `assistant_masks`. Lists of unequal length are padded.

    Raises:
        BadTypeError: if it is no mapping with `input_ids`.
        BadValueError: for packed rows, positions of their own, token types, labels that are not the tokens, and entries
            whose meaning would be lost.
    """
    if not isinstance(batch, Mapping) and not hasattr(batch, "keys"):
        raise BadTypeError(f"from_batch takes a mapping with input_ids, not a {type(batch).__name__}.")
    if "input_ids" not in batch.keys():  # noqa: SIM118 - a BatchEncoding is no Mapping
        raise BadTypeError(f"The batch has no input_ids; it has {', '.join(map(str, batch.keys())) or 'nothing'}.")
    unknown = sorted(set(batch.keys()) - READ - HARMLESS)
    if unknown:
        raise BadValueError(
            f"The batch has {', '.join(unknown)}, which no metagradient here reads.",
            "Leave it out if the training would not see it either.",
        )
    given = {key: batch[key] for key in READ if key in batch.keys() and batch[key] is not None}  # noqa: SIM118
    lengths = {len(row) for row in given["input_ids"]}
    if len(lengths) > 1:
        rows = [{key: value[number] for key, value in given.items()} for number in range(len(given["input_ids"]))]
        return from_dataset(rows, 0)
    tensors = {key: _tensor(key, value) for key, value in given.items()}
    ids = tensors["input_ids"]
    for key, value in tensors.items():
        if value.shape != ids.shape or value.ndim != 2:
            raise BadValueError(
                f"{key} has the shape {tuple(value.shape)}, input_ids {tuple(ids.shape)}.", "Give (N, S)."
            )
    attention = (
        tensors["attention_mask"].bool() if "attention_mask" in tensors else torch.ones_like(ids, dtype=torch.bool)
    )
    _refuse_packed(tensors, attention)
    label = attention & _trained(tensors, ids)
    starts = attention & (attention.cumsum(1) == 1)
    return Padded(ids, attention, label & ~starts)


def from_dataset(dataset: Iterable[Any], pad_id: int) -> Padded:
    """A data set, or a list, of rows with `input_ids` (and `labels`, ...; see `from_batch`), or of lists of ids.

    Raises:
        BadTypeError: naming the first row that is neither.
        BadValueError: see `from_batch`.
    """
    sequences: list[list[int]] = []
    trained: list[list[bool]] = []
    rows = dataset if hasattr(dataset, "__iter__") else (dataset[number] for number in range(len(dataset)))  # type: ignore[index, arg-type]
    for number, row in enumerate(rows):
        if hasattr(row, "keys"):
            entry = {key: row[key] for key in row.keys() if key in READ | HARMLESS and row[key] is not None}  # noqa: SIM118
            if "input_ids" not in entry:
                raise BadTypeError(
                    f"Row {number} of the data set has no input_ids; it has {', '.join(map(str, row.keys()))}.",
                    "Tokenise it first, or use Examples.from_messages.",
                )
        elif isinstance(row, Tensor) or (isinstance(row, Sequence) and not isinstance(row, str)):
            entry = {"input_ids": row}
        else:
            raise BadTypeError(
                f"Row {number} of the data set is a {type(row).__name__}, not token ids.",
                "Rows are mappings with input_ids, or lists of token ids.",
            )
        try:
            ids, attention, label = from_batch({key: _tensor(key, value)[None] for key, value in entry.items()})
        except (BadValueError, BadTypeError) as error:
            raise type(error)(f"Row {number} of the data set: {error.cause}", error.remedy) from None
        real = attention[0]
        sequences.append(ids[0][real].tolist())
        trained.append(label[0][real].tolist())
        inside = real.nonzero()[:, 0]
        if len(inside) and int(inside[-1] - inside[0]) + 1 != len(inside):
            raise BadValueError(f"Row {number} of the data set has padding between its tokens.", "Leave it out.")
    return pad(sequences, trained, pad_id)


def from_messages(tokenizer: Any, conversations: Sequence[Any], pad_id: int | None, options: dict[str, Any]) -> Padded:
    """Conversations by the tokeniser's chat template; the assistant's turns are trained.

    Where the template marks them (`{% generation %}`), its marks decide. Else a turn is what the rendering up to and with it
    has beyond the rendering before it with the generation prompt, provided that the one begins with the other.

    Args:
        tokenizer: with a chat template.
        conversations: lists of messages with "role" and "content", or mappings with "messages".
        pad_id: of the padding; the tokeniser's when None.
        options: further arguments of `apply_chat_template`.

    Raises:
        BadTypeError: if a conversation is none.
        BadValueError: if the tokeniser has no template, or its rendering of a turn changes what stands before it.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise BadValueError("The tokeniser has no chat template.", "Set tokenizer.chat_template.")
    padding = pad_id if pad_id is not None else getattr(tokenizer, "pad_token_id", None)
    sequences, trained = [], []
    for number, conversation in enumerate(conversations):
        messages = conversation["messages"] if isinstance(conversation, Mapping) else conversation
        if isinstance(messages, str) or not all(isinstance(one, Mapping) and "role" in one for one in messages):
            raise BadTypeError(f"Conversation {number} is no list of messages with a role and a content.")
        marked = "{% generation" in str(template) or "{%- generation" in str(template)
        ids, marks = (
            _by_marks(tokenizer, messages, options) if marked else _by_turns(tokenizer, messages, options, number)
        )
        sequences.append(ids)
        trained.append(marks)
    return pad(sequences, trained, 0 if padding is None else int(padding))


def _by_marks(tokenizer: Any, messages: Any, options: dict[str, Any]) -> tuple[list[int], list[bool]]:
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, **options}
    made = tokenizer.apply_chat_template(messages, **asked)
    return list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]


def _by_turns(tokenizer: Any, messages: Any, options: dict[str, Any], number: int) -> tuple[list[int], list[bool]]:
    def render(count: int, prompt: bool) -> list[int]:
        asked = {"tokenize": True, "return_dict": True, "add_generation_prompt": prompt, **options}
        return list(tokenizer.apply_chat_template(messages[:count], **asked)["input_ids"])

    whole = render(len(messages), False)
    marks = [False] * len(whole)
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(place, True) if place else [], render(place + 1, False)
        if after[: len(before)] != before or whole[: len(after)] != after:
            raise BadValueError(
                f"In conversation {number}, the template changes what stands before turn {place} once the turn is there.",
                "Mark the assistant's turns in the template ({% generation %}), or tokenise by yourself (from_dataset).",
            )
        marks[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, marks


def _tensor(key: str, value: Any) -> Tensor:
    """An entry as int64."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise BadTypeError(f"{key} is no array of integers: {error}.") from None
    if tensor.is_floating_point():
        raise BadTypeError(f"{key} is {str(tensor.dtype).removeprefix('torch.')}, not integers.")
    return tensor.to(torch.int64)


def _trained(tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Which tokens the batch trains."""
    trained = torch.ones_like(ids, dtype=torch.bool)
    if "labels" in tensors:
        labels = tensors["labels"]
        trained = labels != IGNORED
        wrong = trained & (labels != ids)
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            raise BadValueError(
                f"labels[{row}, {place}] is {int(labels[row, place])}, where the token is {int(ids[row, place])}: labels are "
                "the tokens themselves, or -100.",
                "Do not shift them: the model's loss does.",
            )
    for key in MASKS:
        if key in tensors:
            trained = trained & tensors[key].bool()
    return trained


def _refuse_packed(tensors: dict[str, Tensor], attention: Tensor) -> None:
    if "position_ids" in tensors:
        positions, expected = tensors["position_ids"], attention.cumsum(1) - 1
        wrong = attention & (positions != expected)
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            packed = place and int(positions[row, place]) <= int(positions[row, place - 1])
            raise BadValueError(
                f"position_ids[{row}, {place}] is {int(positions[row, place])}, not {int(expected[row, place])}"
                + (": several examples are packed in one row." if packed else ": positions of their own are not read."),
                "Give each example a row of its own." if packed else "Leave position_ids out.",
            )
    if "token_type_ids" in tensors and bool((tensors["token_type_ids"][attention] != 0).any()):
        raise BadValueError("token_type_ids are not all 0, and are not read.", "Leave them out if they mean nothing.")
