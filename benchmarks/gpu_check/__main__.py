"""Run the stages one after another, each in a process of its own within its time, and keep what they found in one JSON.

    make gpu-check                               on one card: at most nine minutes, from a bare machine to figures
    make gpu-check DEVICE=cpu                    the same with tiny shapes: a rehearsal
    python3 -m benchmarks.gpu_check --device cuda [--skip install,tests] [--only outer] [--python PYTHON] [--bergson PYTHON]
                                    [--limit 540] [--out build/gpu-check.json]

Needs nothing but Python's own library: `install` makes the environment that the other stages run in. The JSON is written anew, whole,
after every stage, so that what a limit, a crash or a power cut leaves is readable. docs/performance.md shows
`benchmarks/results/gpu-check.json`, if there is one (`--out` it there after a run on a card).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LIMITS = {
    "install": 200,
    "tests": 90,
    "metagradient": 150,
    "generator": 60,
    "outer": 300,
}  # seconds, in this order, as far as --limit goes
LEAST = 5.0  # seconds without which no stage begins


def write(path: Path, found: dict[str, Any]) -> None:
    """The JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
        file.write(json.dumps(found, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def watched(command: list[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, float]:
    """Run a command, its output shown as it comes; killed with all its children after some seconds.

    Returns:
        Its exit code, None where it was killed; and the seconds that it took.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return (None if late.is_set() else code), time.monotonic() - started


def install(options: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    """The Python of the environment, and the command that makes it."""
    venv = folder / "venv"
    python = str(venv / "bin" / "python")
    pip = f"{python} -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'"
    return python, ["sh", "-c", f"test -x {python} || {options.base} -m venv {venv} && {pip}"]


def commands(name: str, options: argparse.Namespace, python: str, out: Path) -> list[str]:
    """The command of a stage after `install`."""
    if name == "tests":
        return [
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "tests/test_device.py",
            "-p",
            "no:cacheprovider",
            f"--junitxml={out}.xml",
        ]
    more = ["--tiny"] if options.device == "cpu" else []
    more += ["--bergson", options.bergson] if options.bergson else []
    return [python, "-m", "benchmarks.gpu_check.stages", name, "--device", options.device, "--out", str(out), *more]


def figures(name: str, out: Path) -> Any:
    """What a stage left, whole or partial."""
    if name == "tests" and (xml := Path(f"{out}.xml")).is_file():
        from xml.etree import ElementTree

        suite = next(iter(ElementTree.parse(xml).getroot()), None)
        kept = ("tests", "failures", "errors", "skipped")
        return {} if suite is None else {key: int(suite.attrib[key]) for key in kept}
    try:
        return json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, refused where they name no stage."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", default="", help=f"stages to leave out, of {', '.join(LIMITS)}")
    parser.add_argument("--only", default="", help="stages to run, and no others")
    parser.add_argument("--python", help="an environment that is there already: nothing is installed")
    parser.add_argument("--base", default=sys.executable, help="python that makes the environment")
    parser.add_argument("--bergson", metavar="PYTHON", help="python of an environment with bergson 0.26.1")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds in all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check.json")
    options = parser.parse_args(arguments)
    asked = [name for name in (*options.skip.split(","), *options.only.split(",")) if name]
    if unknown := [name for name in asked if name not in LIMITS]:
        parser.error(f"there is no stage {unknown[0]!r}; stages: {', '.join(LIMITS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 0 if all that ran went well, else 1."""
    options = parse(arguments)
    folder = ROOT / "build" / "gpu-check"
    folder.mkdir(parents=True, exist_ok=True)
    python, making = install(options, folder)
    skipped = set(options.skip.split(","))
    wanted = [name for name in LIMITS if name not in skipped and (not options.only or name in options.only.split(","))]
    if options.python:
        python = options.python
        wanted = [name for name in wanted if name != "install"]
    began = time.monotonic()
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": options.device, "machine": platform.machine(), "limit": options.limit,
        "free_gb": round(shutil.disk_usage(folder).free / 1e9, 1), "stages": {},
    }  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "DPG_TEST_DEVICE": options.device,
        "PYTHONPATH": os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH", "")) if part),
    }  # fmt: skip
    well = True
    for name in wanted:
        left = options.limit - (time.monotonic() - began)
        if left < LEAST:
            found["stages"][name] = {"ended": "not begun: no time was left"}
            write(options.out, found)
            continue
        seconds = min(LIMITS[name], left)
        print(f"== {name}: at most {seconds:.0f} s", flush=True)
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "stage.json"
            command = making if name == "install" else commands(name, options, python, out)
            code, took = watched(command, seconds, environment)
            ended = "stopped at its limit" if code is None else "done" if code == 0 else f"failed, exit code {code}"
            found["stages"][name] = {"ended": ended, "seconds": round(took, 1), "figures": figures(name, out)}
        found["seconds"] = round(time.monotonic() - began, 1)
        write(options.out, found)
        well &= code == 0
        print(f"== {name}: {ended}, {took:.0f} s", flush=True)
        if name == "install" and code != 0:
            break  # nothing else can run
    print(options.out)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
