"""The command line: parse, call, print. The only room that imports typer or rich; nothing imports it.

Not here: anything that a library user would want; each command is a module of `commands`.
"""

from __future__ import annotations

import io
import os
import sys
import traceback

from dpg_cli.cli.app import app
from dpg_cli.driver import launch
from dpg_cli.errors import DpgError, one_line


def main() -> None:
    """Entry point of `dpg`: runs the command and maps what it raises to one line on stderr and an exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads sleep instead of spinning: other work goes on
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as "?", and ends nothing
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="replace")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(args=arguments, prog_name="dpg")
    except DpgError as error:
        if debug:
            traceback.print_exc()
        if launch.speaks():
            sys.stderr.write(f"dpg: {one_line(str(error))}\n")
        launch.leave(error.exit_code)
    except Exception:  # a defect of ours: with several processes, one traceback is enough
        if not launch.shared():
            raise
        if launch.speaks():
            traceback.print_exc()
        launch.leave(1)
