"""The direction of imports, the weight of `dpg --help`, and the size of modules."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent / "dpg_cli"


def imports() -> list[tuple[str, str]]:
    """(file, imported module) over the whole package."""
    found = []
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found += [(name, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append((name, node.module))
    return found


def test_direction_of_imports() -> None:
    found = imports()
    assert len(found) > 100
    faults = []
    for name, module in found:
        if not name.startswith(("cli/", "__main__")) and (
            module.split(".")[0] in ("typer", "rich") or module.startswith("dpg_cli.cli")
        ):
            faults.append((name, module))
        if name.startswith("engine/") and module.startswith(
            ("dpg_cli.runs", "dpg_cli.evidence", "dpg_cli.settings.config")
        ):
            faults.append((name, module))
        if name == "evidence/verify.py" and module.startswith("dpg_cli.engine"):
            faults.append((name, module))
        if name.startswith(("runs/", "driver/")) and module.startswith(("dpg_cli.inspection", "dpg_cli.export")):
            faults.append((name, module))
        if name.startswith("integrations/") and module.startswith(("dpg_cli.inspection", "dpg_cli.export")):
            faults.append((name, module))
        if module.split(".")[0] == "trl" and name != "driver/trl_trainer.py":
            faults.append((name, module))
        if name.startswith("engine/") and module.startswith(
            ("dpg_cli.integrations", "dpg_cli.driver.launch", "accelerate")
        ):
            faults.append((name, module))
        if module == "click" or module.startswith("click."):
            faults.append((name, module))
    assert faults == []


def test_modules_stay_small() -> None:
    sizes = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
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
