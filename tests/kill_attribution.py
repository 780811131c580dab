"""Kill `dpg attribute` of several questions with `--validate`, then `dpg select`, with SIGKILL at random moments; start the same command
again each time, and compare what is left with what was never interrupted. As a script: `python tests/kill_attribution.py --kills 5`; a
short one is part of the tests.

Each attempt is a forked process that has loaded torch already, so that kills fall on the work and not on imports. Where the commands
came to their end before enough kills were done, all is begun anew in another folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dpg_cli.tiny import world

RETRAININGS = 3


def prepare(folder: Path) -> None:
    """Forty rows, and three questions."""
    folder.mkdir()
    rows = [{"text": text} for code in ("en", "es") for text in world.sentences("train", code, 20, seed=3)]
    asked = [{"id": code, "text": world.sentences("eval", code, 1, seed=4)[0]} for code in ("en", "es", "de")]
    for name, lines in (("data", rows), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def commands(folder: Path) -> list[list[str]]:
    """What is run, one after the other."""
    scores = str(folder / "scores.parquet")
    attribute = [
        "attribute", str(folder / "data.jsonl"), "--query", str(folder / "questions.jsonl"), "--out", scores, "--memory",
        "sqrt", "--batch-size", "2", "--at-once", "2", "--validate", str(RETRAININGS), "--lr", "1e-3", "--json",
    ]  # fmt: skip
    return [
        attribute,
        ["select", scores, "--drop", "5", "--query", "es", "--out", str(folder / "kept.jsonl"), "--json"],
    ]


def start(folder: Path, log: Path) -> int:
    """Fork a process that does what is not done yet; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from dpg_cli.cli import main

        for arguments in commands(folder):
            if arguments[0] == "select" and (folder / "kept.jsonl.selection.json").exists():
                continue
            sys.argv = ["dpg", *arguments]
            try:
                main()
            except SystemExit as stop:
                if stop.code:
                    raise
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(folder: Path, log: Path, wait: float) -> int | None:
    """Start, and kill after `wait` seconds; the exit status if it came to its end before, else None."""
    child, begin = start(folder, log), time.monotonic()
    while time.monotonic() - begin < wait:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def contents(folder: Path) -> dict[str, Any]:
    """What must be equal: all files that the commands leave, without their folder's name and without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            found[name] = pq.read_table(path).to_pylist()
        elif name.endswith((".json", ".jsonl")) and "data" not in name:
            plain = data.replace(str(folder).encode(), b"FOLDER").decode()
            found[name] = (
                [_timeless(json.loads(line)) for line in plain.splitlines()]
                if name.endswith("jsonl")
                else _timeless(json.loads(plain))
            )
        else:
            found[name] = data
    return found


def _timeless(value: Any) -> Any:
    """Without seconds and times of files."""
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if "second" not in key and "mtime" not in key}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def kill_and_go_on(place: Path, kills: int, seed: int, say: Any = lambda text: None) -> dict[str, Any]:
    """Kill so many times and compare what is left.

    Returns:
        Figures, and `faults`, which must be empty.
    """
    draw, log = random.Random(seed), place / "log.txt"
    prepare(place / "reference")
    begin = time.monotonic()
    if (status := attempt(place / "reference", log, 1e9)) != 0:
        raise SystemExit(f"the uninterrupted commands ended with {status}: {log.read_text()[-2000:]}")
    span, reference = time.monotonic() - begin, contents(place / "reference")
    say(f"uninterrupted: {span:.1f} s, {len(reference)} files")
    done, number, compared, moments, faults = 0, 0, 0, list[str](), list[str]()
    prepare(folder := place / "run-0")
    while True:
        enough = done >= kills
        status = attempt(folder, log, 1e9 if enough else draw.uniform(0.02, 0.6) * span)
        if status is None:
            done += 1
            files = sorted(path.name for path in folder.iterdir())
            state = (
                "selecting"
                if "scores.parquet.validation.json" in files
                else "validating"
                if "scores.parquet" in files
                else "attributing"
            )
            moments.append(state)
            say(f"kill {done}: {state}")
            continue
        compared += 1
        here = contents(folder)
        if status:
            faults.append(f"run {number} ended with {status}: {log.read_text()[-1000:]}")
        faults += [
            f"run {number}: {name} differs"
            for name in here.keys() | reference.keys()
            if here.get(name) != reference.get(name)
        ]
        say(f"run {number} finished, {len(faults)} faults so far")
        if enough:
            break
        number += 1
        prepare(folder := place / f"run-{number}")
    counts = {state: moments.count(state) for state in dict.fromkeys(moments)}
    seconds = round(time.monotonic() - begin, 1)
    return {"kills": counts, "runs_compared": compared, "files": len(reference), "seconds": seconds, "faults": faults}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    import dpg_cli.attribution.attribute
    import dpg_cli.attribution.validation  # noqa: F401  loaded before the first fork

    with tempfile.TemporaryDirectory() as place:
        figures = kill_and_go_on(Path(place), options.kills, options.seed, lambda text: sys.stderr.write(text + "\n"))
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    raise SystemExit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
