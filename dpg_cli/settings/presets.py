"""Presets: TOML files under `presets/` (inside the wheel: `dpg_cli/_presets`), merged with a user's file and overrides.

A preset is settings alone; it cannot name code. Order, later wins: defaults < preset < --config < flags and --set.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError, suggestion
from dpg_cli.settings.config import DEEPEST, Config, depth, load_toml, shown, validate

SOURCES = {"image", "text", "rows", "uuid"}  # what a metric's effect can be given by, one alone
TOGETHER = {"language", "file"}  # or by these, which go together: texts, and the language they are in
_HERE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Preset:
    """One preset file.

    Attributes:
        name: `task.scale`, as in `qr-embed.tiny`.
        path: the file.
        about: the first comment line of the file.
    """

    name: str
    path: Path
    about: str

    @property
    def task(self) -> str:
        """The task it is for."""
        return self.name.partition(".")[0]

    @property
    def scale(self) -> str:
        """The scale it is for."""
        return self.name.partition(".")[2]

    def data(self) -> dict[str, Any]:
        """Its settings, unvalidated."""
        return load_toml(self.path)


def preset_folder() -> Path:
    """Where the presets lie: inside an installed package, or beside it in a checkout."""
    packaged = _HERE / "_presets"
    return packaged if packaged.is_dir() else _HERE.parent / "presets"


def all_presets() -> list[Preset]:
    """Every preset, by name."""
    found = []
    for path in sorted(preset_folder().glob("*.toml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found.append(Preset(path.stem, path, first.lstrip("# ").strip()))
    return found


def find(name: str) -> Preset:
    """The preset of that name.

    Raises:
        UsageError: naming those that exist.
    """
    presets = {preset.name: preset for preset in all_presets()}
    if name not in presets:
        raise UsageError(f"There is no preset {shown(name)}.", suggestion(name, presets, "Presets"))
    return presets[name]


def find_task(task: str, scale: str) -> Preset:
    """The preset of a task at a scale.

    Raises:
        UsageError: naming the tasks, or the scales of this one.
    """
    presets = all_presets()
    tasks = list(dict.fromkeys(preset.task for preset in presets))
    if task not in tasks:
        bare = task.partition(".")[0]
        remedy = f"Did you mean {bare}?" if bare in tasks else suggestion(task, tasks, "Tasks")
        raise UsageError(f"There is no task {task!r}.", remedy)
    scales = {preset.scale: preset for preset in presets if preset.task == task}
    if scale not in scales:
        raise UsageError(f"The task {task} has no scale {scale!r}.", suggestion(scale, scales, "It has"))
    return scales[scale]


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with those of `over` put on top.

    A metric's sources (image, text, ...) exclude each other, so one in `over` replaces whichever `base` has. A language
    alone also replaces a file, unless the file's name has a place for it: `lm-eval:some_task_{language}`.
    """
    merged = dict(base)
    metric, new = merged.get("metric"), over.get("metric")
    if isinstance(metric, dict) and isinstance(new, dict):
        if new.get("name", metric.get("name")) != metric.get("name"):
            metric = {}
        else:
            gone = SOURCES | TOGETHER if SOURCES & new.keys() else SOURCES if TOGETHER & new.keys() else set()
            if "language" in new and "{language}" not in str(metric.get("file", "")):
                gone = gone | {"file"}
            metric = {key: value for key, value in metric.items() if key not in gone}
        merged["metric"] = metric
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`section.key=value` as nested settings. The value is TOML; what is no TOML value is taken as a string.

    Raises:
        UsageError: if there is no key or no `=`.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {shown(text)} is not of the form key=value.", "For example: --set inner.lr=1e-4.")
    try:
        table = tomllib.loads(f"value = {value}")
        if len(table) > 1:
            raise ValueError("a second line")
        parsed: Any = table["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    except (ValueError, RecursionError):
        raise UsageError(f"--set {shown(text)} has no sensible value.", "For example: --set inner.lr=1e-4.") from None
    if len(parts) + depth(parsed) > DEEPEST:
        raise UsageError(f"--set {shown(text)} is nested too deeply.", "For example: --set inner.lr=1e-4.")
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed


def resolve(base: dict[str, Any], overrides: list[str], flags: dict[str, Any] | None = None) -> Config:
    """Settings of a run from a preset's or file's data, `--set` overrides and flags.

    Args:
        base: settings of a preset or a file.
        overrides: `key=value` texts.
        flags: nested settings from dedicated flags; `--set` wins over them.

    Raises:
        ConfigError: with every fault.
    """
    data = merge(base, flags or {})
    for text in overrides:
        data = merge(data, parse_override(text))
    return validate(data)
