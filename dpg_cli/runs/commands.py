"""Commands that messages print: each can be pasted as it stands, whatever a run's folder is called."""

from __future__ import annotations

from pathlib import Path

from dpg_cli.escape import pasted
from dpg_cli.settings.config import Config


def command(verb: str, run: Path | str, config: Config | None = None, *, metric: str = "") -> str:
    """`dpg VERB RUN`, with the file of the run's own metric, which no folder is trusted to name.

    Args:
        verb: resume or verify; others take no metric.
        run: the folder.
        config: its settings, where they are at hand.
        metric: the file of its metric and the name in it, where they are not.
    """
    named = metric or ("" if config is None else config.metric_file)
    return f"dpg {verb} {pasted(run)}" + (f" --metric {pasted(named)}" if named else "")
