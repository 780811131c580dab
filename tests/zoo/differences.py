"""`python -m tests.zoo.differences [--out FILE] [NAME ...]`: differences of ordinary passes against the exact credits, in float32.

Every architecture of the table (untied where its head can be), as tiny as `tiny.py` has it: 64 rows of 12 tokens, four steps of
AdamW. Of either kind of differences: the relative error of token credits, the rank correlation of examples', and what the engine
said that the error is. A row that is refused has the refusal instead. `float32` is how far the exact credits in float32 are from those
in float64: where that is large, the run itself is chaotic at these sizes, and no figure means much.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, metagradient
from dpg_cli.engine.reverse.choice import SecondOrder
from dpg_cli.errors import DpgError

from .judge import HeldOut
from .table import FAMILIES, Row
from .tiny import PAD, VOCAB, tiny_model

ROWS, LENGTH, BATCH = 64, 12, 16
SPEC = OptimizerSpec("adamw", lr=0.01, beta1=0.8, beta2=0.95, eps=0.03, weight_decay=0.1)
WAYS: tuple[SecondOrder, ...] = ("difference", "one-sided")


def random_rows(count: int, seed: int) -> Examples:
    """Rows of random tokens without the padding token."""
    ids = torch.randint(3, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    return Examples.from_sequences(ids.tolist(), pad_id=PAD)


def distance(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error."""
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def ranks(values: torch.Tensor) -> torch.Tensor:
    """The rank of each."""
    return values.argsort().argsort().double()


def compared(row: Row) -> list[dict[str, Any]]:
    """The two ways on one architecture."""
    tied = row.tied[-1]
    examples, metric = random_rows(ROWS, 1), HeldOut(random_rows(8, 2))

    def credits(way: SecondOrder, dtype: torch.dtype = torch.float32) -> Metagradient:
        model = tiny_model(row.model_type, tie_word_embeddings=tied, **row.options).to(dtype)
        return metagradient(model, examples, SPEC, metric, batch_size=BATCH, second_order=way)

    exact, rounded = credits("exact"), None
    with contextlib.suppress(RuntimeError):  # a model that computes in float32 within
        rounded = distance(exact.token_N_S, credits("exact", torch.float64).token_N_S)
    found = []
    for way in WAYS:
        line: dict[str, Any] = {"model_type": row.model_type, "tied": tied, "way": way, "float32": rounded}
        start = time.perf_counter()
        try:
            ours = credits(way)
        except DpgError as error:
            found.append({**line, "refused": error.cause})
            continue
        both = torch.stack([ranks(each.example_N) for each in (ours, exact)])
        found.append(
            {
                **line,
                "error": distance(ours.token_N_S, exact.token_N_S),
                "said": float(ours.stats["difference_error"]),
                "rank_correlation": float(torch.corrcoef(both)[0, 1]),
                "seconds": time.perf_counter() - start,
            }
        )
    return found


def main() -> None:
    """All rows, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    table = [row for rows in FAMILIES.values() for row in rows if not row.refused]
    lines: list[dict[str, Any]] = []
    for row in table:
        if options.names and row.model_type not in options.names:
            continue
        try:
            found = compared(row)
        except DpgError as error:
            found = [{"model_type": row.model_type, "way": "exact", "refused": error.cause}]
        lines += found
        for line in found:
            said = line.get("refused") or (
                f"error {line['error']:.1e}, said {line['said']:.1e} ({line['said'] / max(line['error'], 1e-12):.1f} times), "
                f"rank correlation {line['rank_correlation']:.5f}"
            )
            print(f"{line['model_type']}, {line['way']}: {said}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"rows": ROWS, "tokens": LENGTH, "architectures": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
