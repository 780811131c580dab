"""The built wheel carries presets and the embedded model, and works from a clean environment in another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_works_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("dpg_cli-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "dpg_cli/_presets/qr-embed.tiny.toml",
        "dpg_cli/tiny/model/model.safetensors",
        "dpg_cli/tiny/model/README.md",
        "dpg_cli/prose/model/model.safetensors",
        "dpg_cli/prose/reader/model.safetensors",
        "dpg_cli/prose/texts/heldout.txt.gz",
        "dpg_cli/report/page.html",
        "dpg_cli/report/style.css",
        "dpg_cli/report/browse.js",
    ):
        assert part in names
    assert wheel.stat().st_size < 5_000_000

    # A clean environment: nothing of ours in it but the wheel. Its dependencies, which are large, are lent to it by path.
    place = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    lent = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (place / "lent").mkdir()
    for entry in lent.iterdir():
        if not entry.name.startswith(("dpg_cli", "_dpg_cli", "__editable__")):
            (place / "lent" / entry.name).symlink_to(entry)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(place / "lent")}

    def dpg(*arguments: str) -> str:
        command = [str(place / "bin" / "dpg"), *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=elsewhere, env=environment
        ).stdout

    assert "qr-embed.tiny" in dpg("presets", "list")
    assert "334,464" in dpg("run", "qr-embed", "--dry-run")
    assert "steer-direction" in dpg("metrics", "list", "--json")
    where = subprocess.run(
        [str(python), "-c", "import dpg_cli; print(dpg_cli.__file__)"],
        check=True, capture_output=True, text=True, cwd=elsewhere, env=environment,
    )  # fmt: skip
    assert where.stdout.startswith(str(place))
