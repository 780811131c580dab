"""Make the lists that are shipped beside the models: prompts of both splits, held-out passages."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from pathlib import Path

from dpg_cli.prose.source import Chapter, passages, unseen

TRAIN_PROMPTS, EVAL_PROMPTS = 4096, 512
WORDS = (4, 10)  # of a prompt, least and most
PASSAGE = 200  # characters of a held-out passage, at least


def write_texts(parts: Sequence[Chapter], out: Path, seed: int) -> None:
    """Write the lists, a text a line, gzipped without a time stamp: the same text gives the same bytes.

    Args:
        parts: all chapters.
        out: folder to write; made if missing.
        seed: of the order, and of the lengths of the prompts.
    """
    training = [part for part in parts if part.split == "train"]
    held_out = [part for part in parts if part.split == "eval"]
    out.mkdir(parents=True, exist_ok=True)
    train = make_prompts(training, seed)
    _write(out / "prompts-train.txt.gz", train[:TRAIN_PROMPTS])
    known = set(train)
    _write(
        out / "prompts-eval.txt.gz", [text for text in make_prompts(held_out, seed) if text not in known][:EVAL_PROMPTS]
    )
    _write(out / "heldout.txt.gz", held_out_passages(parts, seed))


def make_prompts(parts: Sequence[Chapter], seed: int) -> list[str]:
    """Beginnings of the chapters' verses, each once, shuffled; none is a whole verse."""
    rng = random.Random(f"prompts of prose {seed}")
    found: dict[str, None] = {}
    for part in parts:
        for verse in part.verses:
            words = verse.split(" ")
            length = rng.randint(*WORDS)
            if len(words) > length:
                found[" ".join(words[:length])] = None
    texts = list(found)
    rng.shuffle(texts)
    return texts


def held_out_passages(parts: Sequence[Chapter], seed: int) -> list[str]:
    """Passages of the held-out chapters that no training chapter tells in the same words, shuffled."""
    training = [part for part in parts if part.split == "train"]
    texts = unseen(list(passages([part for part in parts if part.split == "eval"], PASSAGE)), training)
    random.Random(f"held-out prose {seed}").shuffle(texts)
    return texts


def _write(path: Path, texts: Sequence[str]) -> None:
    """A text a line, gzipped."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        file.write("".join(f"{text}\n" for text in texts).encode())
