"""Kill a small real run with SIGKILL at random moments, resume it each time, and compare what it leaves with an
uninterrupted run's. Run it as a script: `python tests/kill_resume.py --kills 50`; a short one is part of the tests.

Moments are of three kinds: any moment of the run; while a checkpoint is being written (its temporary folder exists); and
while any other file is (a temporary name exists anywhere in the run folder). A run that comes to its end is compared
with the uninterrupted one and begun anew until enough kills are done. Each attempt is a forked process: it has loaded
torch already, so that kills fall on the run and not on imports.
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
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

SETTINGS = [
    "pattern-67", "--set", "steps=8", "--set", "prompts.per_step=4", "--set", "inner.batch_size=8", "--set",
    "policy.minibatch=8", "--set", "rollout.max_tokens=16", "--set", "rollout.min_tokens=2", "--set",
    "dataset.examples=24", "--set", "checkpoint.every_steps=1", "--seed", "5",
]  # fmt: skip
KINDS = ("any moment", "checkpoint", "any file")


def start(folder: Path, log: Path) -> int:
    """Fork a process that begins the run, or goes on with it; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.argv = ["dpg", "run", *SETTINGS, "--out", str(folder), "--resume"]
        from dpg_cli.cli import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit status of a process, or None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def writes(folder: Path, kind: str) -> bool:
    """Whether a temporary of that kind exists at this moment."""
    places = (folder / "checkpoints",) if kind == "checkpoint" else (folder, folder / "dataset")
    for place in places:
        try:
            with os.scandir(place) as entries:
                if any(entry.name.endswith(".tmp") for entry in entries):
                    return True
        except OSError:
            continue
    return False


def attempt(folder: Path, log: Path, kind: str, wait: float, linger: float) -> int | None:
    """Start the run and kill it: after `wait` seconds, then, unless for any moment, as soon as something is written.

    Returns:
        The exit status if it came to its end before, else None.
    """
    child = start(folder, log)
    begin = time.monotonic()
    while time.monotonic() - begin < wait or not (kind == KINDS[0] or writes(folder, kind)):
        if (status := ended(child)) is not None:
            return status
        time.sleep(0.0005)
    time.sleep(linger)
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def contents(folder: Path) -> dict[str, Any]:
    """All files of a finished run as what must be equal: bytes, or JSON without times and without the run's history."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            lines = map(json.loads, path.read_text().splitlines())
            found[name] = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
        elif name == "run.json":
            info = json.loads(path.read_text())
            found[name] = {key: info[key] for key in ("task", "seed", "effect", "finished", "measures", "control")}
        elif name == "report.html":
            found[name] = page(folder)
        elif path.name == "state.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k != "metrics_bytes"}
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def page(folder: Path) -> tuple[bool, str]:
    """Whether the page is that of the folder as it is, and the page without place, command and times."""
    from dpg_cli.report.gather import gather
    from dpg_cli.report.page import render_page
    from dpg_cli.runs.folder import RunFolder

    facts = gather(RunFolder(folder))
    same = (folder / "report.html").read_text(encoding="utf-8") == render_page(facts)
    info = {key: facts.info[key] for key in ("effect", "finished", "measures", "control")}
    rows = [{key: value for key, value in row.items() if not key.startswith("seconds")} for row in facts.rows]
    return same, render_page(replace(facts, name="run", path="run", command="", info=info, rows=rows))


def unequal(folder: Path, reference: dict[str, Any]) -> list[str]:
    """The files that differ from the reference's, are missing, or are too many."""
    here = contents(folder)
    return [name for name in sorted(here.keys() | reference.keys()) if here.get(name) != reference.get(name)]


def kill_and_resume(place: Path, kills: int, seed: int, say: Any = lambda text: None) -> dict[str, Any]:
    """Kill runs in `place` so many times and compare those that finish.

    Returns:
        Figures: kills by kind, those that left a temporary, runs that were compared, steps redone, files compared, and
        `faults`, which must be empty.
    """
    draw = random.Random(seed)
    begin = time.monotonic()
    log = place / "log.txt"
    child = start(place / "reference", log)
    while (status := ended(child)) is None:
        time.sleep(0.01)
    if status:
        raise SystemExit(f"the uninterrupted run ended with {status}: {log.read_text()}")
    span = time.monotonic() - begin
    reference = contents(place / "reference")
    say(f"uninterrupted run: {span:.1f} s, {len(reference)} files")

    count: Counter[str] = Counter()
    left, compared, sessions, lost = 0, 0, 0, 0
    faults: list[str] = []
    number = 0
    while True:
        folder = place / f"run-{number}"
        enough = sum(count.values()) >= kills
        kind = "none" if enough else draw.choice(KINDS)
        wait = 1e9 if enough else draw.uniform(0, span)
        status = attempt(folder, log, KINDS[0] if enough else kind, wait, draw.choice((0.0, draw.uniform(0, 0.02))))
        if status is None:
            count[kind] += 1
            left += writes(folder, "checkpoint") or writes(folder, "any file")
            say(f"kill {sum(count.values())}: {kind}, after {wait:.2f} s, checkpoints {names(folder)}")
            continue
        if status:
            faults.append(f"run {number} ended with {status}: {log.read_text()[-500:]}")
            number += 1
        else:
            compared += 1
            number += 1
            faults += [f"run {number - 1}: {name} differs" for name in unequal(folder, reference)]
            history = json.loads((folder / "run.json").read_text())["sessions"]
            sessions += len(history)
            lost += sum(session.get("steps_lost", 0) for session in history)
            say(f"run {number - 1} finished after {len(history)} sessions, {len(faults)} faults so far")
        if enough:
            break
    return {
        "kills": dict(count),
        "left_a_temporary": left,
        "runs_compared": compared,
        "files_compared": compared * len(reference),
        "sessions": sessions,
        "steps_done_again": lost,
        "seconds": round(time.monotonic() - begin, 1),
        "faults": faults,
    }


def names(folder: Path) -> list[str]:
    """The checkpoints that a folder holds."""
    return sorted(path.name for path in folder.glob("checkpoints/*"))


def main() -> None:
    """Parse, kill, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import dpg_cli.driver.execute  # noqa: F401  loaded once, before the forks

    with tempfile.TemporaryDirectory() as place:
        figures = kill_and_resume(Path(place), arguments.kills, arguments.seed, lambda t: sys.stderr.write(t + "\n"))
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")
    sys.exit(bool(figures["faults"]))


if __name__ == "__main__":
    main()
