"""Raw results of speed, as the sections of docs/performance.md read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def raw(name: str) -> dict[str, Any]:
    """One raw result, or nothing."""
    path = RESULTS / f"speed-{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def cell(row: dict[str, Any], key: str, form: str, factor: float = 1.0) -> str:
    """A figure, or a dash."""
    return form.format(row[key] * factor) if row.get(key) is not None else "-"
