"""What `dpg inspect` shows on the terminal: the sections of a `Look`, every word of files escaped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from dpg_cli.escape import printable
from dpg_cli.runs.commands import command

if TYPE_CHECKING:
    from dpg_cli.inspection.look import Look
    from dpg_cli.inspection.rows import RowsLook, Sample

MOST_TENSORS = 24  # lines of a listing in the terminal; --json has them all
SAMPLE_WIDTH = 160
_LABEL = 26


def _metric_file(found: Look) -> str:
    """The file of a run's custom metric, which `dpg verify` must be given again."""
    path = str((found.settings or {}).get("metric", {}).get("path", ""))
    return path if ".py:" in path else ""


class Printer:
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
