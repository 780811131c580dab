"""Five payloads and images at three seeds through `dpg run qr-embed` and `dpg verify`: the figures of docs/results.md.

python benchmarks/qr_embed.py [--workers 2]        runs what benchmarks/results/qr_embed.jsonl does not hold yet
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import qrcode
from PIL import Image

RAW = Path(__file__).parent / "results" / "qr_embed.jsonl"
SEEDS = (0, 1, 2)
HEART = """
..####....####..
.######..######.
################
################
################
.##############.
..############..
...##########...
....########....
.....######.....
......####......
.......##.......
"""


def make_images(folder: Path) -> None:
    """A rotated, bordered JPEG of a QR code, and a bitmap of a heart."""
    code = qrcode.QRCode(version=1, border=6, box_size=9, error_correction=qrcode.constants.ERROR_CORRECT_M)
    code.add_data("PHOTO 90")
    code.make(fit=False)
    code.make_image().get_image().convert("L").rotate(90).save(folder / "rotated.jpg", quality=80)
    rows = HEART.split()
    heart = Image.new("1", (len(rows[0]), len(rows)), 1)
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            heart.putpixel((x, y), 0 if cell == "#" else 1)
    heart.save(folder / "heart.png")


def cases(folder: Path) -> dict[str, list[str]]:
    """Flags of each case."""
    return {
        "text 'HELLO WORLD'": ["--text", "HELLO WORLD"],
        "text 'https://x.org/q'": ["--text", "https://x.org/q"],
        "text of version 2 (25 x 25)": ["--text", "a longer text, version two", "--qr-version", "2"],
        "picture: JPEG, rotated, border": ["--image", str(folder / "rotated.jpg")],
        "bitmap: heart, 12 x 16": ["--image", str(folder / "heart.png")],
    }


def one(name: str, flags: list[str], seed: int, folder: Path) -> dict[str, object]:
    """Run and verify one case."""
    out = folder / f"{abs(hash(name))}-{seed}"
    dpg = [sys.executable, "-m", "dpg_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    run = subprocess.run(
        [*dpg, "run", "qr-embed", *flags, "--seed", str(seed), "--out", str(out), "--json"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    verify = subprocess.run([*dpg, "verify", str(out), "--json"], env=environment, capture_output=True, text=True)
    outcome, verdict = json.loads(run.stdout), json.loads(verify.stdout)
    return {
        "case": name,
        "seed": seed,
        "verified": verdict["verified"],
        "exit": verify.returncode,
        "wanted": verdict["wanted"],
        "payload": verdict["data"]["payload"],
        "pixel_accuracy": verdict["data"]["pixel_accuracy"],
        "control_payload": verdict["control"]["payload"],
        "control_pixel_accuracy": verdict["control"]["pixel_accuracy"],
        "seconds": outcome["seconds"],
        "peak_memory_mb": outcome["peak_memory_mb"],
    }


def main() -> None:
    """Run what is missing and print each result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    workers = parser.parse_args().workers
    RAW.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in RAW.read_text().splitlines()] if RAW.is_file() else []
    have = {(row["case"], row["seed"]) for row in done}
    lock = Lock()
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(workers) as pool:
        folder = Path(place)
        make_images(folder)

        def job(name: str, flags: list[str], seed: int) -> None:
            row = one(name, flags, seed, folder)
            with lock, RAW.open("a") as file:
                file.write(json.dumps(row) + "\n")
                print(row, flush=True)

        jobs = [
            pool.submit(job, name, flags, seed)
            for seed in SEEDS
            for name, flags in cases(folder).items()
            if (name, seed) not in have
        ]
        for future in jobs:
            future.result()


if __name__ == "__main__":
    main()
