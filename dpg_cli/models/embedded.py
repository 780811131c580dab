"""The names of the embedded models. Free of torch."""

from __future__ import annotations

from pathlib import Path

from dpg_cli import prose, tiny

EMBEDDED: dict[str, Path] = {"tiny": tiny.MODEL_DIR, "prose": prose.MODEL_DIR, "prose-reader": prose.READER_DIR}
"""Name -> folder."""
