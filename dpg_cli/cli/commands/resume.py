"""`dpg resume RUN`: go on with an unfinished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.errors import UsageError


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of an unfinished run.")],
    metric: Annotated[
        str | None,
        typer.Option(help="The file of a custom metric, again: FILE.py:Name. No run folder is trusted to name it."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Where the target lies now, if it moved: the same model, by its fingerprint.")
    ] = None,
    generator: Annotated[str | None, typer.Option(help="Where the generator lies now, if it moved: likewise.")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also log the steps that are left to tensorboard, wandb or trackio.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Go on with a run that was interrupted or killed, from its newest checkpoint.

    On the CPU the result equals, bit for bit, that of a run that was never interrupted. The last two checkpoints are
    kept; a damaged one is passed over for the one before it. A run may go on with another number of processes than it was
    begun with (docs/scaling.md).

    How often they are written is set when the run begins: once in checkpoint.every_seconds (60), so that writing takes
    a twentieth of the time at most; or, with checkpoint.every_steps above 0, after so many outer steps. Ctrl-C, SIGTERM
    and the end of the training always write one. checkpoints/ may be removed once the run is finished.

    A run keeps a fingerprint of its models, tokenisers and chat templates in run.json, and goes on with no others. Where
    they have moved, --target and --generator say where to; config.toml then names the new place.

    Examples:

        dpg resume runs/qr-embed-001

        dpg resume runs/mine --target /new/disk/llama
    """
    from dpg_cli.cli.session import follow, session
    from dpg_cli.cli.settings import model_place
    from dpg_cli.driver.launch import joined
    from dpg_cli.runs.folder import RunFolder
    from dpg_cli.runs.tracking import check_names

    trackers = check_names(report_to or [])
    try:
        RunFolder.free(run, leftovers=True)
    except UsageError:
        pass
    else:
        raise UsageError(
            f"{run} holds no run: it is empty, missing, or was killed before it wrote its settings.",
            "Nothing is lost; start it with dpg run.",
        )
    folder = RunFolder.open(run)
    config = folder.read_config()
    places = {role: model_place(name) for role, name in (("target", target), ("generator", generator)) if name}
    with joined(config.device) as ranks:
        if ranks.first:
            if places:
                from dpg_cli.driver.fingerprints import relocate

                config = relocate(folder, places, ranks)
            session(config, folder, resume=True, as_json=as_json, named_metric=metric, trackers=trackers, ranks=ranks)
        else:
            follow(ranks, metric)
