"""`dpg presets list|show|copy|validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpg_cli.errors import UsageError

app = typer.Typer(help="List, show, copy and validate presets.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="Name of a preset, such as qr-embed.tiny.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List all presets.

    Example: dpg presets list
    """
    from dpg_cli.settings.presets import all_presets

    presets = all_presets()
    if as_json:
        rows = [
            {"name": preset.name, "task": preset.task, "scale": preset.scale, "about": preset.about}
            for preset in presets
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("preset", "what it does", box=None, pad_edge=False)
    for preset in presets:
        table.add_row(preset.name, preset.about)
    Console().print(table)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Show a preset with every default filled in.

    Example: dpg presets show qr-embed.tiny
    """
    from dpg_cli.settings.config import to_toml, validate
    from dpg_cli.settings.presets import find

    config = validate(find(name).data())
    typer.echo(json.dumps(config.model_dump(mode="json"), indent=2) if as_json else to_toml(config).rstrip())


@app.command()
def copy(name: Name, path: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Copy a preset's file, comments included, to edit it; run it with `dpg run --config FILE`.

    Example: dpg presets copy qr-embed.tiny mine.toml
    """
    from dpg_cli.settings.presets import find

    preset = find(name)
    if path.exists():
        raise UsageError(f"{path} exists already.", "Give another name.")
    try:
        path.write_text(preset.path.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Give another path.") from None
    typer.echo(f"{path}")


@app.command()
def validate(
    paths: Annotated[list[Path] | None, typer.Argument(help="Settings files; all presets when none is named.")] = None,
) -> None:
    """Check settings files without running them; all faults are reported.

    Example: dpg presets validate mine.toml
    """
    from dpg_cli.errors import ConfigError
    from dpg_cli.settings.config import load_toml
    from dpg_cli.settings.config import validate as check
    from dpg_cli.settings.presets import all_presets

    chosen = paths or [preset.path for preset in all_presets()]
    faults = []
    for path in chosen:
        try:
            check(load_toml(path))
        except ConfigError as error:
            faults += [f"{path.name}: {fault}" for fault in error.faults]
    if faults:
        raise ConfigError(faults)
    typer.echo(f"{len(chosen)} valid")
