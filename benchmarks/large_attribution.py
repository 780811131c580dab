"""Peak memory of `dpg attribute` and `dpg select` on a million short rows.

    python benchmarks/large_attribution.py [--rows 1000000] [--target tiny] [--memory sqrt] [--out FILE]

Rows are of six words of the embedded world; one epoch in batches of 8,192. By default the target is a transformer of one layer, 16 wide,
with the embedded tokeniser: what rows cost does not depend on the target, and `--target tiny` takes the embedded model instead, which
takes about forty times as long. Each command runs in a process of its own; its memory is the system's count of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a script finds only what lies beside it

WORDS = (
    "the",
    "small",
    "dog",
    "buys",
    "a",
    "hat",
    "old",
    "cat",
    "green",
    "garden",
    "house",
    "letter",
    "woman",
    "today",
)
BATCH = 8192


def write_rows(path: Path, rows: int) -> None:
    """JSON lines of six words each."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps({"id": number, "text": " ".join(draw.choices(WORDS, k=6))}) + "\n")


def write_target(path: Path) -> None:
    """A transformer of one layer, 16 wide, with the embedded tokeniser."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from dpg_cli.tiny import MODEL_DIR

    torch.manual_seed(0)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR)
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=eos, eos_token_id=eos
    )
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


def measured(*arguments: object) -> dict[str, float]:
    """A command of ours: seconds, and the most memory that it held, in MB."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, "-m", "dpg_cli", *map(str, arguments)], stdout=said, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise RuntimeError(said.read().decode()[-2000:])
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024}


def measure(folder: Path, rows: int, target: str, memory: str) -> dict[str, Any]:
    """Both commands on so many rows."""
    data, scores = folder / f"{rows}.jsonl", folder / f"{rows}.parquet"
    write_rows(data, rows)
    if not target:
        write_target(folder / "target")
    found: dict[str, Any] = {"rows": rows, "target": target or "one layer, 16 wide", "memory": memory}
    found["attribute"] = measured(
        "attribute", data, "--target", target or folder / "target", "--language", "es", "--batch-size", BATCH,
        "--memory", memory, "--out", scores, "--overwrite", "--json",
    )  # fmt: skip
    found["select"] = measured("select", scores, "--drop", rows // 10, "--out", folder / f"kept-{rows}.jsonl", "--json")
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--target", default="")
    parser.add_argument("--memory", default="sqrt", choices=("sqrt", "keep", "offload"))
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for rows in options.rows:
            found.append(measure(Path(folder), rows, options.target, options.memory))
            print(json.dumps(found[-1]), flush=True)
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "runs": found}, indent=1)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
