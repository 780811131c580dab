"""A tokeniser's chat template: how it writes a conversation, and which tokens end a turn."""

from __future__ import annotations

from typing import Any

import jinja2

DATE = "26 Jul 2024"  # some templates print today's date; a run must not depend on the day it is made


def render(tokenizer: Any, text: str, answer: str | None = None) -> str:
    """One user message through the chat template; the answer's turn is opened, or filled with `answer`."""
    messages = [{"role": "user", "content": text}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer is None, date_string=DATE
    )


def end_tokens(tokenizer: Any, generation_config: Any, size: int) -> tuple[int, ...]:
    """Every token that ends a completion: the tokeniser's end of sequence, those of the generation settings (one or a
    list), and the special token with which the chat template closes the model's turn.

    Args:
        tokenizer: with an end-of-sequence token.
        generation_config: of the model, or None.
        size: of the model's vocabulary; ids outside are left out.
    """
    ends = [tokenizer.eos_token_id]
    more = getattr(generation_config, "eos_token_id", None)
    ends += more if isinstance(more, list) else [] if more is None else [more]
    ends += _end_of_turn(tokenizer)
    return tuple(dict.fromkeys(end for end in ends if 0 <= end < size))


def _end_of_turn(tokenizer: Any) -> list[int]:
    """The special token that directly follows the model's answer in the chat template, if there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    answer = "SOME-ANSWER-7"
    try:
        _, found, tail = render(tokenizer, "x", answer).rpartition(answer)
    except (jinja2.TemplateError, TypeError, ValueError):
        return []
    first = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"][:1] if found else []
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [number for number in first if number in special]
