"""The report of a run: one self-contained page. Run folder -> facts (`gather`) -> page (`page`).

Not here: verdicts (`evidence`), and what a terminal shows (`cli/display.py`).
"""

from __future__ import annotations

from pathlib import Path

from dpg_cli.report.gather import gather
from dpg_cli.report.page import render_page
from dpg_cli.runs.folder import RunFolder, write_text

__all__ = ["write_report"]


def write_report(folder: RunFolder, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not.

    Args:
        folder: the run.
        out: where to; `RUN/report.html` by default.

    Returns:
        The path of the page.

    Raises:
        UsageError: if a file of the run is damaged.
        OSError: if the page cannot be written.
    """
    path = folder.report if out is None else out
    write_text(path, render_page(gather(folder)))
    return path
