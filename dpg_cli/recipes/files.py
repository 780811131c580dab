"""The file of a recipe: YAML or JSON, whose it is, and why a pickle is not opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from dpg_cli.errors import UsageError
from dpg_cli.recipes import axolotl, torchtune, trl
from dpg_cli.recipes.reader import Understood
from dpg_cli.settings.config import DEEPEST, depth

LARGEST = 1_000_000  # bytes
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle")
SAVE = "Write it as JSON where the training runs: pathlib.Path('recipe.json').write_text(trainer.args.to_json_string())"
FORMATS = (torchtune, axolotl, trl)  # in the order in which they are told apart


def read_recipe(path: Path) -> Understood:
    """A recipe in our settings.

    Raises:
        UsageError: if it cannot be read, or is a pickle: opening one runs its code.
        ConfigError: with a line for everything in it that would change the numbers and that we cannot follow.
    """
    data = load(path)
    for form in FORMATS:
        if form.fits(data):
            return form.read(data)
    raise UsageError(
        f"{path} is no recipe of TRL, the transformers Trainer, axolotl or torchtune: it has none of their keys.",
        "See docs/recipes.md.",
    )


def load(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file.

    Raises:
        UsageError: if it is no such file.
    """
    try:
        with path.open("rb") as file:
            head = file.read(LARGEST + 1)
    except OSError as error:
        raise UsageError(f"The recipe {path} cannot be read: {error.strerror}.", "Check the path.") from None
    if path.suffix in PICKLES or head[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise UsageError(f"{path} is a pickle: opening it would run code in it.", SAVE)
    if len(head) > LARGEST:
        raise UsageError(f"{path} is larger than 1 MB and cannot be a recipe.", "Name a YAML or JSON file.")
    try:
        text = head.decode("utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UsageError(f"{path} is neither YAML nor JSON: {reason}.", "Correct that line.") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data) or depth(data) > DEEPEST:
        raise UsageError(f"{path} holds no table of settings.", "Name the recipe of a training.")
    return data
