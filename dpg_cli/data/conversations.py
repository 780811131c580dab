"""Conversations through a tokeniser's chat template, and which characters of them are the assistant's.

Stock trainers take the assistant's turns from the template's own marks (`{% generation %}`). Where it has none, renderings
are compared: a turn begins where the conversation before it ends with the assistant's turn opened, and ends where the
conversation up to it ends. A template that writes a turn differently once others follow (reasoning left out) has its end
found by changing the content: what the two renderings have in common after it begins with the end of the turn. What
neither way finds is refused.

Some templates print today's date: here it is always `DATE`, whatever they call for it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2

from dpg_cli.data.shapes import Chat, Fault, Message, sound
from dpg_cli.errors import UsageError
from dpg_cli.models.template import DATE

FAILURES = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError)
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "some-content-7"
OTHER = "\u2404 another content 7 \u2404"  # what no content ends with
RESERVED = {"tokenize", "return_dict", "return_tensors", "chat_template", "add_generation_prompt", "tokenizer_kwargs"} | {
    "continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens", "padding", "truncation", "max_length",
}  # fmt: skip

Span = tuple[int, int]


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences begin with alike."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def dated(template: str) -> str:
    """A chat template in which `strftime_now` gives `DATE`; one that does not call it is left as it is."""
    if "strftime_now" not in template:
        return template
    day, filled = datetime.strptime(DATE, "%d %b %Y"), "format"
    for letter in ("-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdDeFGHIjmMpSuUVwWxXyYzZ"):
        filled += f" | replace('%{letter}', '{day.strftime('%' + letter)}')"
    # trim_blocks takes the line's end away, so that the template still begins at a line's beginning
    return "{%- macro strftime_now(format) -%}{{ " + filled + " }}{%- endmacro %}\n" + template


@dataclass(frozen=True)
class ChatTemplate:
    """A tokeniser's chat template.

    Attributes:
        tokenizer: with a template.
        name: of its model, for messages.
    """

    tokenizer: Any
    name: str

    @cached_property
    def marked(self) -> bool:
        """Whether the template marks the assistant's turns."""
        return bool(MARKS.search(self._template(None)))

    @cached_property
    def dated(self) -> bool:
        """Whether the template asks for the date."""
        return any(name in self._template(None) for name in ("strftime_now", "date_string"))

    @cached_property
    def in_parts(self) -> bool:
        """Whether the template reads contents as lists of parts alone."""
        for content in (PROBE, [{"type": "text", "text": PROBE}]):
            with contextlib.suppress(*FAILURES):
                if PROBE in self._apply([{"role": "user", "content": content}], open_turn=True):
                    return content != PROBE
        return False

    def render(self, messages: list[Message], *, open_turn: bool = False, chat: Chat | None = None) -> str:
        """Messages as text.

        Args:
            messages: role and content each.
            open_turn: open the assistant's turn at the end.
            chat: whose tools and options go to the template.

        Raises:
            Exception: one of `FAILURES`, whatever the template raises.
        """
        return self._apply(self._formed(messages), open_turn=open_turn, chat=chat)

    def written(self, chat: Chat, fault: Fault, *, turns: bool = True) -> tuple[str, list[Span], str]:
        """A conversation as text, the characters of it that are trained on, and what stands before the first of them.

        Args:
            chat: see `Chat`; its `context` says what is trained on.
            fault: makes a refusal.
            turns: look for spans; without, there are none.

        Returns:
            The text; spans in their order; for a prompt with its completion the prompt's own rendering, else empty.
        """
        try:
            whole = self.render(chat.messages, chat=chat)
            if not turns:
                return whole, [], ""
            if chat.context is None:
                return whole, self._turns(chat, whole, fault), ""
            before = self.render(chat.messages[: chat.context], open_turn=True, chat=chat)
        except FAILURES as error:
            raise self._failed(error, fault) from None
        return whole, [(common(before, whole), len(whole))], before

    def marks(self, chat: Chat, fault: Fault) -> tuple[str, list[int], list[bool], list[Span]]:
        """A conversation as text, token ids, mask and offsets, by the template's own marks, as stock training takes them."""
        options = {"tokenizer_kwargs": {"return_offsets_mapping": True}, "return_assistant_tokens_mask": True}
        try:
            text = sound(self.render(chat.messages, chat=chat), "messages", fault)
            read = self.tokenizer.apply_chat_template(
                self._formed(chat.messages), tokenize=True, return_dict=True, **options, **self._arguments(chat)
            )
        except FAILURES as error:
            raise self._failed(error, fault) from None
        return text, list(read["input_ids"]), [bool(bit) for bit in read["assistant_masks"]], read["offset_mapping"]

    def _failed(self, error: Exception, fault: Fault) -> UsageError:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        return fault(f"the chat template of {self.name!r} fails on it: {reason}")

    def _turns(self, chat: Chat, whole: str, fault: Fault) -> list[Span]:
        """The assistant's turns in a rendered conversation, by comparing renderings."""
        spans: list[Span] = []
        for place, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            ahead = chat.messages[:place]  # where there is nothing to open a turn after, it begins with its content
            before = self.render(ahead, open_turn=True, chat=chat) if ahead else self._changed(chat, place)
            upto = self.render(chat.messages[: place + 1], chat=chat)
            start, end = common(before, whole), len(upto) if whole.startswith(upto) else self._end(chat, whole, place)
            own = str(message.get("content") or "").rpartition("</think>")[2].strip()
            if not end > start >= (spans[-1][1] if spans else 0) or own not in whole[start:end]:
                raise fault(
                    f"the chat template of {self.name!r} neither marks the assistant's turns nor writes them the same "
                    "whatever follows them; give the columns of text, or a template with {% generation %} marks"
                )
            spans.append((start, end))
        return spans

    def _end(self, chat: Chat, whole: str, place: int) -> int:
        """Where a turn ends: after the special token that follows its content; 0 if none does."""
        same = common(whole[::-1], self._changed(chat, place)[::-1])
        tail = whole[len(whole) - same :]
        specials = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        end = max((len(token) for token in specials if tail.startswith(token)), default=0)
        return len(whole) - same + end + tail[end:].startswith("\n") if end else 0

    def _changed(self, chat: Chat, place: int) -> str:
        """The conversation with another content of one message, rendered."""
        messages = [*chat.messages]
        messages[place] = {**messages[place], "content": OTHER}
        return self.render(messages, chat=chat)

    def _formed(self, messages: list[Message]) -> list[Message]:
        """Messages with their contents in the form that the template reads."""
        if not self.in_parts:
            return messages
        return [{**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in messages]

    def _template(self, tools: list[Any] | None) -> str:
        return dated(self.tokenizer.get_chat_template(None, tools))

    def _arguments(self, chat: Chat | None) -> dict[str, Any]:
        """What `apply_chat_template` gets besides messages."""
        tools, options = (None, {}) if chat is None else (chat.tools, chat.options)
        if taken := sorted(RESERVED & options.keys()):
            raise ValueError(f"chat_template_kwargs may not set {taken[0]}")
        return {"chat_template": self._template(tools), "tools": tools, "date_string": DATE, **options}

    def _apply(self, messages: list[Message], *, open_turn: bool, chat: Chat | None = None) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn, **self._arguments(chat)
        )


def chat_template(tokenizer: Any, name: str) -> ChatTemplate | None:
    """The chat template of a tokeniser, if it has one."""
    return ChatTemplate(tokenizer, name) if getattr(tokenizer, "chat_template", None) else None
