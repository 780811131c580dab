"""Peak resident memory of our metagradient on the workloads of `metagradient.py`, each in a process of its own.

python benchmarks/peaks.py [--workloads W1,T1,W3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from memory import predicted_mb
from metagradient import WORKLOADS, peak_bytes


def main() -> None:
    """Print one row for each workload."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workloads", default="W1,T1,W3")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    rows = []
    for name in options.workloads.split(","):
        peak, _ = peak_bytes(name, "ours")
        row = {"workload": name, "ours_peak_mb": peak / 1e6, "predicted_mb": predicted_mb(WORKLOADS[name], "keep")}
        rows.append(row)
        text = json.dumps({"date": time.strftime("%Y-%m-%d"), "rows": rows}, indent=2)
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
