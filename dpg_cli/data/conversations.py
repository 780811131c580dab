"""Chat data for `dpg attribute`: rows with `messages` (role and content), as SFT trainers take them.

The last message must be the assistant's: it is trained on, with what the template writes after it; all before it is context.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from dpg_cli.data.sources import JSON_LINES, PARQUET, parse
from dpg_cli.errors import UsageError
from dpg_cli.models.loading import LanguageModel
from dpg_cli.models.template import DATE

COLUMN = "messages"


def read_conversations(data: str, others: tuple[str, ...], limit: int) -> list[Any] | None:
    """The conversations of a JSONL or parquet file; None if DATA is not such a file or is to be read as plain text.

    Args:
        data: DATA; the column `messages` is taken where it is named, or none is and there is no plainer one.
        others: columns of plain text that come first.
        limit: only the first so many rows; 0 takes all.
    """
    source = parse(data)
    path = Path(source.path).expanduser()
    if source.column not in ("", COLUMN) or not path.is_file() or path.suffix not in (*JSON_LINES, *PARQUET):
        return None
    try:
        if path.suffix in PARQUET:
            names = pq.read_schema(path).names
            if COLUMN not in names or (not source.column and any(key in names for key in others)):
                return None
            found = pq.read_table(path, columns=[COLUMN])[COLUMN]
            return (found.slice(0, limit) if limit else found).to_pylist()
        with path.open(encoding="utf-8-sig") as file:
            lines = (line for line in file if line.strip())
            rows = [json.loads(line) for line in islice(lines, limit or None)]
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        return None  # the reader of plain texts says what is wrong
    if not rows or not all(isinstance(row, dict) and COLUMN in row for row in rows):
        return None
    return None if not source.column and any(key in rows[0] for key in others) else [row[COLUMN] for row in rows]


def write_conversations(conversations: list[Any], target: LanguageModel) -> tuple[list[str], list[str]]:
    """What the target reads of each conversation: the answers, and what stands before each.

    Raises:
        UsageError: if the target has no chat template, or a conversation does not end with an answer.
    """
    if not getattr(target.tokenizer, "chat_template", None):
        raise UsageError(
            f"The examples are conversations, and the tokeniser of {target.name!r} has no chat template.",
            "Take an instruct model, or give the columns of text: DATA:COLUMN and --prompts DATA:COLUMN.",
        )
    texts, contexts = [], []
    for number, messages in enumerate(conversations, 1):
        if not _is_conversation(messages):
            raise UsageError(
                f"Conversation {number} is no list of messages with role and content that ends with the assistant's.",
                "Correct or leave out that row.",
            )
        try:
            before, whole = (
                target.tokenizer.apply_chat_template(
                    part, tokenize=False, add_generation_prompt=len(part) < len(messages), date_string=DATE
                )
                for part in (messages[:-1], messages)
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = str(error)[:200]
            raise UsageError(f"The chat template fails on conversation {number}: {reason}.", "Correct it.") from None
        if not whole.startswith(before):
            raise UsageError(
                f"The chat template writes the beginning of conversation {number} differently with its answer.",
                "Give the columns of text instead: DATA:COLUMN and --prompts DATA:COLUMN.",
            )
        texts.append(whole[len(before) :])
        contexts.append(before)
    return texts, contexts


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages)
        and messages[-1]["role"] == "assistant"
    )
