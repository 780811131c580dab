"""How a generator is asked: a prompt of the pool becomes the token ids that the generator reads.

    text of the pool -> cut to `max_tokens` -> put into the instruction -> wrapped by the chat template -> token ids

Training, the exported data and every evaluation go through the one `PromptFormat`; datasets keep the text of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dpg_cli.data.conversations import FAILURES, ChatTemplate
from dpg_cli.errors import UsageError

PLACE = "{text}"  # where an instruction takes the prompt


@dataclass(frozen=True)
class PromptFormat:
    """The way from a prompt to token ids.

    Attributes:
        tokenizer: the generator's.
        chat: wrap by the tokeniser's chat template, the generator's turn opened at the end.
        instruction: text with `{text}` where the prompt goes; empty for the prompt alone.
        max_tokens: prompts are cut after so many tokens, before they are wrapped; 0 never cuts.
    """

    tokenizer: Any
    chat: bool = False
    instruction: str = ""
    max_tokens: int = 0

    @property
    def dated(self) -> bool:
        """Whether the chat template asks for today's date, and is given a fixed one."""
        return self.chat and ChatTemplate(self.tokenizer, "").dated

    def write(self, prompts: list[str]) -> list[str]:
        """What the generator reads, as text."""
        texts = self._cut(prompts) if self.max_tokens else prompts
        if self.instruction:
            texts = [self.instruction.replace(PLACE, text) for text in texts]
        if not self.chat:
            return texts
        template = ChatTemplate(self.tokenizer, "the generator")
        return [template.render([{"role": "user", "content": text}], open_turn=True) for text in texts]

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt.

        A chat template writes its own special tokens. Elsewhere a beginning-of-sequence token opens each prompt where
        the tokeniser has one, whether it adds it by itself or not.
        """
        if not prompts:
            return []
        texts = self.write(prompts)
        if self.chat:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows, bos = self.tokenizer(texts)["input_ids"], self.tokenizer.bos_token_id
        return rows if bos is None else [row if row[:1] == [bos] else [bos, *row] for row in rows]

    def _cut(self, prompts: list[str]) -> list[str]:
        """Prompts cut to whole tokens."""
        # A token is seldom longer than 16 characters: what lies far behind the cut need not be read at all.
        heads = [prompt[: 16 * self.max_tokens] for prompt in prompts]
        if not self.tokenizer.is_fast:  # no offsets
            rows = self.tokenizer(heads, add_special_tokens=False)["input_ids"]
            return [self.tokenizer.decode(row[: self.max_tokens]) for row in rows]
        encoded = self.tokenizer(heads, add_special_tokens=False, return_offsets_mapping=True)
        return [
            head[: offsets[self.max_tokens - 1][1]] if len(offsets) > self.max_tokens else head
            for head, offsets in zip(heads, encoded["offset_mapping"], strict=True)
        ]


def prompt_format(tokenizer: Any, name: str, chat: str, instruction: str, max_tokens: int) -> PromptFormat:
    """The format that settings ask for.

    Args:
        tokenizer: the generator's.
        name: the generator's, for messages.
        chat: "auto" wraps where the tokeniser has a chat template, "always", "never".
        instruction, max_tokens: see `PromptFormat`.

    Raises:
        UsageError: if "always" finds no template, or the template fails.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if chat == "always" and not has:
        raise UsageError(
            f"The tokeniser of {name!r} has no chat template.", "Take an instruct model, or --set prompts.chat=auto."
        )
    wrap = chat == "always" or (chat == "auto" and has)
    if wrap:
        try:
            ChatTemplate(tokenizer, name).render([{"role": "user", "content": "x"}], open_turn=True)
        except FAILURES as error:
            raise UsageError(
                f"The chat template of {name!r} fails on a single user message: {str(error)[:200]}.",
                "--set prompts.chat=never leaves it out.",
            ) from None
    return PromptFormat(tokenizer, wrap, instruction, max_tokens)
