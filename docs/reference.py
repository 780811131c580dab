"""Write docs/cli.md, docs/settings.md and the rooms of docs/architecture.md from the code: commands as Typer has them, settings as
the schema has them, rooms as their docstrings and imports say.

python docs/reference.py            a test fails where the pages and the code differ
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dpg_cli.cli.app import app
from dpg_cli.settings.config import METRIC_NAMES, Config, MetricOptions

DOCS = Path(__file__).parent
MARKUP = re.compile(r"\[/?(bold|dim|green|red|cyan|italic)[^\]]*\]")


def cell(text: str) -> str:
    """A text that fits a table's cell."""
    return MARKUP.sub("", " ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def code_of(line: str) -> str:
    """A line of help; an example of use is code."""
    return f"`{line}`" if line.startswith("dpg ") else line


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """A command and those below it, with what is typed to call them."""
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from commands(below, f"{path} {name}")


def takes(annotation: Any) -> str:
    """What an option takes, in a word, or its choices."""
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(str(choice.value) for choice in annotation)
    if choices := [str(choice) for choice in get_args(annotation) if not isinstance(choice, type)]:
        return ", ".join(choices)
    return {str: "text", int: "integer", float: "number"}.get(
        annotation, getattr(annotation, "__name__", "text").lower()
    )


def option_row(parameter: Any) -> str:
    """The table's row of an option or argument."""
    argument = parameter.param_type_name == "argument"
    names = parameter.name.upper() if argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
    kind = "" if getattr(parameter, "is_flag", False) else takes(parameter.type_descriptor.annotation)
    default = parameter.default
    empty = callable(default) or default in (None, "", False, (), []) or type(default).__name__ == "Sentinel"
    shown = "needed" if parameter.required else "" if empty else f"`{default}`"
    return f"| `{names}` | {cell(kind)} | {shown} | {cell(getattr(parameter, 'help', '') or '')} |"


def cli_page() -> str:
    """docs/cli.md."""
    lines = [
        "# Command line",
        "",
        "Made from the code by `python docs/reference.py`; a test fails where the two differ.",
        "",
    ]
    for path, command in commands(typer.main.get_command(app), "dpg"):
        text = MARKUP.sub("", (command.help or "").strip())
        lines += [f"## `{path}`", "", "\n".join(code_of(line.strip()) for line in text.splitlines()), ""]
        options = [p for p in command.params if not getattr(p, "hidden", False) and "--help" not in p.opts]
        if options:
            lines += ["| option | takes | default | what it does |", "|---|---|---|---|", *map(option_row, options), ""]
        if command.epilog and path == "dpg":
            lines += [command.epilog.strip(), ""]
    return "\n".join(lines).rstrip() + "\n"


def plain_type(field: FieldInfo) -> str:
    """A field's type in few words."""
    annotation: Any = field.annotation
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return ", ".join(f"`{choice}`" if choice else "empty" for choice in choices)
    if not choices:
        return getattr(annotation, "__name__", str(annotation))
    return re.sub(r"\b(typing|dpg_cli[.\w]*)\.(?=\w)", "", str(annotation))


def settings_rows(model: type[BaseModel], section: str) -> Iterator[str]:
    """Rows of a section's own fields."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            continue
        if field.annotation == MetricOptions or name in ("metric",):
            continue
        default = "needed" if field.default is PydanticUndefined else f"`{field.default!r}`"
        yield f"| `{section}{name}` | {cell(plain_type(field))} | {cell(default)} | {cell(field.description or '')} |"


def metric_models() -> dict[str, type[BaseModel]]:
    """The options of each metric, by name."""
    union = get_args(MetricOptions)[0]
    models = {get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(union)}
    return {name: models[name] for name in METRIC_NAMES}


def settings_page() -> str:
    """docs/settings.md."""
    head = ["| setting | takes | default | what it is |", "|---|---|---|---|"]
    lines = [
        "# Settings", "", "Made from the schema by `python docs/reference.py`; a test fails where the two differ. Set any of them in a TOML",
        "file (`--config`) or by `--set section.key=value`. Presets give other defaults: `dpg presets show NAME`. How to choose them:",
        "[choosing settings](choosing.md).", "", "## A run", "", *head, *settings_rows(Config, ""), "",
    ]  # fmt: skip
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            about = (field.annotation.__doc__ or "").strip().splitlines()[0]
            lines += [f"## `[{name}]`", "", about, "", *head, *settings_rows(field.annotation, f"{name}."), ""]
    for name, model in metric_models().items():
        about = (model.__doc__ or "").strip().splitlines()[0]
        lines += [f'## `[metric]` with `name = "{name}"`', "", about, "", *head, *settings_rows(model, "metric."), ""]
    return "\n".join(lines).rstrip() + "\n"


def architecture_page() -> str:
    """docs/architecture.md."""
    spec = importlib.util.spec_from_file_location("house", DOCS / "house.py")
    assert spec is not None and spec.loader is not None
    house = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(house)
    return house.page()


PAGES = {"cli.md": cli_page, "settings.md": settings_page, "architecture.md": architecture_page}


def main() -> None:
    """Write all pages."""
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    main()
