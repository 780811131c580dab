"""Commands that messages print: each can be pasted as it stands, whatever a run's folder is called."""

from __future__ import annotations

from pathlib import Path

from dpg_cli.escape import pasted
from dpg_cli.settings.config import Config, CustomOptions


def command(verb: str, run: Path | str, config: Config | None = None) -> str:
    """`dpg VERB RUN`, with the file of the run's own metric, which no folder is trusted to name.

    Args:
        verb: resume or verify; others take no metric.
        run: the folder.
        config: its settings, where they are at hand.
    """
    text = f"dpg {verb} {pasted(run)}"
    if config is not None and isinstance(config.metric, CustomOptions):
        file, _, _ = config.metric.path.rpartition(":")
        if file.endswith(".py"):
            return f"{text} --metric {pasted(config.metric.path)}"
    return text
