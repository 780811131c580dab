"""The documentation: references as the code has them, the example runs, the site builds with every link good, offline."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_references_are_as_the_code_has_them() -> None:
    reference = load(ROOT / "docs" / "reference.py")
    for name, make in reference.PAGES.items():
        stored = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert make() == stored, f"docs/{name} differs from the code: python docs/reference.py"
    assert "`dpg export dataset`" in stored or "## `[inner]`" in stored


def test_functions_that_the_method_page_names_exist() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:engine|metrics)/[\w/]+\.py)`, `(\w+)`", text)
    assert len(named) >= 15
    for path, name in named:
        source = (ROOT / "dpg_cli" / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), (path, name)


def test_what_the_architecture_page_names_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:dpg_cli|tests|docs)/[\w/]+\.py)`", text)
    assert len(paths) >= 25
    assert [path for path in paths if not (ROOT / path).is_file()] == []
    named = re.findall(r"`(dpg_cli/[\w/]+\.py)`, `(\w+)`", text)
    assert len(named) >= 12
    for path, name in named:
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            path,
            name,
        )


def test_the_attribution_example_runs_and_its_prediction_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = load(ROOT / "docs" / "examples" / "attribution.py").main()
    assert found["real"] < 0
    assert 0.5 < found["predicted"] / found["real"] < 1.5
    assert "without the 6 most helpful" in capsys.readouterr().out


def test_the_site_builds_with_every_link_good_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {path.name for path in (tmp_path / "site").iterdir() if path.is_dir()} >= pages
    for path in (tmp_path / "site").rglob("*.html"):
        html = path.read_text(encoding="utf-8")
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=.?https?://", html), path
        assert not re.search(r"<link[^>]+rel=.?stylesheet[^>]+href=.?https?://", html), path


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[nowhere](missing.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "missing.md" in done.stderr
