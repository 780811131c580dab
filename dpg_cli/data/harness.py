"""Held-out documents of an lm-eval task (optional extra `lm-eval`): the text of each, as the task puts it together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice
from typing import Any

from dpg_cli.errors import UsageError
from dpg_cli.models.hub import first_line, offline_note, require, unreachable

PREFIX = "lm-eval:"


def task_documents(name: str, limit: int) -> list[str]:
    """The first documents of a task: `doc_to_text` and `doc_to_target` of each, joined as lm-eval joins them.

    Args:
        name: of a task, group or tag that lm-eval knows, such as `lambada_openai_mt_es`.
        limit: how many.

    Raises:
        UsageError: if lm-eval is missing, knows no such task, or cannot get its data.
    """
    tasks = require("lm_eval.tasks", "lm-eval", f"{PREFIX}{name}")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
    try:
        manager = tasks.TaskManager()
        if name not in manager.all_tasks:
            raise UsageError(f"lm-eval knows no task {name!r}.", "`lm_eval ls tasks` lists them.")
        found = manager.load([name])["tasks"] if hasattr(manager, "load") else manager.load_task_or_group(name)
        texts = [text for task in found.values() for text in islice(_texts(task), limit)]
    except UsageError:
        raise
    except Exception as error:  # building a task loads its dataset: anything can be raised
        away = f"its data is not on this machine, and the hub cannot be reached{offline_note()}"
        reason = away if unreachable(error) else first_line(error)
        raise UsageError(
            f"The lm-eval task {name!r} cannot be loaded: {reason}.", "Check it with lm_eval itself."
        ) from None
    if not texts:
        raise UsageError(f"The lm-eval task {name!r} has no documents.", "Name another.")
    return texts[:limit]


def _texts(task: Any) -> Iterable[str]:
    """The documents of one task that are not blank, from its test, else its validation, else its training split."""
    for split in ("test", "validation", "training"):
        if getattr(task, f"has_{split}_docs")():
            documents = getattr(task, f"{split}_docs")()
            yield from (text for text in (document_text(task, document) for document in documents) if text.strip())
            return


def document_text(task: Any, document: Any) -> str:
    """Text and right target of a document; a space between them where neither brings white space."""
    text, target = task.doc_to_text(document), task.doc_to_target(document)
    if isinstance(target, int) and getattr(task, "OUTPUT_TYPE", "") == "multiple_choice":  # the place of the right one
        target = task.doc_to_choice(document)[target]
    elif isinstance(target, list | tuple):  # several are right
        target = target[0] if target else ""
    text, target = str(text), str(target)
    bare = text and target and not text[-1].isspace() and not target[0].isspace()
    return f"{text} {target}" if bare else text + target
