"""The rows of the table as test cases: one direction of the data weights for `make test`, everything for `make zoo`."""

from __future__ import annotations

import os

import pytest

from dpg_cli.errors import UsageError

from .judge import SGD, judge
from .table import FAMILIES, Row
from .tiny import tiny_model

FULL = bool(os.environ.get("ZOO_FULL"))
WORST = 1e-6  # relative error against central differences


def cases(family: str) -> list[object]:
    """A family's rows, tied and untied; without `ZOO_FULL` one of both, in turn."""
    found = []
    for number, row in enumerate(FAMILIES[family]):
        ways = row.tied if FULL or len(row.tied) == 1 else row.tied[number % 2 : number % 2 + 1]
        for tied in ways if not row.refused else ways[:1]:
            name = f"{row.model_type}-{'refused' if row.refused else 'tied' if tied else 'untied'}"
            found.append(pytest.param(row, tied, id=name))
    return found


def check(row: Row, tied: bool) -> None:
    """Our metagradient of a row is that of stock PyTorch's run, or it is refused as the row says."""
    model = tiny_model(row.model_type, tie_word_embeddings=tied, **row.options)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head is not None and head.weight is embedding.weight) == (tied and not row.refused) or row.refused
    if row.refused:
        with pytest.raises(UsageError, match=row.refused):
            judge(model)
        return
    verdict = judge(model, full=FULL)
    assert verdict.size > 1e-6
    assert verdict.error < WORST
    assert verdict.phi < 1e-10
    assert (row.notes in " ".join(verdict.notes)) if row.notes else not verdict.notes
    if FULL:
        assert judge(model, SGD, full=True).error < WORST
