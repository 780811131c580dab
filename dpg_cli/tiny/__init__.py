"""The embedded default: a small closed world of sentences, and a tiny language model pretrained on it.

`world` makes and recognises the sentences, `pretrain` is the script that made everything in `MODEL_DIR`.

Not here: what uses them. Imports nothing of ours but `errors`.
"""

from pathlib import Path

MODEL_DIR: Path = Path(__file__).parent / "model"
"""Folder of the shipped model and tokeniser, loadable by `AutoModelForCausalLM` and `AutoTokenizer`."""

__all__ = ["MODEL_DIR"]
