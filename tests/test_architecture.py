"""The house: the direction of imports, no circles, the size of rooms and modules, the weight of `dpg --help`."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

from imports import circles, graph, imported, modules, rooms

ROOT = Path(__file__).parents[1] / "dpg_cli"
LOOSE = {
    "__init__",
    "__main__",
    "errors",
    "config",  # the settings' public path, which the documentation shows
    "escape",  # text made harmless: every room that shows something takes it
}

# (whose imports, what they must not be): a prefix of the file's path, and prefixes of modules
FORBIDDEN = [
    ("", ("click",)),  # Typer carries its own
    ("engine/", ("dpg_cli.runs", "dpg_cli.driver", "dpg_cli.settings", "dpg_cli.evidence", "dpg_cli.planning")),
    ("engine/", ("dpg_cli.integrations", "accelerate")),
    ("engine/inner/", ("dpg_cli.engine.reverse", "dpg_cli.engine.generator", "dpg_cli.engine.loop")),
    ("engine/reverse/", ("dpg_cli.engine.generator", "dpg_cli.engine.loop")),
    ("engine/generator/", ("dpg_cli.engine.reverse", "dpg_cli.engine.loop")),
    ("evidence/verify.py", ("dpg_cli.engine",)),
    ("evidence/stock", ("dpg_cli.engine",)),
    ("runs/", ("dpg_cli.driver", "dpg_cli.artefacts", "dpg_cli.inspection", "dpg_cli.export")),
    ("driver/", ("dpg_cli.inspection", "dpg_cli.export")),
    ("integrations/", ("dpg_cli.driver", "dpg_cli.runs", "dpg_cli.inspection", "dpg_cli.export")),
    ("settings/", ("torch", "transformers", "dpg_cli.models", "dpg_cli.engine")),
]


def below(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def test_direction_of_imports() -> None:
    faults, count = [], 0
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for module, _ in imported(path):
            count += 1
            if not name.startswith(("cli/", "__main__")) and below(module, ("typer", "rich", "dpg_cli.cli")):
                faults.append((name, module))
            if below(module, ("trl",)) and name != "driver/trl/trainer.py":
                faults.append((name, module))
            faults += [(name, module) for start, wrong in FORBIDDEN if name.startswith(start) and below(module, wrong)]
    assert count > 500
    assert faults == []


def test_no_circle_of_modules_anywhere() -> None:
    edges = graph()
    assert sum(map(len, edges.values())) > 400
    assert circles(edges) == []


def test_no_circle_of_rooms() -> None:
    assert circles(rooms(graph())) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_rooms_are_small_and_say_what_belongs_in_them() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == LOOSE
    folders = {path.parent for path in ROOT.rglob("*.py")} - {ROOT}
    assert len(folders) >= 20
    crowded = {folder.name: len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in crowded.items() if count > 12 + 1} == {}  # a dozen, and `__init__`
    silent = []
    for folder in folders:
        about = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
        if len(about) < 60 or "Not here:" not in about:
            silent.append(folder.name)
    assert silent == []


def test_modules_stay_small() -> None:
    sizes = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: size for name, size in sizes.items() if size > 500} == {}


def test_help_is_light() -> None:
    code = "import sys; sys.argv = ['dpg', '--help']\nfrom dpg_cli.cli import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    started = time.perf_counter()
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    assert answer.returncode == 0, answer.stderr
    assert "presets" in answer.stdout
    assert seconds < 10  # a guard against loading torch, not a benchmark
