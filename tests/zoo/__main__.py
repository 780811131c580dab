"""`python -m tests.zoo NAME [key=value ...]`: judge a model type that the table lacks, and print its row."""

from __future__ import annotations

import ast
import os
import sys
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

from dpg_cli.errors import DpgError

from .judge import SGD, judge
from .table import FAMILIES
from .tiny import tiny_model


def main(arguments: list[str]) -> int:
    """Judge one model type, tied and untied.

    Returns:
        0 where every number is right, or refused; 1 where one is wrong, or the tiny model cannot be made.
    """
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        print("In the table:", ", ".join(sorted({row.model_type for rows in FAMILIES.values() for row in rows})))
        return 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    name, *pairs = arguments
    options = {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    shown = f", {options}" if options else ""
    ways, notes, worst = [], "", 0.0
    for tied in (True, False):
        try:
            model = tiny_model(name, tie_word_embeddings=tied, **options)
        except Exception as error:  # whatever a configuration raises
            print(f"No tiny {name} by the usual sizes: {type(error).__name__}: {str(error).strip()[:400]}")
            print("Set what it needs: python -m tests.zoo NAME key=value ...")
            return 1
        if tied and not _is_tied(model):
            print(f"{name}: its head cannot be tied")
            continue
        try:
            verdicts = [judge(model, full=True), judge(model, SGD, full=True)]
        except DpgError as error:
            print(f'Refused: {error}\n    Row("{name}", "...{shown}", refused="{error.cause[:60]}"),')
            return 0
        error = max(verdict.error for verdict in verdicts)
        worst, notes = max(worst, error), " ".join(verdicts[0].notes)
        ways.append(tied)
        print(
            f"{name}, {'tied' if tied else 'untied'}: error {error:.1e}, |Φ - Φ stock| {verdicts[0].phi:.0e}. {notes}"
        )
    tail = "" if ways == [True, False] else f", tied={tuple(ways)}"
    note = f", notes={notes[:22]!r}" if notes else ""
    print(f'    Row("{name}", "what is special about it"{shown}{tail}{note}),')
    return 0 if worst < 1e-6 else 1


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _is_tied(model: nn.Module) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
