"""Peak memory of the metagradient, predicted from sizes, and refused with advice where the machine has less.

With n parameters, T inner steps and segments of K = ⌈√T⌉ steps, the vectors of n numbers that live at once are (the model
itself, θ_T and the adjoints included; counted in `metagrad.reverse`):

    keep  4T (5 for T = 1)        sqrt  3 ⌈T/K⌉ + 4K + 4        offload  9

and for each further metric of the same walk (*query*) three of adjoints; with several, one more, and products of one step.

Activations: of one micro-batch in the second-order pass, about 40 hidden vectors a token and layer, and 3 rows of attention
scores where rows are short or the target's attention is its own (`engine/inner/attention/`); or by differences about 20
hidden vectors, and five more vectors of n numbers; of the tokens that the metric reads at once, about 20. Where it reads
several times as many, its gradient is summed in one more vector. The LM head takes a few chunks of logits. `keep` remembers
products of the last steps (`engine/inner/remembered.py`), about 16 hidden vectors a token and layer, up to a limit.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpg_cli.engine.inner.attention.served import LONG, is_same
from dpg_cli.engine.inner.head import chunk_logits
from dpg_cli.engine.inner.remembered import LIMIT
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.reverse.choice import activation_numbers
from dpg_cli.errors import UsageError
from dpg_cli.metrics.text_loss import TOKENS
from dpg_cli.models.loading import LanguageModel

DIFFERENCES = (
    7  # vectors of n numbers: θ at one side, the product and its half, g, and three more where an error is measured
)
BASE_BYTES = 450e6  # resident memory of Python, torch and transformers before any model


@dataclass(frozen=True)
class Need:
    """What an inner run and its reverse pass hold at once.

    Attributes:
        parameters: n.
        element: bytes of a number.
        steps: T.
        states: which states are kept.
        rows, length: of a micro-batch: examples, tokens of each.
        layers, width, heads, vocabulary: of the target.
        batch: rows of an inner batch.
        metric_tokens: that the metric reads.
        queries: Q, of one walk.
        averaged: it reads an average of the weights, whose derivative is kept.
        exact: second order by the dual pass; else by differences.
        matrices: the target's attention is its own, and keeps its scores.
    """

    parameters: int
    element: int
    steps: int
    states: Memory
    rows: int
    length: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    metric_tokens: int = 0
    queries: int = 1
    averaged: bool = False
    exact: bool = True
    matrices: bool = False

    @classmethod
    def of(
        cls, target: LanguageModel, steps: int, rows: int, length: int, states: Memory, batch: int, metric_tokens: int
    ) -> Need:
        """The need of a target's run."""
        config, (vocabulary, width) = target.model.config, target.head.shape
        return cls(
            parameters=target.trained_count,
            element=target.head.element_size(),
            steps=steps,
            states=states,
            rows=rows,
            length=length,
            layers=getattr(config, "num_hidden_layers", 12),
            width=width,
            heads=getattr(config, "num_attention_heads", 12),
            vocabulary=vocabulary,
            batch=batch,
            metric_tokens=metric_tokens,
            matrices=length >= LONG and not is_same(target.model),
        )

    @property
    def vectors(self) -> int:
        """Vectors of n numbers at the peak."""
        segment = math.isqrt(max(0, self.steps - 1)) + 1
        kept = {
            "keep": max(5, 4 * self.steps),
            "sqrt": 3 * -(-self.steps // segment) + 4 * segment + 4,
            "offload": 9,
        }
        more = 3 * self.queries - 2 if self.queries > 1 else 0
        return min(kept[self.states], kept["keep"]) + more + self.averaged * self.queries

    @property
    def bytes(self) -> float:
        """The peak, without what Python and its libraries take."""
        dual = activation_numbers(
            self.rows * self.length, self.length, self.layers, self.width, self.heads, self.exact, self.matrices
        )
        activations = max(dual, 20 * min(TOKENS, self.metric_tokens) * self.layers * self.width)
        logits = 5 * min(chunk_logits(self.vocabulary), self.rows * self.length * self.vocabulary)
        vectors = self.vectors + (self.metric_tokens > TOKENS) + (0 if self.exact else DIFFERENCES)
        numbers = vectors * self.parameters + activations + logits
        steps = max(self.remembered_steps, int(self.queries > 1 and self.exact))
        return numbers * self.element + min(LIMIT, steps * self._products)

    @property
    def _products(self) -> float:
        """Bytes of a step's remembered products."""
        return 16.0 * self.batch * self.length * self.layers * self.width * self.element

    @property
    def remembered_steps(self) -> int:
        """How many of the last steps keep products for their dual pass."""
        kept = self.states == "keep" and self.exact
        return min(self.steps, -(-LIMIT // max(1, int(self._products)))) if kept else 0


def machine_bytes(device: torch.device) -> float:
    """Memory of the device: of the accelerator, or of the machine as far as a control group lets it be used."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, float(Path(name).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return total


def peak_bytes(need: Need, device: torch.device, other: float = 0.0) -> float:
    """The peak with what Python and its libraries take, and `other` bytes besides."""
    return (BASE_BYTES if device.type == "cpu" else 0.0) + need.bytes + other


def widest(need: Need, queries: int, device: torch.device, other: float = 0.0) -> int:
    """How many of Q metrics are walked at once, so that it fits: in as few, equal groups as can be; 1 if none fits."""
    for groups in range(1, queries + 1):
        width = -(-queries // groups)
        if peak_bytes(replace(need, queries=width), device, other) <= machine_bytes(device):
            return width
    return 1


def check_memory(need: Need, device: torch.device, *, states_flag: str, rows_flag: str, other: float = 0.0) -> None:
    """Refuse what will not fit.

    Args:
        need: of the inner run.
        device: where it runs.
        states_flag, rows_flag: what the user would type to choose the states and the micro-batch.
        other: bytes besides, such as the generator's.

    Raises:
        UsageError: with the cheapest change that would fit, if there is one.
    """
    base = BASE_BYTES if device.type == "cpu" else 0.0
    limit = machine_bytes(device)
    peak = base + need.bytes + other
    if peak <= limit:
        return
    advice = "Take a smaller target, or a machine with more memory."
    for states in ("sqrt", "offload"):
        for rows in (need.rows, 1):
            changed = replace(need, states=states, rows=rows)
            if changed.vectors <= need.vectors and base + changed.bytes + other <= limit:
                smaller = f" and {rows_flag}1" if rows != need.rows else ""
                choice = f"{states_flag}{states}{smaller}" if states != need.states else f"{rows_flag}1"
                raise UsageError(
                    _refused(peak, limit, need), f"{choice} takes {(base + changed.bytes + other) / 1e9:.1f} GB."
                )
    raise UsageError(_refused(peak, limit, need), advice)


def _refused(peak: float, limit: float, need: Need) -> str:
    return (
        f"This needs about {peak / 1e9:.1f} GB of memory and the machine has {limit / 1e9:.1f}: "
        f"{need.vectors} vectors of {need.parameters:,} numbers for {need.steps} inner steps."
    )
