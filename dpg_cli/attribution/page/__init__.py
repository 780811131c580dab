"""The page of an attribution: scores file -> facts (`gather`) -> page (`render`).

Not here: how scores are made and written (`attribution` itself), and the page of a run (`report`).
"""

from __future__ import annotations

from pathlib import Path

from dpg_cli.attribution.page.gather import gather
from dpg_cli.attribution.page.render import render
from dpg_cli.runs.files import write_text

__all__ = ["write_page"]


def write_page(scores: Path, out: Path | None = None) -> Path:
    """Write the page of a scores file.

    Args:
        scores: what `dpg attribute` wrote.
        out: where to; beside the scores by default, with the ending .html.

    Returns:
        The path of the page.

    Raises:
        UsageError: if the scores cannot be read.
        OSError: if the page cannot be written.
    """
    path = scores.with_suffix(".html") if out is None else out
    write_text(path, render(gather(scores), path))
    return path
