"""The zoo: architectures of the family "recurrent"."""

from __future__ import annotations

import pytest

from .cases import cases, check
from .table import Row


@pytest.mark.parametrize("row, tied", cases("recurrent"))
def test_equals_the_stock_run(row: Row, tied: bool) -> None:
    check(row, tied)
