"""What a row means: the accepted shapes, in the order in which they are looked for, and what each one trains on.

The meaning is TRL's: the loss is on the completion given the prompt; of a conversation, on the assistant's turns; of a
text, on all of it. docs/data.md shows each shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dpg_cli.data.formats.base import Row, Rows, columns_shown
from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted

PROMPTS = ("prompt",)
QUESTIONS = ("instruction", "question")  # put to the target through its chat template, or with a blank line after it
INPUTS = ("input",)
ANSWERS = ("completion", "response", "output", "answer")
TALKS = ("messages", "conversations")
EXTRAS = ("tools", "chat_template_kwargs")  # of conversations, for their template
TEXTS = ("text", "completion", "response")
ACCEPTED = (
    "text; prompt + completion (texts, or lists of messages); messages or conversations; instruction (+ input) + output"
)
ROLES = {  # of ShareGPT's `from`, and what chat templates call them
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

Message = dict[str, Any]
Fault = Callable[..., UsageError]


@dataclass(frozen=True)
class Text:
    """A text, all of which is trained on."""

    text: str


@dataclass(frozen=True)
class Pair:
    """A completion that is trained on, and what stands before it; nothing is put between the two."""

    context: str
    completion: str


@dataclass(frozen=True)
class Asked:
    """A question and its answer, of which the answer is trained on; they take the form that the target's tokeniser has."""

    question: str
    answer: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        messages: role and content each, contents texts.
        context: messages that are context, all after them being trained on; None trains on the assistant's turns.
        tools: for the template.
        options: further arguments of the template.
    """

    messages: list[Message]
    context: int | None = None
    tools: list[Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


Item = Text | Pair | Asked | Chat


@dataclass(frozen=True)
class Shape:
    """How the rows of one source are read.

    Attributes:
        name: in words.
        trained, context: the columns; empty where there is no context.
        read: an item from a row; the second argument makes a refusal of it.
    """

    name: str
    trained: tuple[str, ...]
    context: tuple[str, ...]
    read: Callable[[Row, Fault], Item]


def shape_of(rows: Rows, column: str = "", *, beside: bool = False) -> Shape:
    """The shape of a source, from its columns; from now on only the columns that it needs are read.

    Args:
        rows: of the source.
        column: what the user named; that alone is read then.
        beside: the contexts are another source: only what is trained on is looked for.

    Raises:
        UsageError: naming the columns that there are and the shapes that are accepted.
    """
    require_column(rows, column)
    there = set(rows.columns)
    talk = column if column else _first(TALKS, there)
    prompt, question, answer = _first(PROMPTS, there), _first(QUESTIONS, there), _first(ANSWERS, there)
    if column or (beside and (found := _first((*ANSWERS, *TEXTS, *TALKS), there))):
        name = column or found
        shape = Shape("the column named" if column else "what follows a prompt", (name,), (), _single(name))
    elif prompt and answer:
        shape = Shape("prompt + completion", (answer,), (prompt,), _pair(prompt, answer))
    elif talk:
        shape = Shape("conversation", (talk,), (), _single(talk))
    elif question and answer:
        more = [name for name in INPUTS if name in there]
        shape = Shape("instruction + output", (answer,), (question, *more), _asked(question, more, answer))
    elif text := _first(TEXTS, there):
        shape = Shape("text", (text,), (), _single(text))
    else:
        raise _unknown(rows)
    rows.only([*shape.trained, *shape.context, *EXTRAS])
    return shape


def context_reader(rows: Rows, column: str = "") -> tuple[str, Callable[[Row, Fault], str | list[Message]]]:
    """The column of what stands before each completion, of a source of its own, and how it is read.

    Raises:
        UsageError: naming the columns that there are.
    """
    require_column(rows, column)
    name = column or _first((*PROMPTS, *QUESTIONS, "text"), set(rows.columns))
    if not name:
        raise UsageError(
            f"{rows.name} has the columns {columns_shown(rows.columns)}: none that holds prompts.",
            f"Name it: --prompts {pasted(rows.name)}:COLUMN",
        )
    rows.only([name])

    def read(row: Row, fault: Fault) -> str | list[Message]:
        value = _value(row, name, fault)
        return value if isinstance(value, str) else messages_of(value, name, fault)

    return name, read


def prompt_reader(rows: Rows, column: str = "") -> tuple[str, Callable[[Row, Fault], str]]:
    """The column of a pool of prompts, and how a row is read as a prompt: what comes before the completion.

    Raises:
        UsageError: naming the columns that there are.
    """
    require_column(rows, column)
    there = set(rows.columns)
    name = column or _first((*PROMPTS, *TALKS, *QUESTIONS, "text"), there)
    if not name:
        raise _unknown(rows)
    more = [other for other in INPUTS if name in QUESTIONS and not column and other in there]
    rows.only([name, *more])

    def read(row: Row, fault: Fault) -> str:
        value = _value(row, name, fault)
        if isinstance(value, str):
            return _joined([value, *(_text(row, other, fault, missing="") for other in more)])
        return _question(messages_of(value, name, fault), name in TALKS, fault)

    return " + ".join([name, *more]), read


def items(rows: Rows, shape: Shape, stop: int | None = None) -> Iterator[tuple[int, Item]]:
    """(number, item) of each row.

    Raises:
        UsageError: naming the first row that is not of the shape.
    """
    for place, row in rows.walk(stop):
        yield place, shape.read(row, fault_of(rows, place))


def combined(item: Item, context: str | list[Message], fault: Fault) -> Item:
    """An item with the context that another source has for it."""
    if isinstance(item, Text) and isinstance(context, str):
        return Pair(context, item.text)
    if isinstance(item, Chat) and isinstance(context, list):
        return Chat([*context, *item.messages], len(context), item.tools, item.options)
    raise fault("the prompt and what follows it are not both texts, nor both lists of messages")


def answered(row: Row, answer: Any, fault: Fault) -> Item:
    """A row's prompt or question with an answer that stands elsewhere in it, such as one of several choices.

    Args:
        row: has a `prompt`, `question` or `instruction`.
        answer: a text, or a list of messages where the prompt is one.
        fault: makes a refusal.
    """
    name = next((name for name in (*PROMPTS, *QUESTIONS) if row.get(name) is not None), "")
    if not name:
        raise fault("there is no `prompt` and no `question`")
    read = _asked(name, [], "answer") if name in QUESTIONS else _pair(name, "answer")
    return read({**row, "answer": answer}, fault)


def is_empty(item: Item) -> bool:
    """Whether there is nothing in a row at all."""
    if isinstance(item, Chat):
        return not any(message.get("content") or message.get("tool_calls") for message in item.messages)
    return not any(vars(item).values())


def trained_text(item: Item) -> str:
    """What a row trains on, as text without a template."""
    if isinstance(item, Text):
        return item.text
    if isinstance(item, Pair):
        return item.completion
    if isinstance(item, Asked):
        return item.answer
    own = item.messages[item.context :] if item.context is not None else item.messages
    return "\n".join(m.get("content") or "" for m in own if item.context is not None or m["role"] == "assistant")


def messages_of(value: Any, name: str, fault: Fault) -> list[Message]:
    """A list of messages with `role` and `content`, whatever form of them a row has.

    Args:
        value: a list of messages, with `role` and `content` or ShareGPT's `from` and `value`; contents may be lists of
            text parts.
        name: of the column.
        fault: makes a refusal.
    """
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]  # of `datasets`
    if not isinstance(value, list):
        raise fault(f"`{name}` is {_kind(value)} where a text or a list of messages is needed; accepted: {ACCEPTED}")
    return [_message(message, name, fault) for message in value]


def sound(text: str, name: str, fault: Fault) -> str:
    """The text, if it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise fault(f"`{name}` holds half a character ({half}, a lone surrogate), which no tokeniser reads") from None
    return text


def require_column(rows: Rows, column: str) -> None:
    """Refuse a column that is not there.

    Raises:
        UsageError: naming the columns that there are.
    """
    if column and column not in rows.columns:
        raise UsageError(
            f"{rows.name} has no column {column!r}; it has {columns_shown(rows.columns)}.",
            f"Name one: {pasted(rows.name)}:COLUMN",
        )


def fault_of(rows: Rows, place: int) -> Fault:
    """What makes refusals of a row: called with what is wrong and, perhaps, a remedy."""
    return partial(rows.fault, place)


def _unknown(rows: Rows) -> UsageError:
    return UsageError(
        f"{rows.name} has the columns {columns_shown(rows.columns)}, which are no shape of examples.",
        f"Accepted: {ACCEPTED}; or name a column: {pasted(rows.name)}:COLUMN",
    )


def _first(names: Sequence[str], there: set[str]) -> str:
    return next((name for name in names if name in there), "")


def _kind(value: Any) -> str:
    kinds: dict[type, str] = {type(None): "nothing", str: "a text", dict: "an object", list: "a list", bytes: "bytes"}
    kinds |= {int: "a number", float: "a number", bool: "a boolean"}
    return kinds.get(type(value)) or f"a {type(value).__name__}"


def _value(row: Row, name: str, fault: Fault) -> Any:
    """What a row has in a column: a sound text, or something else that is there."""
    value = row.get(name)
    if value is None:
        raise fault(f"there is no `{name}`")
    return sound(value, name, fault) if isinstance(value, str) else value


def _text(row: Row, name: str, fault: Fault, missing: str | None = None) -> str:
    """A text of a row."""
    if missing is not None and row.get(name) is None:
        return missing
    value = _value(row, name, fault)
    if not isinstance(value, str):
        raise fault(f"`{name}` is {_kind(value)} where a text is needed; accepted: {ACCEPTED}")
    return value


def _joined(texts: list[str]) -> str:
    return "\n\n".join(text for number, text in enumerate(texts) if text or not number)


def _single(name: str) -> Callable[[Row, Fault], Item]:
    """A text, or a conversation whose assistant's turns are trained on."""

    def read(row: Row, fault: Fault) -> Item:
        value = _value(row, name, fault)
        if isinstance(value, str):
            return Text(value)
        return Chat(messages_of(value, name, fault), None, *_extras(row, fault))

    return read


def _pair(prompt: str, answer: str) -> Callable[[Row, Fault], Item]:
    """A prompt and a completion, both texts or both lists of messages."""

    def read(row: Row, fault: Fault) -> Item:
        before, after = _value(row, prompt, fault), _value(row, answer, fault)
        if isinstance(before, str) and isinstance(after, str):
            return Pair(before, after)
        if isinstance(before, str) or isinstance(after, str):
            raise fault(f"of `{prompt}` and `{answer}` one is a text and the other is not; accepted: {ACCEPTED}")
        context, own = messages_of(before, prompt, fault), messages_of(after, answer, fault)
        return Chat([*context, *own], len(context), *_extras(row, fault))

    return read


def _asked(question: str, more: list[str], answer: str) -> Callable[[Row, Fault], Item]:
    """An instruction, perhaps with an input, and an output."""

    def read(row: Row, fault: Fault) -> Item:
        extra = [_text(row, name, fault, missing="") for name in more]
        return Asked(_joined([_text(row, question, fault), *extra]), _text(row, answer, fault))

    return read


def _extras(row: Row, fault: Fault) -> tuple[list[Any] | None, dict[str, Any]]:
    """`tools` (a list, or JSON of one) and `chat_template_kwargs` of a row, which go to the template as TRL gives them."""
    tools, options = (row.get(name) for name in EXTRAS)
    options = {} if options is None else options
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise fault("`tools` is no JSON") from None
    if not isinstance(tools, list | None) or not isinstance(options, dict):
        raise fault("`tools` is no list, or `chat_template_kwargs` no object")
    return tools or None, {key: value for key, value in options.items() if value is not None}


def _message(message: Any, name: str, fault: Fault) -> Message:
    """One message with role and content."""
    if not isinstance(message, dict):
        raise fault(f"`{name}` holds {_kind(message)} where a message with role and content is needed")
    known = {key: value for key, value in message.items() if value is not None}
    if "role" not in known and "from" in known:
        known["role"] = ROLES.get(known["from"], known["from"]) if isinstance(known["from"], str) else None
        known["content"] = known.pop("value", None)
        del known["from"]
    role, content = known.get("role"), known.get("content")
    if isinstance(content, list):
        content = known["content"] = "".join(_part(part, name, fault) for part in content)
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and known.get("tool_calls"))):
        raise fault(f"`{name}` holds a message without a role, or without a text as its content")
    if content is None:
        known.pop("content", None)
    else:
        sound(content, name, fault)
    return known


def _part(part: Any, name: str, fault: Fault) -> str:
    """The text of a part of a content."""
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type") in (None, "text") else None
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        raise fault(f"`{name}` holds a content part ({kind!s}) that is no text; a text model reads text alone")
    return text


def _question(messages: list[Message], answered: bool, fault: Fault) -> str:
    """The one user's message that messages are, or that the answer of a conversation follows."""
    answers = [place for place, message in enumerate(messages) if answered and message["role"] == "assistant"]
    before = messages[: answers[-1]] if answers else messages
    if len(before) != 1 or before[0]["role"] != "user" or "content" not in before[0]:
        raise fault("as a prompt, a conversation must have one message of the user before its answer")
    return before[0]["content"]
