"""What stock fine-tuning makes of rows: TRL's own preparation of a dataset, called as `SFTTrainer` calls it, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def prepared(
    rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int | None = None, keep: str = "start"
) -> list[tuple[list[int], list[bool]]]:
    """Token ids and trained tokens of each row that TRL keeps (it drops those that are left with nothing to train on).

    Args:
        rows: of one shape: text, prompt + completion, or messages.
        tokenizer: with generation marks in its template, if it has one.
        max_length: where rows are cut.
        keep: which end stays.
    """
    trl = pytest.importorskip("trl.trainer.sft_trainer", reason="the extra `trl` is not installed")
    datasets = pytest.importorskip("datasets", reason="the extra `datasets` is not installed")
    datasets.disable_progress_bars()
    talk = "messages" in rows[0] or "conversations" in rows[0]
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss="prompt" in rows[0] and "completion" in rows[0]
    )
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=talk,
        max_length=max_length,
        truncation_mode=f"keep_{keep}",
        shuffle_dataset=False,
        seed=0,
    )
    data = datasets.Dataset.from_list(rows)
    found = trl.SFTTrainer._prepare_dataset(trainer, data, tokenizer, arguments, False, None, "train")
    return [
        (row["input_ids"], [place > 0 and label != -100 for place, label in enumerate(row["labels"])]) for row in found
    ]
