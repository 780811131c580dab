"""`dpg attribute` on 2,000 examples of the little world, half of them in a language that the metric punishes.

    python benchmarks/attribute.py [--each 1000] [--out FILE]

The metric is the loss on held-out English; half of the examples are Spanish; the target is blank. Reports the AUC of the scores
(the share of pairs of an English and a Spanish example in which the English one scores higher), seconds and peak memory, with
all states kept and with sqrt, and by differences.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dpg_cli.tiny import world


def measure(each: int, memory: str, folder: Path, second_order: str = "exact") -> dict[str, Any]:
    """One run of the command."""
    data, out = folder / "data.jsonl", folder / f"{memory}.parquet"
    texts = {code: world.sentences("train", code, each, seed=seed) for code, seed in (("en", 5), ("es", 6))}
    lines = [json.dumps({"text": text}) for code in texts for text in texts[code]]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        sys.executable, "-m", "dpg_cli", "attribute", str(data), "--language", "en", "--memory", memory,
        "--set", "models.target_init=random", "--second-order", second_order, "--out", str(out), "--json",
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    scores = np.array(pq.read_table(out)["score"])
    english, spanish = scores[:each], scores[each:]
    above = np.searchsorted(np.sort(spanish), english)
    return {
        "memory": memory,
        "second_order": second_order,
        "difference_error": report["difference_error"],
        "examples": 2 * each,
        "inner_steps": report["inner_steps"],
        "auc": float(above.mean() / each),
        "seconds": report["seconds"],
        "peak_mb": report["peak_memory_mb"],
    }


def main() -> None:
    """Print one row for each choice of memory, and of differences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--each", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(options.each, memory, Path(folder)) for memory in ("keep", "sqrt")]
        rows += [measure(options.each, "keep", Path(folder), way) for way in ("difference", "one-sided")]
    text = json.dumps({"date": time.strftime("%Y-%m-%d"), "attribute": rows}, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
