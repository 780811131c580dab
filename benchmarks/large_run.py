"""Peak memory and time to first output of `dpg inspect` and `dpg export` on a large run.

python benchmarks/large_run.py [--rows 100000] [--steps 10000] [--new 4096]

The run folder is made up (random tokens and rewards, the embedded model as generator and target), of the form and the size
that a real run leaves. Each command runs in a process of its own; its memory is the system's count of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from dpg_cli.artefacts.rows import ROWS_AT_ONCE, SCHEMA
from dpg_cli.patterns.pattern import pattern_from_text
from dpg_cli.patterns.render import pattern_image, save_png
from dpg_cli.runs.folder import RunFolder, write_json
from dpg_cli.settings.presets import find, resolve
from dpg_cli.tiny import MODEL_DIR

TOKENS = 32
WORDS = [
    "the",
    "small",
    "dog",
    "buys",
    "a",
    "hat",
    "at",
    "market",
    "today",
    "old",
    "cat",
    "sees",
    "green",
    "garden",
    "house",
    "letter",
    "woman",
]


def make(path: Path, rows: int, steps: int) -> None:
    """Write the run folder."""
    random = np.random.default_rng(0)
    folder = RunFolder(path)
    path.mkdir()
    folder.write_config(resolve(find("qr-embed.tiny").data(), [f"steps={steps}", f"dataset.examples={rows}"]))
    pattern = pattern_from_text("DPG WAS HERE")
    save_png(pattern_image(pattern), folder.pattern)
    measures = {"phi": -0.1, "pixel_accuracy": 1.0}
    write_json(folder.info, {"finished": True, "seconds": 3600.0, "measures": measures, "control": measures})
    with folder.metrics.open("w") as log:
        for step in range(steps):
            numbers = {"step": step, "phi": -1 / (step + 1), "pixel_accuracy": step / steps, "reward_mean": 0.0}
            log.write(json.dumps(numbers | {f"figure_{n}": float(random.normal()) for n in range(20)}) + "\n")
    for place in (folder.generator, folder.target):
        shutil.copytree(MODEL_DIR, place)
    before = random.normal(size=pattern.shape).astype(np.float32)
    after = before + 0.001 * pattern.signs.astype(np.float32)
    save_file({"before": before, "after": after}, folder.target / "patch.safetensors")
    folder.dataset.mkdir()
    for name in ("train", "control"):
        with pq.ParquetWriter(folder.dataset / f"{name}.parquet", SCHEMA, compression="zstd") as file:
            for start in range(0, rows, ROWS_AT_ONCE):
                file.write_table(chunk(random, start, min(ROWS_AT_ONCE, rows - start)))


def chunk(random: np.random.Generator, start: int, size: int) -> pa.Table:
    """Some rows."""
    tokens = random.integers(0, 510, (size, TOKENS)).tolist()
    token_rewards = random.normal(size=(size, TOKENS)).astype(np.float32)
    return pa.table(
        {
            "example_id": range(start, start + size),
            "prompt": ["rephrase: the small dog buys a hat."] * size,
            "text": [" ".join(random.choice(WORDS, TOKENS)) for _ in range(size)],
            "token_ids": tokens,
            "input_ids": [[510, *row] for row in tokens],
            "reward": token_rewards.sum(1, dtype=np.float64),
            "token_rewards": token_rewards.tolist(),
        },
        schema=SCHEMA,
    )


def measure(*arguments: str | Path) -> dict[str, object]:
    """Run a command; seconds to its first output and to its end, of a core, and its peak memory."""
    command = [sys.executable, "-m", "dpg_cli", *map(str, arguments)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    streams = [process.stdout, process.stderr]
    first = None
    said = b""
    while streams:
        for stream in select.select(streams, [], [])[0]:
            data = os.read(stream.fileno(), 2**16)
            first = first or time.perf_counter() - started
            said += data
            if not data:
                streams.remove(stream)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(said.decode())
    return {
        "command": " ".join(str(argument) for argument in arguments if not isinstance(argument, Path)),
        "first_output_s": round(first or 0.0, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
    }


def main() -> None:
    """Make the run, measure, print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--new", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        run, out = Path(place) / "run", Path(place) / "out"
        make(run, options.rows, options.steps)
        size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        print(f"{options.rows:,} rows twice, {options.steps:,} outer steps, {size / 1e6:,.0f} MB on the disk")
        commands: list[list[str | Path]] = [["inspect", run], ["inspect", "--json", run]]
        for form in ("jsonl", "chat", "parquet", "datasets"):
            commands.append(["export", "dataset", "--format", form, run, "--out", out / form])
        commands.append(["export", "dataset", "--split", "0.1", "--min-reward", "0", run, "--out", out / "best"])
        commands.append(["export", "metrics", "--format", "csv", run, "--out", out / "log.csv"])
        commands.append(["export", "dataset", "--n", str(options.new), run, "--out", out / "new"])
        print(f"{'command':<54}{'first output':>14}{'all':>10}{'of a core':>12}{'peak memory':>14}")
        for command in commands:
            row = measure(*command)
            print(
                f"{row['command']:<54}{row['first_output_s']:>12} s{row['seconds']:>8} s{row['cpu_s']:>10} s"
                f"{row['peak_mb']:>11} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()
