"""Recipes of other trainers, read as settings of ours: TRL and the transformers Trainer, axolotl, torchtune.

One file a format; `reader.py` is what they share, `files.py` tells them apart. Nothing is unpickled. Not here: what the
settings mean (`settings/inner.py`), nor how they are trained (`engine/inner/recipe/`).
"""

from dpg_cli.recipes.files import read_recipe
from dpg_cli.recipes.reader import Understood

__all__ = ["Understood", "read_recipe"]
