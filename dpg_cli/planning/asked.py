"""What the law of DESIGN §9 asks of settings before any model is at hand, beside the paper's number of completions.

κ depends on the generator; until `dpg check` or a dry run with the models measures it, it is taken as it was on the embedded model of prose.
"""

from __future__ import annotations

from dataclasses import dataclass

from dpg_cli.engine.natural.law import PatternLaw
from dpg_cli.engine.natural.scalar import ScalarProspect
from dpg_cli.errors import UsageError
from dpg_cli.metrics.registry import make_pattern
from dpg_cli.settings.config import Config
from dpg_cli.settings.metric_options import PatternOptions
from dpg_cli.settings.presets import find, resolve

KAPPA = 2.28  # of a QR code by rows of frequent tokens: docs/log.md, 2026-11-28


@dataclass(frozen=True)
class Asked:
    """The law's demand.

    Attributes:
        completions: of all outer steps.
        paper: of the paper's run of the task; None where it has none.
        examples, tokens: of the final dataset.
        budget: nats a token; None where the policy has none.
        z: standard errors: asked for on every pixel, or that the budget can reach at most; None where no law holds.
        nats: least KL a token; None where there are no pixels.
    """

    completions: int
    paper: int | None
    examples: int
    tokens: int
    budget: float | None
    z: float | None = None
    nats: float | None = None

    def line(self) -> str:
        """For people."""
        said = f"{self.completions:,} completions to train on"
        if self.paper:
            said += f", 1/{round(self.paper / self.completions):,} of the paper's {self.paper:,}"
        at = f"{self.examples:,} examples of the final dataset ({self.tokens:,} tokens)"
        if self.nats is not None:
            said += f". The law: {self.z:g} standard errors on every pixel at {at} cost at least {self.nats:.2g} nats a token (kappa {KAPPA:g})"
        elif self.z is not None:
            said += f". The law: {self.budget:g} nats a token move the metric by at most {self.z:,.0f} standard errors at {at}"
        return said + "."


def asked(config: Config, vocabulary: int = 50_257, width: int = 768) -> Asked:
    """What the law asks of some settings.

    Args:
        config: the settings.
        vocabulary, width: of the target's head.
    """
    try:
        preset = resolve(find(f"{config.task}.paper").data(), [])
        paper: int | None = preset.steps * preset.examples_per_step
    except UsageError:
        paper = None
    size = config.dataset.examples
    tokens = size * config.rollout.max_tokens
    completions = config.steps * config.examples_per_step
    if config.policy.step != "natural":
        return Asked(completions, paper, size, tokens, None)
    budget = config.policy.kl_budget
    if not isinstance(config.metric, PatternOptions):
        return Asked(completions, paper, size, tokens, budget, ScalarProspect(size, tokens, budget).z)
    if not config.metric.margin:
        return Asked(completions, paper, size, tokens, budget)
    rows, columns = make_pattern(config.metric, (vocabulary, width)).shape
    law = PatternLaw(rows * columns, KAPPA, 1.0, columns)
    return Asked(completions, paper, size, tokens, budget, config.metric.margin, law.nats(config.metric.margin, tokens))
