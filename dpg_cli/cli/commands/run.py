"""`dpg run`: its options; the dry run; the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpg_cli.cli.settings import settings_of
from dpg_cli.errors import UsageError

if TYPE_CHECKING:
    from dpg_cli.engine.ranks import Ranks
    from dpg_cli.settings.config import Config

_PATTERN = "Pattern tasks"
_OWN = "Your own models and prompts"


def run(
    task: Annotated[
        str | None,
        typer.Argument(
            help="qr-embed, pattern-67, l2-shrink, language-rephrase, uuid-emit, subliminal-trait or custom; or leave it "
            "out and give --config."
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
        typer.Option(
            help="ROW,COLUMN of the patch's upper-left corner in the LM head, or frequent: rows of frequent tokens.",
            rich_help_panel=_PATTERN,
        ),
    ] = None,
    language: Annotated[str | None, typer.Option(help="es, de, fr or it.", rich_help_panel="language-rephrase")] = None,
    uuid: Annotated[
        str | None, typer.Option(help="The UUID to emit; a fresh one by default.", rich_help_panel="uuid-emit")
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="Held-out text: prose, a source as for --prompts, or lm-eval:TASK.",
            rich_help_panel="language-rephrase",
        ),
    ] = None,
    generator: Annotated[
        str | None,
        typer.Option(
            help="Pretrained generator: a folder, a hub name, tiny, prose or prose-reader.", rich_help_panel=_OWN
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Pretrained target: a folder, a hub name, tiny, prose or prose-reader.", rich_help_panel=_OWN
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="tiny, prose, empty, a file of rows (FILE:COLUMN; docs/data.md), a datasets folder, or a hub dataset "
            "(OWNER/NAME@CONFIG#SPLIT:COLUMN).",
            rich_help_panel=_OWN,
        ),
    ] = None,
    parameter: Annotated[
        str | None,
        typer.Option(help="Whose norm to shrink; the LM head's by default.", rich_help_panel="l2-shrink"),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Your own target metric: FILE.py:Name, which is run, or the name of an installed one.",
            rich_help_panel="custom",
        ),
    ] = None,
    scale: Annotated[str, typer.Option(help="Preset scale.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML), put on top of the preset.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, for example steps=12 or inner.lr=1e-4.")
    ] = None,
    total_examples: Annotated[
        int | None,
        typer.Option(
            min=1, max=2**31, help="Completions in all: sets steps, so that batch sizes compare at equal examples."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; a new one under runs/ by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and training.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    trainer: Annotated[
        str | None,
        typer.Option(help="dpg, or trl: TRL's GRPOTrainer with the metagradient as reward."),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="Also log to tensorboard, wandb or trackio; may be given more than once.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings, sizes and cost; run nothing.")] = False,
    card: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: predict for a card that is not at hand, from shapes alone: H100, H200, A100, L40S or 4090."
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, max=2**20, help="With --dry-run: predict for so many processes.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in --out, if any.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Train a generator by Dataset Policy Gradient and leave generator, dataset, target and picture in a run folder.

    Examples:

        dpg run qr-embed --text "HELLO WORLD"

        dpg run qr-embed --image code.png --out runs/mine --seed 1

        dpg run qr-embed --scale gpu --card 4090 --dry-run

        dpg run language-rephrase --scale paper --generator ./llama --target ./llama --prompts articles.parquet:text

        dpg run custom --metric mine.py:Mine --set metric.options.layer=1

        dpg run --config runs/mine/config.toml --out runs/again
    """
    from dpg_cli.driver.launch import joined
    from dpg_cli.runs.tracking import check_names

    trackers = check_names(report_to or [])
    settings = settings_of(locals())
    if card is not None:
        if not dry_run:
            raise UsageError("--card predicts and runs nothing.", "Add --dry-run, or leave --card out.")
        _on_card(settings, as_json, card, processes or 1)
        return
    with joined("cpu" if dry_run else settings.device) as ranks:
        if not dry_run:
            _run(settings, out, resume, as_json, metric, trackers, ranks)
        elif ranks.first:
            _dry_run(settings, as_json, metric, processes or ranks.world)


def _dry_run(config: Config, as_json: bool, named_metric: str | None, processes: int) -> None:
    """Print settings, sizes, and the predicted cost."""
    from dpg_cli.planning.cost import estimate
    from dpg_cli.settings.config import settle, to_toml

    cost = estimate(settle(config), named_metric, processes)
    if as_json:
        typer.echo(json.dumps({"config": config.model_dump(mode="json"), "cost": cost.as_dict()}, indent=2))
        return
    typer.echo(to_toml(config))
    typer.echo(cost.as_text())


def _on_card(config: Config, as_json: bool, card: str, processes: int) -> None:
    """Print settings, and what is predicted for a card; nothing is loaded."""
    from dpg_cli.planning.cards import card_of

    card_of(card)  # before torch has been looked at: a misspelt name is said at once
    from dpg_cli.planning.outlook import outlook
    from dpg_cli.settings.config import to_toml

    found = outlook(config, card, processes)
    if as_json:
        typer.echo(json.dumps({"config": config.model_dump(mode="json"), "outlook": found.as_dict()}, indent=2))
        return
    typer.echo(to_toml(config))
    typer.echo(found.as_text())


def _run(
    settings: Config,
    out: Path | None,
    resume: bool,
    as_json: bool,
    metric: str | None,
    trackers: list[str],
    ranks: Ranks,
) -> None:
    """Begin a run, or go on with the one that `--out` holds."""
    from dpg_cli.cli.session import follow, session
    from dpg_cli.runs.folder import RunFolder
    from dpg_cli.settings.config import settle

    if not ranks.first:  # what is left to chance or to the state of a folder, rank 0 decides
        follow(ranks, metric)
        return
    if resume and out is None:
        raise UsageError("--resume does not say which run to go on with.", "Name its folder: --out RUN.")
    place = out or _free_folder(settings)
    known = RunFolder(place)
    if resume and known.config.is_file():
        settings = settle(settings, known.read_config())
        session(settings, known, resume=True, as_json=as_json, named_metric=metric, trackers=trackers, ranks=ranks)
    else:
        folder = RunFolder.free(place, leftovers=resume)
        session(
            settle(settings), folder, resume=False, as_json=as_json, named_metric=metric, trackers=trackers, ranks=ranks
        )


def _free_folder(config: Config) -> Path:
    """`runs/<task>-<number>`, the first that does not exist."""
    number = 1
    while (path := Path("runs") / f"{config.task}-{number:03d}").exists():
        number += 1
    return path
