"""What every rank but the first does in a shared run: the same steps as `execute`, without a word or a file.

The order of what ranks do together (the settings, the state, outer steps, final datasets) is the same in both.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dpg_cli.driver.build import build
from dpg_cli.driver.checkpoint import Schedule
from dpg_cli.driver.execute import StopRequest, by_trl, stopped
from dpg_cli.driver.final import final_data
from dpg_cli.driver.prospect import Prospect
from dpg_cli.driver.state import follow_first
from dpg_cli.engine.loop import StepReport, train
from dpg_cli.engine.ranks import Ranks
from dpg_cli.settings.config import Config


def assist(config: Config, folder: str, ranks: Ranks, stop: StopRequest, named_metric: str | None = None) -> None:
    """Share a run that rank 0 begins or goes on with.

    Args:
        config: the settings, from rank 0.
        folder: rank 0's run folder, for messages.
        ranks: this process's place.
        stop: asks for an end after the present outer step.
        named_metric: what the user gave as --metric.

    Raises:
        DpgError: whatever `execute` raises on all ranks alike.
        InterruptedRunError: when some rank was asked to stop.
    """
    torch.manual_seed(config.seed)
    built = build(config, named_metric, ranks)
    config = built.config
    if isinstance(built.prospect, Prospect) and config.policy.step == "natural":
        built.prospect.refuse_absent_rows()

    def log(report: StepReport) -> None:
        if config.trainer == "dpg" and ranks.any(stop.asked):
            raise stopped(report.step + 1, config, Path(folder))

    stop.in_step = True
    try:
        begin = ranks.agreed(None)
        follow_first(built.players)
        if config.trainer == "trl":
            by_trl(config, built, Path(folder), log, stop, Schedule(config.checkpoint), begin["earlier"])
        else:
            train(built.players, built.spec, built.prompts.at, log, begin["first"], begin["earlier"])
    finally:
        stop.in_step = False
    final_data(config, built, None)
