"""The table itself, the docs' word of it, and the command for a model that it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .__main__ import main
from .table import FAMILIES

ROWS = [row for rows in FAMILIES.values() for row in rows]


def test_the_table_is_what_the_docs_say() -> None:
    exact = [row for row in ROWS if not row.refused]
    assert len({row.model_type for row in exact}) == len(exact) >= 45
    assert all(row.special and row.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for row in ROWS)
    text = (Path(__file__).parents[2] / "docs" / "library.md").read_text(encoding="utf-8")
    said = re.search(r"(\d+) architectures of .*?, (\d+) of them both .*? and (\d+) are refused", text, re.DOTALL)
    assert said is not None
    both = sum(len(row.tied) == 2 for row in exact)
    assert tuple(map(int, said.groups())) == (len(exact), both, len(ROWS) - len(exact))


def test_the_command_judges_a_model_and_prints_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["iquestcoder"]) == 0  # which the table lacks
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert all(float(re.search(r"error ([0-9.e-]+)", line)[1]) < 1e-6 for line in said[:2])  # type: ignore[index]
    assert said[2] == '    Row("iquestcoder", "what is special about it"),'
    assert main(["diffllama"]) == 1
    assert "Set what it needs" in capsys.readouterr().out
    assert main(["xlnet"]) == 0
    assert capsys.readouterr().out.startswith("Refused: The target (XLNetLMHeadModel) is no causal")
