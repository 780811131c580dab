"""`dpg inspect PATH`: what a run, a checkpoint, a model folder or a safetensors file is. Everything from files is escaped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dpg_cli.cli.commands.inspect_dataset import compare
from dpg_cli.errors import UsageError
from dpg_cli.escape import printable
from dpg_cli.runs.commands import command

if TYPE_CHECKING:
    from dpg_cli.inspection.look import Look
    from dpg_cli.inspection.rows import RowsLook, Sample

MOST_TENSORS = 24  # lines of a listing in the terminal; --json has them all
SAMPLE_WIDTH = 160
_LABEL = 26


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="A run folder, a checkpoint, a model folder or a safetensors file; or the word dataset and two datasets, or "
            "a run for its data and control: .parquet, .jsonl (FILE:COLUMN), run folders.",
            metavar="PATH",
        ),
    ],
    render: Annotated[Path | None, typer.Option(help="Draw the LM head into this PNG.")] = None,
    patch: Annotated[str | None, typer.Option(help="ROW,COL,ROWS,COLS: the part to draw; else the whole.")] = None,
    show: Annotated[
        str | None,
        typer.Option(help="before, after or difference; by default the difference, where a before is known."),
    ] = None,
    tensor: Annotated[str | None, typer.Option(help="Name of another matrix to draw.")] = None,
    samples: Annotated[int, typer.Option(help="Rows of the dataset to show, by highest and by lowest reward.")] = 3,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the PNG.")] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of two datasets: compare their texts, in the tokens of this model.")
    ] = None,
    reader: Annotated[str | None, typer.Option(help="Of two datasets: a model that reads their texts.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...; for --reader.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show what PATH is: settings, parameters, history, samples, what happened to the LM head, whether it is finished.

    Nothing is unpickled and no code of the folder is run.

    With the word dataset before them, two datasets are compared: how well a classifier on token and bigram counts tells them
    apart, from one example and from a hundred, and with --reader what both cost that model.

    Examples:

        dpg inspect runs/mine

        dpg inspect runs/mine --render head.png --patch 0,0,64,64 --show difference

        dpg inspect model.safetensors --json

        dpg inspect dataset runs/mine

        dpg inspect dataset mine.jsonl theirs.parquet --tokenizer gpt2 --reader gpt2
    """
    drawing = render is not None or patch is not None or show is not None or tensor is not None
    if len(paths) > 1 and str(paths[0]) == "dataset":
        if drawing:
            raise UsageError("Datasets have no weights to draw.", "Leave --render and what goes with it out.")
        compare(list(map(str, paths[1:])), tokenizer, reader, device, as_json)
        return
    if len(paths) > 1:
        raise UsageError(f"{len(paths)} paths are given; one is looked at.", "Two datasets: dpg inspect dataset A B")
    if tokenizer or reader:
        raise UsageError("--tokenizer and --reader are for datasets.", "For example: dpg inspect dataset A B")
    path = paths[0]
    from dpg_cli.inspection.look import look

    if not 0 <= samples <= 1000:
        raise UsageError(f"--samples {samples} is out of range.", "Give 0 to 1000.")
    window = None if patch is None else _window(patch)
    if render is None and (patch is not None or show is not None or tensor is not None):
        raise UsageError("--patch, --show and --tensor say what to draw.", "Add --render FILE.png.")
    if render is not None:
        _check_png(render, path, overwrite)
    found = look(path, samples)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # terminals that lack the bars of a chart
        _Printer().look(found)
    if render is not None:
        from dpg_cli.inspection.picture import draw
        from dpg_cli.patterns.render import save_png

        save_png(draw(path, show=show, window=window, tensor=tensor), render)
        typer.echo(printable(f"drawn: {render}"), err=True)


def _window(text: str) -> tuple[int, int, int, int]:
    """`ROW,COL,ROWS,COLS` as four numbers."""
    parts = text.replace(" ", "").split(",")
    if len(parts) != 4 or not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise UsageError(f"--patch {text!r} is not ROW,COL,ROWS,COLS.", "For example: --patch 0,0,64,64.")
    row, column, rows, columns = map(int, parts)
    return row, column, rows, columns


def _check_png(render: Path, path: Path, overwrite: bool) -> None:
    """Refuse a place for the picture before the work begins."""
    if render.suffix.lower() != ".png":
        raise UsageError(f"--render {render} does not end in .png.", "The picture is a PNG.")
    if render.exists() and (not overwrite or not render.is_file()):
        raise UsageError(f"{render} exists already.", "Give another name, or add --overwrite.")
    if path.is_dir() and render.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"{render} lies inside of what is inspected.", "Give a place outside of it.")
    if not render.resolve().parent.is_dir():
        raise UsageError(f"The folder of {render} does not exist.", "Make it first.")


def _metric_file(found: Look) -> str:
    """The file of a run's custom metric, which `dpg verify` must be given again."""
    path = str((found.settings or {}).get("metric", {}).get("path", ""))
    return path if ".py:" in path else ""


class _Printer:
    """Prints a `Look` for people."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def line(self, text: str = "") -> None:
        """One line, escaped."""
        self.console.print(Text(printable(text, 100_000)))

    def pair(self, label: str, value: object, indent: int = 2) -> None:
        """A label and what belongs to it."""
        self.line(f"{' ' * indent}{label:<{_LABEL - indent}}{value}".rstrip())

    def head(self, text: str) -> None:
        """A section begins."""
        self.console.print()
        self.console.print(Text(printable(text), style="bold"))

    def look(self, found: Look) -> None:
        """All sections that there are."""
        self.console.print(Text(printable(f"{found.path}: {_what(found)}"), style="bold"))
        if found.status is not None:
            self.run(found)
        if found.history is not None and found.history.steps:
            self.history(found)
        if found.patch is not None:
            self.patch(found)
        for name, model in found.models.items():
            self.model(name, model)
        if found.tensors:
            self.tensors(found.tensors)
        for name, data in found.state.items():
            self.state(name, data)
        for file, metadata in found.metadata.items():
            self.head(f"Metadata of {file}")
            for key, value in list(metadata.items())[:MOST_TENSORS]:
                self.pair(printable(key, 60), printable(value, 200))
        for name, rows in found.datasets.items():
            self.rows(name, rows)
        if found.settings is not None:
            self.settings(found.settings)
        if found.checkpoints:
            self.head("Checkpoints")
            self.line("  " + ", ".join(found.checkpoints))
        if found.not_read:
            self.head("Not opened and not run")
            self.line("  " + ", ".join(found.not_read[:MOST_TENSORS]))

    def run(self, found: Look) -> None:
        """What was asked, and whether it worked."""
        status, asked = found.status, found.asked or {}
        assert status is not None
        info = status.info
        versions = info.get("versions")
        self.pair("asked for", asked.get("effect"))
        if asked.get("payload"):
            self.pair("payload", printable(asked["payload"], 300))
        self.pair("target metric", asked.get("metric"))
        if "started" in info:
            self.pair("started", printable(info["started"], 60))
        seconds, memory = status.number("seconds"), status.number("peak_memory_mb")
        if seconds is not None:
            self.pair("took", f"{seconds:,.0f} s" + ("" if memory is None else f", {memory:,.0f} MB at the peak"))
        if isinstance(versions, dict):
            self.pair("versions", ", ".join(f"{k} {printable(v, 30)}" for k, v in list(versions.items())[:12]))
        if not status.measures:
            return
        self.head("Outcome, on a target fine-tuned on the final dataset")
        self.pair("", f"{'this data':>14}{'control':>14}")
        for name, value in status.measures.items():
            control = (status.control or {}).get(name)
            self.pair(name, f"{value:>14.6g}" + ("" if control is None else f"{control:>14.6g}"))
        unknown = "not yet" if status.verification is None else "the dataset is another now than was verified"
        see = command("verify", found.path, metric=_metric_file(found))
        said = {None: f"{unknown}; see {see}", True: "yes", False: "no"}[status.verified]
        self.pair("verified", said)
        lines = (status.verification or {}).get("lines") if status.verified is not None else None
        for line in lines[:20] if isinstance(lines, list) else []:
            self.pair("", printable(line, 200))

    def history(self, found: Look) -> None:
        """The log as bars."""
        from dpg_cli.inspection.history import sparkline

        history, status = found.history, found.status
        assert history is not None
        self.head(f"History: {history.steps:,} outer steps")
        for name in history.shown(list(status.measures) if status else []):
            series = history.columns[name]
            odd = f"  ({series.not_finite:,} not finite)" if series.not_finite else ""
            self.pair(name, f"{series.first:>11.4g} {sparkline(series.chart)} {series.last:<11.4g}{odd}")

    def patch(self, found: Look) -> None:
        """What happened to the patch of the head."""
        patch = found.patch
        assert patch is not None
        rows, columns = patch.shape
        self.head(f"LM head before and after: {rows} x {columns}")
        self.pair("norm before", f"{patch.norm_before:.6g}")
        self.pair("norm after", f"{patch.norm_after:.6g} ({patch.norm_after - patch.norm_before:+.3g})")
        self.pair("norm of the change", f"{patch.norm_change:.6g}; {patch.unmoved:.1%} of the entries did not move")
        if patch.pixel_accuracy is not None:
            self.pair("pixel accuracy", f"{patch.pixel_accuracy:.4f}")
        if patch.wanted is not None or patch.read is not None:
            wanted = "" if patch.wanted is None else f"; wanted {printable(repr(patch.wanted), 300)}"
            self.pair(
                "read by zxing-cpp", ("nothing" if patch.read is None else printable(repr(patch.read), 300)) + wanted
            )
        if patch.drawing is not None and (patch.pixel_accuracy is not None or patch.read is not None):
            wrong = "" if patch.pixel_accuracy is None else f"{'':3}wrong cells"
            self.line()
            self.line(f"    {'sign of the change':<{columns}}{wrong}")
            for line in patch.drawing.split("\n"):
                self.line(f"    {line}")

    def model(self, name: str, model: dict[str, Any]) -> None:
        """A model, or a file of weights."""
        self.head(name.capitalize() if name in ("generator", "target", "model") else name)
        dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in model["dtypes"].items())
        self.pair("parameters", f"{model['parameters']:,} in {model['tensors']:,} tensors ({dtypes})")
        for key, value in model.get("architecture", {}).items():
            self.pair(key, printable(", ".join(map(str, value)) if isinstance(value, list) else value, 120))
        head = model["head"]
        if head is not None:
            tied = ", tied to the embedding" if head["tied"] else ""
            norm = "" if head["norm"] is None else f", norm {head['norm']:.6g}"
            shape = " x ".join(map(str, head["shape"]))
            self.pair("LM head", f"{printable(head['name'], 80)}{tied}: {shape} {head['dtype']}{norm}")
        if model.get("names_code"):
            self.pair("code", "config.json names code of its own (auto_map); dpg never runs it")

    def tensors(self, tensors: list[dict[str, Any]]) -> None:
        """Tensors with types, shapes and norms."""
        self.head("Tensors")
        for entry in tensors[:MOST_TENSORS]:
            shape = " x ".join(map(str, entry["shape"])) or "one value"
            norm = "" if entry["norm"] is None else f"norm {entry['norm']:.6g}"
            self.line(f"  {printable(entry['name'], 52):<54}{shape:<18}{entry['dtype']:<6}{norm}".rstrip())
        if len(tensors) > MOST_TENSORS:
            self.line(f"  and {len(tensors) - MOST_TENSORS:,} more; --json lists them")

    def state(self, name: str, data: dict[str, Any]) -> None:
        """A JSON file of a checkpoint: its plain values, and the names of the rest."""
        self.head(name)
        for key, value in list(data.items())[:MOST_TENSORS]:
            short = f"{len(value)} entries" if isinstance(value, dict | list) else printable(value, 120)
            self.pair(printable(key, 60), short)

    def rows(self, name: str, rows: RowsLook) -> None:
        """A dataset and its samples."""
        self.head(f"Dataset {name}: {rows.rows:,} rows")
        if rows.rewards:
            r = rows.rewards
            self.pair("reward", f"mean {r['mean']:.3g}, std {r['std']:.3g}, {r['least']:.3g} to {r['most']:.3g}")
            self.pair("above 0", f"{r['positive']:.1%}")
        for label, chosen in (
            ("highest reward" if rows.rewards else "first rows", rows.highest),
            ("lowest reward", rows.lowest),
        ):
            if chosen:
                self.line(f"  {label}:")
            for sample in chosen:
                self.line(f"    {_sample(sample)}")

    def settings(self, settings: dict[str, Any]) -> None:
        """The resolved settings, a section a line."""
        self.head("Settings")
        plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
        for section, values in {"run": plain, **{k: v for k, v in settings.items() if isinstance(v, dict)}}.items():
            shown = " ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items())
            self.pair(section, printable(shown, 600))


def _what(found: Look) -> str:
    """The kind of a thing in words."""
    if found.kind == "run":
        settings = found.settings or {}
        steps = settings.get("steps")
        done = found.status.steps_done if found.status else 0
        end = "finished" if found.finished else f"not finished, {done:,} of {steps:,} outer steps done"
        return f"run of {settings.get('task')} ({settings.get('scale')}), {end}"
    if found.kind == "model":
        return f"{found.role} of a run" if found.role else "model folder"
    if found.kind == "checkpoint" and found.settings is not None:
        step, settings = found.state["state.json"].get("step"), found.settings
        return f"checkpoint after outer step {step} of {settings['steps']:,}, run of {settings['task']} ({settings['scale']})"
    return {"checkpoint": "checkpoint, or a folder of safetensors files", "tensors": "safetensors file"}[found.kind]


def _sample(sample: Sample) -> str:
    """A row on one line."""
    reward = "" if sample.reward is None else f"{sample.reward:+.3g}  "
    prompt = f"{printable(sample.prompt, 60)} -> " if sample.prompt else ""
    return f"{reward}{prompt}{printable(sample.text, SAMPLE_WIDTH)}"
