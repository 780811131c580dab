"""`dpg verify RUN`: is the effect real?"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpg_cli.errors import UsageError, VerificationError

if TYPE_CHECKING:
    from dpg_cli.evidence.verify import Verdict
    from dpg_cli.runs.folder import RunFolder


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder; or what `dpg select` wrote.")],
    metric: Annotated[
        str | None, typer.Option(help="FILE.py:Name, for a run whose metric is a file; only you can name it.")
    ] = None,
    reader: Annotated[
        str,
        typer.Option(
            help="An independent model that reads the data and its control: a folder, a hub name, none, or auto: the other "
            "model of the generator's world, where it has one."
        ),
    ] = "auto",
    fluency: Annotated[
        bool,
        typer.Option(help="Also measure how the data reads beside its control, and how well the two are told apart."),
    ] = True,
    trainer: Annotated[
        str,
        typer.Option(
            help="Who trains: trl (TRL's SFTTrainer; extra `trl`), plain (a loop of torch.optim and transformers' schedules), "
            "or auto: trl where it is installed and can follow the recipe."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a fresh target on the exported dataset alone, by a stock trainer, and read the effect back.

    The same training on the untrained generator's data is the control. Exit code 0 when the payload is read from the
    first and not from the second, or Φ is higher by a margin that the datasets' quarters separate; else 4. Beside the
    effect stands how the data reads: nats a token under the starting generator and an independent reader, and how well data
    and control can be told apart. The verdict does not rest on that. All is kept as RUN/verify.json and shown in
    RUN/report.html.

    Of a selection, the target is fine-tuned on all of the data and on what stays, and the measured change of phi stands
    beside the predicted one; exit code 4 where their signs differ.

    Examples:

        dpg verify runs/qr-embed-001

        dpg verify sft-selected.jsonl

        dpg verify runs/custom-001 --metric mine.py:Mine

        dpg verify runs/mine --reader ./another-model

        dpg verify runs/mine --trainer plain
    """
    from dpg_cli.cli.stages import Stages
    from dpg_cli.evidence.fluency.judge import Judged
    from dpg_cli.evidence.fluency.run import judge_run, reader_for
    from dpg_cli.evidence.stock import Watcher
    from dpg_cli.evidence.verify import verify_run
    from dpg_cli.models.loading import load, pick_device
    from dpg_cli.runs.folder import RunFolder
    from dpg_cli.selection.select import read_selection

    if read_selection(run) is not None:
        _of_selection(run, device, metric, as_json)
        return
    folder = RunFolder.open(run)
    config = folder.read_config()
    with Stages() as stages:
        watch = Watcher(stages.stage, stages.progress)
        name = reader_for(config, reader) if fluency else ""
        judge = (
            load(name, device=pick_device(device)) if name else None
        )  # before the training: a wrong name is said at once
        result: Verdict = verify_run(folder, device, metric, watch, trainer)
        if fluency:
            result = Judged(result, judge_run(folder, config, pick_device(device), judge, watch))
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        for line in result.lines():
            typer.echo(line)
    _save(folder, result)
    if not result.verified:
        raise VerificationError(f"{run} is not verified: {result.reason}.")


def _of_selection(path: Path, device: str, metric: str | None, as_json: bool) -> None:
    """Retrain on all of the data and on what stays."""
    from dpg_cli.cli.stages import Stages
    from dpg_cli.evidence.stock import Watcher
    from dpg_cli.selection.retrain import retrain
    from dpg_cli.selection.select import home_of, keep_verdict

    place = path.absolute()
    with Stages() as stages, contextlib.chdir(home_of(path)):
        result = retrain(place, device, metric, Watcher(stages.stage, stages.progress))
    keep_verdict(path, result.as_dict())
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else "\n".join(result.lines()))
    if not result.verified:
        raise VerificationError(f"{path} is not verified: {result.reason}.")


def _save(folder: RunFolder, verdict: Verdict) -> None:
    """Keep the verdict beside the run and write the page anew; a folder that cannot be written costs neither."""
    from dpg_cli.report import write_report
    from dpg_cli.runs.verdict import save_verdict

    try:
        save_verdict(folder, verdict)
        write_report(folder)
    except (OSError, UsageError) as error:
        typer.echo(f"The verdict could not be saved in {folder.path}: {error}", err=True)
