"""Second order exactly or by differences: which of them an inner run takes, and what `auto` goes by.

exact         the dual pass, or the double backward where there is no forward derivative (`selfcheck.py`)
difference    ordinary passes at θ ± ε ḡ (`differences/central.py`), of the model as its user runs it
one-sided     one at θ + ε ḡ, beside the inner run's own (`differences/one_sided.py`): half the passes, an error some ten times
              larger
auto          exact, unless the model is refused there or its activations do not fit in the memory that is free
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dpg_cli.engine.inner.attention.served import is_same
from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.ranks import Ranks
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.differences.uncut import uncut
from dpg_cli.engine.reverse.forms.attention import LONG
from dpg_cli.engine.reverse.selfcheck import Finding, selfcheck
from dpg_cli.errors import BadValueError, UsageError

SecondOrder = Literal["exact", "difference", "one-sided", "auto"]
Taken = Literal["exact", "difference", "one-sided"]
WAYS: tuple[SecondOrder, ...] = ("exact", "difference", "one-sided", "auto")


def check_model(run: TargetRun, examples: Examples, *, need_hvp: bool) -> Finding:
    """The self-check of the passes that this run takes.

    Raises:
        UsageError: if no number of theirs would be right for this model.
    """
    return uncut(run, examples) if run.as_it_runs else selfcheck(run, examples, need_hvp=need_hvp)


def chosen(
    asked: SecondOrder,
    recipe: Recipe,
    model: nn.Module,
    examples: Examples,
    *,
    micro_batch: int,
    batch: int,
    ranks: Ranks,
) -> tuple[Taken, str]:
    """What the run takes, and what `auto` has to say about it.

    Args:
        asked: the setting.
        recipe: of the run.
        model: as it was given.
        examples: aligned.
        micro_batch, batch: rows in memory at once (0: see `TargetRun`), and of an inner step.
        ranks: the processes that share the run; they choose alike.

    Raises:
        BadValueError: for an unknown setting.
        UsageError: for differences in bf16.
    """
    if asked not in WAYS:
        raise BadValueError(f"second_order = {asked!r} is no choice.", f"It takes {', '.join(WAYS)}.")
    if asked in ("difference", "one-sided") and recipe.precision != "float32":
        raise UsageError(
            "Differences are taken in float32: bf16 rounds away what they are made of.",
            "Set inner.precision = 'float32', or second_order = 'exact'.",
        )
    if asked != "auto":
        return asked, ""
    if recipe.precision != "float32":
        return "exact", ""
    reason = ""
    try:
        with recipe.prepared(model) as (target, _):
            run = TargetRun(target, recipe.space(target), recipe.normalization, examples.ids_N_S.shape[1], micro_batch)
            selfcheck(run, examples, need_hvp=True)
            need, free = dual_bytes(run, examples, batch), free_bytes(examples.ids_N_S.device)
            if need > free:
                reason = f"the exact pass needs about {need / 1e9:.1f} GB and {free / 1e9:.1f} are free"
    except UsageError as refusal:
        reason = refusal.cause.rstrip(".")
    reason = ranks.agreed(reason)
    if reason:
        return "difference", f"Second order by differences: {reason}."
    return "exact", "Second order is exact."


def may_differ(asked: SecondOrder, recipe: Recipe) -> bool:
    """Whether a run with this setting may take differences."""
    return asked in ("difference", "one-sided") or (asked == "auto" and recipe.precision == "float32")


def remedy(asked: SecondOrder) -> str:
    """What to do where differences are refused."""
    if asked == "auto":
        return "Take another variant of the model, a smaller micro-batch or shorter examples."
    if asked == "one-sided":
        return "Set second_order = 'difference', which is nearer, or 'exact', which has no steps."
    return "Set second_order = 'exact', which has no steps."


def activation_numbers(
    tokens: int, length: int, layers: int, width: int, heads: int, exact: bool = True, matrices: bool = False
) -> int:
    """About how many numbers a micro-batch keeps for its reverse.

    Args:
        tokens: of the micro-batch.
        length: of a row.
        layers, width, heads: of the target.
        exact: of the dual pass; else of an ordinary pass with a fused attention.
        matrices: the target has an attention of its own, whose scores are kept whatever the length; else they are kept for
            short rows alone, and attention in slabs keeps two numbers a row and head (`forms/attention_slabs.py`).
    """
    if not exact:
        return tokens * layers * 20 * width
    scores = 3 * heads * length if matrices or length < LONG else 2 * heads
    return tokens * layers * (40 * width + scores)


def dual_bytes(run: TargetRun, examples: Examples, batch: int) -> float:
    """About what the dual pass of the largest micro-batch keeps; 0 for a model that does not say how large it is."""
    config: Any = getattr(run.model, "config", None)
    sizes = [getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    if not all(isinstance(size, int) for size in sizes):
        return 0.0
    length = int(examples.attention_N_S.sum(1).max()) if len(examples) else 1
    rows = run.rows_at_once(batch, length, examples.ids_N_S.device)
    element = next(parameter.element_size() for parameter in run.model.parameters())
    layers, width, heads = sizes
    matrices = length >= LONG and not is_same(run.model)
    return float(activation_numbers(rows * length, length, layers, width, heads, True, matrices) * element)  # type: ignore[arg-type]


def free_bytes(device: torch.device) -> float:
    """Memory that is free: of the accelerator, or of the machine as far as a control group lets it be used."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = float("inf")
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = 1024.0 * int(line.split()[1])
    except (OSError, ValueError):  # no Linux
        free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, float(Path(limit).read_text()) - float(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return free
