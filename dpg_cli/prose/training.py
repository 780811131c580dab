"""Rows of prose and the loop that trains a model on them: next-token loss on all tokens, AdamW, warm-up and cosine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpg_cli.prose.source import Chapter

ROW_LENGTHS = (64, 128)  # tokens predicted in a row; steps take turns
BETAS, WEIGHT_DECAY, CLIP, WARMUP = (0.9, 0.98), 0.05, 1.0, 100
_REPORT = 250  # steps between two lines of progress


@dataclass(frozen=True)
class Recipe:
    """What differs from model to model.

    Attributes:
        steps: optimiser steps.
        batch: tokens a step.
        learning_rate: after warm-up; falls to zero as a cosine.
        seed: of the weights and of the rows' order.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int


class Rows:
    """Rows of training: from the start of any verse on to the end of its chapter or of the row.

    A row opens with end-of-text, as beginning of sequence, and so does a completion without a prompt. Where the chapter
    ends within the row, end-of-text closes it.

    Args:
        parts: the chapters to take rows from.
        tokenizer: encodes them, verse by verse.
    """

    def __init__(self, parts: Sequence[Chapter], tokenizer: PreTrainedTokenizerFast) -> None:
        self.eos = int(tokenizer.eos_token_id)
        self.opening: list[list[int]] = []  # end-of-text and the verse as the first of its row, by verse
        self.rest: list[tuple[int, int]] = []  # where in `stream` the chapter goes on after the verse, and ends
        stream: list[int] = []
        for part in parts:
            first = tokenizer(list(part.verses))["input_ids"]
            follows = tokenizer([f" {verse}" for verse in part.verses])["input_ids"]
            ends = np.cumsum([len(ids) for ids in follows]) + len(stream)
            stream.extend(token for ids in follows for token in ids)
            stream.append(self.eos)
            self.opening.extend([self.eos, *ids] for ids in first)
            self.rest.extend((int(end), len(stream)) for end in ends)
        self.stream = np.array(stream, dtype=np.int64)

    def __len__(self) -> int:
        """Verses that a row can start from."""
        return len(self.opening)

    def take(self, verses: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that start at some verses.

        Args:
            verses: where they start.
            length: S, tokens predicted in a row.

        Returns:
            Input ids and labels, both (rows, S) int64; a label is -100 after the chapter's end.
        """
        ids = np.full((len(verses), length + 1), self.eos, dtype=np.int64)
        labels = np.full((len(verses), length), -100, dtype=np.int64)
        for row, verse in enumerate(verses):
            start, end = self.rest[verse]
            opening = self.opening[verse]
            tokens = np.concatenate([opening, self.stream[start : min(end, start + length)]])[: length + 1]
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens) - 1] = tokens[1:]
        return torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(labels)


def train(
    model: PreTrainedModel, rows: Rows, recipe: Recipe, report: Callable[[str], None] = lambda line: None
) -> float:
    """Train a model on rows drawn from all verses, each verse once before any comes again.

    Args:
        model: changed in place; its dropout must be zero.
        rows: what it learns from.
        recipe: how.
        report: is given a line of progress now and then.

    Returns:
        Minutes of processor time that it took.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=BETAS)
    warmup = min(WARMUP, max(recipe.steps // 10, 1))
    up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup)
    down = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(recipe.steps - warmup, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], milestones=[warmup])
    rng = np.random.default_rng(recipe.seed)
    order: list[int] = []
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # rows are short: the fused kernel takes half as long again in bfloat16
    model.train()
    start, used, losses = time.monotonic(), time.process_time(), []
    for step in range(recipe.steps):
        length = ROW_LENGTHS[step % len(ROW_LENGTHS)]
        count = max(recipe.batch // length, 1)
        while len(order) < count:
            order.extend(rng.permutation(len(rows)).tolist())
        chosen, order = order[:count], order[count:]
        ids, labels = rows.take(chosen, length)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % _REPORT == 0 or step + 1 == recipe.steps:
            recent = sum(losses[-_REPORT:]) / len(losses[-_REPORT:])
            report(f"step {step + 1:5d}  loss {recent:.4f}  {time.monotonic() - start:.0f} s")
    model.set_attn_implementation(attention)
    model.eval()
    return (time.process_time() - used) / 60
