"""docs/data.md: every example is read as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenisers import reader, tokeniser

from dpg_cli.data.examples import RowEncoder
from dpg_cli.data.formats import FORMATS
from dpg_cli.data.prepared import gather, prepare

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```(jsonl|txt)\n(.*?)```\n\ntrained: ([^;\n]*)(?:; context: ([^\n]*))?", PAGE, re.S)


def test_the_page_has_an_example_of_every_shape() -> None:
    assert len(EXAMPLES) == len(re.findall(r"```(?:jsonl|txt)\n", PAGE)) == 8
    named = {suffix for known in FORMATS for suffix in known.suffixes}
    assert {suffix for suffix in named - {".tab", ".pq"} if f"`{suffix}`" not in PAGE} == set()


@pytest.mark.parametrize("place", range(len(EXAMPLES)))
def test_an_example_is_read_as_the_page_says(place: int, tmp_path: Path) -> None:
    ending, text, trained, context = EXAMPLES[place]
    path = tmp_path / f"a.{ending}"
    path.write_text(text)
    found = prepare(gather(str(path)), RowEncoder(reader(tokeniser("bytes, a beginning"))))
    understood = found.understood
    assert (understood.rows, understood.trained, understood.context) == (2, trained, context)
    assert understood.left_out == ()
    assert understood.straddling == 0
    assert 0 < understood.trained_tokens < understood.tokens
