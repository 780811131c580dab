"""`dpg resume RUN`: go on with an unfinished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpg_cli.errors import UsageError


def resume(
    run: Annotated[Path, typer.Argument(help="The folder of an unfinished run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Go on with a run that was interrupted or killed, from its newest checkpoint.

    On the CPU the result equals, bit for bit, that of a run that was never interrupted. The last two checkpoints are
    kept; a damaged one is passed over for the one before it.

    Example: dpg resume runs/qr-embed-001
    """
    from dpg_cli.cli.session import session
    from dpg_cli.runs.folder import RunFolder

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
    session(folder.read_config(), folder, resume=True, as_json=as_json)
