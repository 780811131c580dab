"""`dpg run`: settings from preset, file and flags; the run; its live display; the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpg_cli.errors import UsageError

if TYPE_CHECKING:
    from dpg_cli.config import Config

_PATTERN = "Pattern tasks"
_OWN = "Your own models and prompts"
TEXT_TASKS = ("language-rephrase",)


def run(
    task: Annotated[
        str | None,
        typer.Argument(
            help="qr-embed, pattern-67, l2-shrink, language-rephrase or uuid-emit; or leave it out and give --config."
        ),
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
    uuid: Annotated[
        str | None, typer.Option(help="The UUID to emit; a fresh one by default.", rich_help_panel="uuid-emit")
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="Held-out text: a source as for --prompts, or lm-eval:TASK.", rich_help_panel="language-rephrase"
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(help="Pretrained generator: a folder, a hub name, or tiny.", rich_help_panel=_OWN),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Pretrained target: a folder, a hub name, or tiny.", rich_help_panel=_OWN)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="tiny, empty, a text, JSONL or parquet file (FILE:COLUMN), a datasets folder, or a hub dataset "
            "(OWNER/NAME@CONFIG#SPLIT:COLUMN).",
            rich_help_panel=_OWN,
        ),
    ] = None,
    scale: Annotated[str, typer.Option(help="Preset scale.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML), put on top of the preset.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example steps=12 or inner.lr=1e-4.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and training.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings, sizes and cost; run nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out, if any.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Train a generator by Dataset Policy Gradient and leave generator, dataset, target and picture in a run folder.

    Examples:

        dpg run qr-embed --text "HELLO WORLD"

        dpg run qr-embed --image code.png --out runs/mine --seed 1

        dpg run language-rephrase --scale paper --generator ./llama --target ./llama --prompts articles.parquet:text

        dpg run --config runs/mine/config.toml --out runs/again
    """
    from dpg_cli.runs.folder import OWN_PROMPTS
    from dpg_cli.sources import absolute

    metric = {
        "image": None if image is None else str(image.resolve()),
        "text": text,
        "version": qr_version,
        "error_correction": error_correction,
        "language": language,
        "uuid": uuid,
        "origin": None if patch_origin is None else _origin(patch_origin),
        "file": None if eval_text is None else absolute(eval_text),
    }
    flags: dict[str, Any] = {
        "seed": seed,
        "device": device,
        "models": {**_model("generator", generator), **_model("target", target)},
        "prompts": {} if prompts is None else {"source": prompts if prompts in OWN_PROMPTS else absolute(prompts)},
        "metric": {k: v for k, v in metric.items() if v is not None},
    }
    if eval_text is not None and task is not None and task not in TEXT_TASKS:
        raise UsageError(
            f"--eval-text is for tasks that read held-out text ({', '.join(TEXT_TASKS)}); {task} reads none.",
            "Leave it out.",
        )
    settings = _settings(task, scale, config, {k: v for k, v in flags.items() if v not in (None, {})}, overrides or [])
    if dry_run:
        _dry_run(settings, as_json)
    else:
        _run(settings, out, resume, as_json)


def _model(role: str, name: str | None) -> dict[str, str]:
    """Settings of a model that a flag names: its own weights, whatever the preset begins with."""
    if name is None:
        return {}
    path = Path(name).expanduser()
    return {role: str(path.resolve()) if name != "tiny" and path.exists() else name, f"{role}_init": "pretrained"}


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
    from dpg_cli.config import settle, to_toml
    from dpg_cli.runs.cost import estimate

    cost = estimate(settle(config))
    if as_json:
        typer.echo(json.dumps({"config": config.model_dump(mode="json"), "cost": cost.as_dict()}, indent=2))
        return
    typer.echo(to_toml(config))
    typer.echo(cost.as_text())


def _run(settings: Config, out: Path | None, resume: bool, as_json: bool) -> None:
    """Begin a run, or go on with the one that `--out` holds."""
    from dpg_cli.cli.session import session
    from dpg_cli.config import settle
    from dpg_cli.runs.folder import RunFolder

    if resume and out is None:
        raise UsageError("--resume does not say which run to go on with.", "Name its folder: --out RUN.")
    place = out or _free_folder(settings)
    known = RunFolder(place)
    if resume and known.config.is_file():
        session(settle(settings, known.read_config()), known, resume=True, as_json=as_json)
    else:
        session(settle(settings), RunFolder.free(place, leftovers=resume), resume=False, as_json=as_json)


def _free_folder(config: Config) -> Path:
    """`runs/<task>-<number>`, the first that does not exist."""
    number = 1
    while (path := Path("runs") / f"{config.task}-{number:03d}").exists():
        number += 1
    return path
