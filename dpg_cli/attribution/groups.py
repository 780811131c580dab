"""The runs of an attribution: one for all queries, or, where memory is short, one for each group of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.attribution.work import WorkFolder
from dpg_cli.engine.inner.recipe import Plan, Recipe
from dpg_cli.engine.inner.start import Start
from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.metagrad import metagradients
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.choice import SecondOrder, may_differ
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.models.loading import LanguageModel
from dpg_cli.planning.memory import Need, check_memory, widest

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Found:
    """What the runs say of Q queries, on the CPU.

    Attributes:
        token_Q_N_S: ∂Φ/∂w of each token's loss.
        values, measures: Φ after the fine-tuning, and readable measures, of each.
        gradient_median, stats, notes: see `engine.Metagradient`; the largest `precision_error` and
            `difference_error` of all groups.
    """

    token_Q_N_S: Tensor
    values: list[float]
    measures: list[dict[str, float]]
    gradient_median: float
    stats: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def example_Q_N(self) -> Tensor:
        """∂Φ/∂w of each example."""
        return self.token_Q_N_S.sum(2)

    def figures(self) -> dict[str, Any]:
        """All but the tensor, plain."""
        return {
            "values": self.values,
            "measures": self.measures,
            "gradient_median": self.gradient_median,
            "stats": self.stats,
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Task:
    """What all runs of an attribution share.

    Attributes:
        target: as it is trained.
        examples: its data.
        recipe, plan, start: of the fine-tuning.
        memory, packing, share_prefixes, micro_batch, second_order: how it is computed.
    """

    target: LanguageModel
    examples: Examples
    recipe: Recipe
    plan: Plan
    start: Start | None
    memory: Memory
    packing: bool
    share_prefixes: bool
    micro_batch: int
    second_order: SecondOrder = "exact"

    @property
    def steps(self) -> int:
        """Steps that are made."""
        return len(self.plan) - (0 if self.start is None else self.start.step)

    def width(self, queries: int, asked: int, tokens_read: int) -> int:
        """How many queries are walked at once.

        Args:
            queries: Q.
            asked: what the user asks for; 0 takes as many as fit.
            tokens_read: by the metric that reads most.

        Raises:
            UsageError: if not even one fits, naming the flag that would make it fit.
        """
        length = self.examples.ids_N_S.shape[1]
        batch = max(len(self.plan.index(number)) for number in range(len(self.plan)))
        rows = min(self.micro_batch, batch)
        need = Need.of(self.target, self.steps, rows, length, self.memory, batch, tokens_read)
        if may_differ(self.second_order, self.recipe):
            need = replace(need, exact=False)  # `auto` takes what fits
        head = self.target.head
        other = (self.target.parameter_count - self.target.trained_count) * float(head.element_size())
        other += queries * self.examples.ids_N_S.numel() * float(head.element_size())
        width = min(asked, queries) if asked else widest(need, queries, head.device, other)
        need = replace(need, queries=width)
        check_memory(need, head.device, states_flag="--memory ", rows_flag="--micro-batch ", other=other)
        return width

    def run(
        self,
        metrics: Sequence[TargetMetric],
        width: int,
        work: WorkFolder | None = None,
        progress: Progress = lambda phase, done, total: None,
    ) -> Found:
        """All queries.

        Args:
            metrics: Q of them.
            width: at once.
            work: keeps progress.
            progress: called as progress(phase, steps done, of how many), the steps of all groups.
        """
        starts = range(0, len(metrics), width)
        found: list[Found] = []
        for group, first in enumerate(starts):
            known = None if work is None else work.finished(group, self._like())
            if known is None:
                own = _of_group(progress, group, len(starts))
                found.append(self._group(group, metrics[first : first + width], work, own))
                if work is not None and len(starts) > 1:
                    work.finish(group, found[-1].token_Q_N_S, found[-1].figures())
            else:
                found.append(Found(known[0].cpu(), **known[1]))
        return found[0] if len(found) == 1 else _joined(found)

    def _like(self) -> Tensor:
        model: nn.Module = self.target.model
        return next(parameter for parameter in model.parameters() if parameter.requires_grad).detach()

    def _group(self, group: int, metrics: Sequence[TargetMetric], work: WorkFolder | None, progress: Progress) -> Found:
        with nullcontext() if work is None else work.journal(group) as journal:
            result = metagradients(
                self.target.model,
                self.examples,
                self.recipe,
                metrics,
                plan=self.plan,
                micro_batch=self.micro_batch,
                memory=self.memory,
                packing=self.packing,
                share_prefixes=self.share_prefixes,
                second_order=self.second_order,
                progress=progress,
                start=self.start,
                journal=journal,
            )
        tokens, values = result.token_Q_N_S.cpu(), result.value_Q.tolist()
        return Found(tokens, values, result.measures, result.gradient_median, result.stats, list(result.notes))


def _of_group(progress: Progress, group: int, groups: int) -> Progress:
    """The progress of one group as that of all: a phase of each has its share of the steps."""
    if groups == 1:
        return progress
    return lambda phase, done, total: progress(phase, group * total + done, groups * total)


def _joined(found: list[Found]) -> Found:
    stats = dict(found[0].stats)
    for name in ("precision_error", "difference_error"):
        if name in stats:
            stats[name] = max(one.stats[name] for one in found)
    return Found(
        torch.cat([one.token_Q_N_S for one in found]),
        [value for one in found for value in one.values],
        [measures for one in found for measures in one.measures],
        found[0].gradient_median,
        stats,
        found[0].notes,
    )
