"""`dpg run`: settings from preset, file and flags; the run; its live display; the summary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpg_cli.errors import InterruptedRunError, UsageError

if TYPE_CHECKING:
    from dpg_cli.config import Config

_PATTERN = "Pattern tasks"


def run(
    task: Annotated[
        str | None,
        typer.Argument(help="qr-embed, pattern-67, l2-shrink or language-rephrase; or leave it out and give --config."),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Picture of a QR code, or a black-and-white bitmap.", rich_help_panel=_PATTERN),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Make a QR code of this text.", rich_help_panel=_PATTERN)] = None,
    qr_version: Annotated[
        int | None, typer.Option(help="QR version 1-40; 0 takes the smallest that fits.", rich_help_panel=_PATTERN)
    ] = None,
    error_correction: Annotated[
        str | None, typer.Option(help="QR error correction: L, M, Q or H.", rich_help_panel=_PATTERN)
    ] = None,
    patch_origin: Annotated[
        str | None,
        typer.Option(help="ROW,COLUMN of the patch's upper-left corner in the LM head.", rich_help_panel=_PATTERN),
    ] = None,
    language: Annotated[str | None, typer.Option(help="es, de, fr or it.", rich_help_panel="language-rephrase")] = None,
    scale: Annotated[str, typer.Option(help="Preset scale.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML), put on top of the preset.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example steps=12 or inner.lr=1e-4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and training.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also log to tensorboard, wandb or trackio; may be given more than once.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings, sizes and cost; run nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Train a generator by Dataset Policy Gradient and leave generator, dataset, target and picture in a run folder.

    Examples:

        dpg run qr-embed --text "HELLO WORLD"

        dpg run qr-embed --image code.png --out runs/mine --seed 1

        dpg run --config runs/mine/config.toml --out runs/again
    """
    metric = {
        "image": None if image is None else str(image.resolve()),
        "text": text,
        "version": qr_version,
        "error_correction": error_correction,
        "language": language,
        "origin": None if patch_origin is None else _origin(patch_origin),
    }
    flags: dict[str, Any] = {
        "seed": seed,
        "device": device,
        "metric": {k: v for k, v in metric.items() if v is not None},
    }
    from dpg_cli.runs.tracking import check_names

    trackers = check_names(report_to or [])
    settings = _settings(task, scale, config, {k: v for k, v in flags.items() if v not in (None, {})}, overrides or [])
    if dry_run:
        _dry_run(settings, as_json)
    else:
        _run(settings, out, as_json, trackers)


def _origin(text: str) -> list[int]:
    """`ROW,COLUMN` as two numbers."""
    parts = text.replace(" ", "").split(",")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise UsageError(f"--patch-origin {text!r} is not ROW,COLUMN.", "For example: --patch-origin 100,0.")
    return [int(part) for part in parts]


def _settings(task: str | None, scale: str, file: Path | None, flags: dict[str, Any], overrides: list[str]) -> Config:
    """Resolve the settings of preset, file, flags and overrides."""
    from dpg_cli.config import load_toml
    from dpg_cli.presets import find, merge, resolve
    from dpg_cli.runs.folder import resolve_paths

    data: dict[str, Any] = {}
    if task is None and file is None:
        raise UsageError("Nothing to run: neither a task nor --config is given.", "For example: dpg run qr-embed.")
    if task is not None:
        data = find(f"{task}.{scale}").data()
    if file is not None:
        loaded = resolve_paths(load_toml(file), file.resolve().parent)
        if task is not None and loaded.get("task", task) != task:
            raise UsageError(f"{file} is for the task {loaded['task']!r}, not {task!r}.", "Leave the task out.")
        data = merge(data, loaded)
    return resolve(data, overrides, flags)


def _dry_run(config: Config, as_json: bool) -> None:
    """Print settings, sizes, and the predicted cost."""
    from dpg_cli.config import to_toml
    from dpg_cli.runs.cost import estimate

    cost = estimate(config)
    if as_json:
        typer.echo(json.dumps({"config": config.model_dump(mode="json"), "cost": cost.as_dict()}, indent=2))
        return
    typer.echo(to_toml(config))
    typer.echo(cost.as_text())


def _run(config: Config, out: Path | None, as_json: bool, report_to: list[str]) -> None:
    """Run, with a display on stderr and the outcome on stdout."""
    from dpg_cli.cli.display import RunDisplay
    from dpg_cli.runs.execute import execute
    from dpg_cli.runs.folder import RunFolder
    from dpg_cli.runs.tracking import Trackers

    folder = RunFolder.free(out or _free_folder(config))
    try:
        with RunDisplay(config, folder.path) as display, Trackers(report_to, display.stage) as trackers:
            outcome = execute(
                config,
                folder,
                on_step=display.step,
                on_stage=display.stage,
                on_built=display.built,
                command=sys.argv,
                trackers=trackers,
            )
    except KeyboardInterrupt:
        done = len(folder.read_metrics())
        raise InterruptedRunError(
            f"Interrupted after {done} of {config.steps} outer steps; {folder.path} keeps their metrics, but no generator.",
            "Start again with another --out; fewer steps: --set steps=N.",
        ) from None
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "run": str(folder.path),
                    "measures": outcome.measures,
                    "control": outcome.control,
                    "seconds": outcome.seconds,
                    "peak_memory_mb": outcome.peak_memory_mb,
                },
                indent=2,
            )
        )
        return
    measures = ", ".join(f"{name} {value:.4g}" for name, value in outcome.measures.items())
    typer.echo(f"{folder.path}: {measures}")
    memory = "" if outcome.peak_memory_mb is None else f", {outcome.peak_memory_mb:,.0f} MB at the peak"
    typer.echo(f"{outcome.seconds:.0f} s{memory}. Next: dpg verify {folder.path}")


def _free_folder(config: Config) -> Path:
    """`runs/<task>-<number>`, the first that does not exist."""
    number = 1
    while (path := Path("runs") / f"{config.task}-{number:03d}").exists():
        number += 1
    return path
