"""A look at what the untrained generator writes, before anything is trained: where a pattern may stand, and what it will cost.

A few thousand of its tokens tell which rows of the LM head are frequent (`metric.origin = "frequent"`), and, by the law of a
pattern (`engine/natural/law.py`), the least KL that could show it in the final dataset. Of a metric without pixels they tell the
noise, and so what a budget of nats can do to it (`engine/natural/scalar.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dpg_cli.engine.attribution import AttributionSpec, attribute_examples
from dpg_cli.engine.generator.align import read_completions
from dpg_cli.engine.generator.contexts import contexts, standard_head
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner.head import chunks
from dpg_cli.engine.loop import LoopSpec
from dpg_cli.engine.natural.head_policy import DrawnCredit
from dpg_cli.engine.natural.law import PatternLaw, pattern_law
from dpg_cli.engine.natural.scalar import ScalarProspect, dataset_error
from dpg_cli.engine.noise import HearsNoise
from dpg_cli.engine.ranks import Ranks
from dpg_cli.engine.records import Examples
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import TargetMetric
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.metrics.registry import make_pattern
from dpg_cli.models.loading import LanguageModel, same_tokenizer
from dpg_cli.patterns.pattern import check_fits
from dpg_cli.settings.config import Config
from dpg_cli.settings.metric_options import FREQUENT, PatternOptions

TOKENS = 8192  # that are looked at, about
SURE = 3.0  # standard errors on every pixel that are asked for where the metric has no margin


def look(
    generator: LanguageModel,
    target: LanguageModel,
    sampling: Sampling,
    prompts: Sequence[str],
    seed: int,
    max_length: int = 0,
) -> Examples:
    """Completions of the generator as the target reads them, with their distributions where the tokenisers are one.

    Args:
        generator: as it is.
        target: who reads.
        sampling: of the run; groups become single completions.
        prompts: to draw from, repeated as often as needed.
        seed: of the draws.
        max_length: longest sequence of the target, 0 for none.
    """
    count = max(1, TOKENS // sampling.max_tokens)
    device = generator.head.device
    rng = torch.Generator(device).manual_seed(seed)
    alone = replace(sampling, group_size=1)
    texts = [prompts[number % len(prompts)] for number in range(count)]
    rollout = sample(generator.model, generator.tokenizer, texts, alone, rng)
    reading = read_completions(rollout, generator, target, max_length)
    if not same_tokenizer(generator, target):
        return reading.examples
    labels = contexts(generator.model, standard_head(generator.model, generator.name), rollout, alone)
    soft = replace(labels, offset=reading.offset, width=reading.examples.ids_N_S.shape[1])
    return replace(reading.examples, soft=soft)


@torch.no_grad()
def likelihoods(examples: Examples, vocabulary: int) -> Tensor:
    """How likely each token of the target is at a trained position, (V,), float64: from distributions, or else counted."""
    places = examples.label_N_S.flatten().nonzero()[:, 0]
    if examples.soft is None:
        counts = torch.bincount(examples.ids_N_S.flatten()[places], minlength=vocabulary)
        return counts.double() / max(1, len(places))
    total = torch.zeros(vocabulary, dtype=torch.float64, device=places.device)
    for part in chunks(len(places), vocabulary):
        total += examples.soft.at(places[part]).sum(0, dtype=torch.float64)
    return total / max(1, len(places))


def frequent_row(likely_V: Tensor, rows: int) -> int:
    """The first row of the block whose rarest token is the least rare."""
    return int(likely_V.unfold(0, rows, 1).amin(1).argmax())


def looks(config: Config) -> bool:
    """Whether settings ask what the generator writes before anything is trained."""
    metric = config.metric
    if isinstance(metric, PatternOptions) and (metric.origin == FREQUENT or metric.margin > 0):
        return True
    return config.policy.step == "natural"


def located(config: Config, target: LanguageModel, seen: Examples, ranks: Ranks) -> Config:
    """The settings with the rows of frequent tokens in the place of their name.

    Raises:
        UsageError: if the pattern has more rows than the head.
    """
    metric = config.metric
    if not isinstance(metric, PatternOptions) or metric.origin != FREQUENT:
        return config
    vocabulary, width = target.head.shape
    pattern = make_pattern(metric, (vocabulary, width))
    check_fits(pattern, vocabulary, width, (0, 0))
    row = ranks.agreed(frequent_row(likelihoods(seen, vocabulary), pattern.shape[0]))
    return config.model_copy(update={"metric": metric.model_copy(update={"origin": (row, 0)})})


@dataclass(frozen=True)
class Prospect:
    """What a pattern will cost.

    Attributes:
        law: of the pattern.
        z: standard errors that are asked for on every pixel.
        examples: of the final dataset, and `tokens` of it.
        budget: of the policy, nats a token; infinite where it has none.
    """

    law: PatternLaw
    z: float
    examples: int
    tokens: float
    budget: float

    @property
    def nats(self) -> float:
        """Least KL a token for the final dataset."""
        return self.law.nats(self.z, self.tokens)

    @property
    def needed(self) -> float:
        """Examples that the budget needs at the least."""
        return self.law.tokens(self.z, self.budget) * self.examples / self.tokens

    @property
    def within(self) -> bool:
        """The budget can reach it."""
        return self.nats <= self.budget

    @property
    def occurs(self) -> bool:
        """The token of every row is expected in the final dataset at least once."""
        return self.law.rarest * self.tokens >= 1

    def line(self) -> str:
        """For people."""
        sure = f"{self.z:g} standard errors on each of {self.law.pixels:,} pixels"
        at = f"at {self.examples:,} examples {sure} cost at least {self.nats:.2g} nats a token"
        if not self.within:
            return f"policy.kl_budget = {self.budget:g} cannot reach the pattern: {at}; {self.needed:,.0f} examples would do"
        size = self.law.first_order(self.z, self.tokens)
        hopeful = f"; the rarest row's tilt is {size:.1f}, beyond first order: more will be needed" if size > 1 else ""
        return f"{at} (kappa {self.law.kappa:.2f}){hopeful}"

    def refuse_absent_rows(self) -> None:
        """Refuse a patch on tokens that the generator never writes.

        Raises:
            UsageError: naming the remedy.
        """
        if not self.occurs:
            raise UsageError(
                f"The patch stands on rows whose rarest token the generator hardly ever writes: {self.law.rarest:.1e} of its "
                f"tokens, less than one in {self.tokens:,.0f}.",
                "--patch-origin frequent, or a row of frequent tokens.",
            )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self.law),
            "z": self.z,
            "least_nats": self.nats,
            "budget": self.budget if self.budget < float("inf") else None,
            "within": self.within,
            "occurs": self.occurs,
        }


def prospect(
    config: Config, metric: TargetMetric, target: LanguageModel, examples: Examples, spec: LoopSpec
) -> Prospect | ScalarProspect | None:
    """What the settings' pattern will cost, or what their budget can do to another metric; None where no law is known.

    Args:
        config: the settings.
        metric: that they make.
        target: θ_0.
        examples: from `look`.
        spec: of the loop.
    """
    if not isinstance(metric, HearsNoise):
        return scalar_prospect(config, metric, target, examples, spec)
    if not isinstance(metric, PatternMetric) or config.inner_steps > 1 or examples.soft is None:
        return None
    law = pattern_law(target.model, examples, metric.window, metric.signs)
    if law is None:
        return None
    size = config.dataset.examples
    tokens = size * int(examples.label_N_S.sum()) / len(examples)
    budget = config.policy.kl_budget if config.policy.step == "natural" else float("inf")
    return Prospect(law, metric.margin or SURE, size, tokens, budget)


def scalar_prospect(
    config: Config, metric: TargetMetric, target: LanguageModel, examples: Examples, spec: LoopSpec
) -> ScalarProspect | None:
    """What a budget can do to a metric without pixels; None without one. Its noise is measured by one small inner run.

    Args:
        config, metric, target, examples, spec: see `prospect`.
    """
    if config.policy.step != "natural":
        return None
    size = config.dataset.examples
    tokens = size * int(examples.label_N_S.sum()) / len(examples)
    if not spec.measures_noise(metric):
        return ScalarProspect(size, tokens, config.policy.kl_budget)
    small = spec.rescaled(config.examples_per_step, len(examples))
    drawn: DrawnCredit | None = None
    if spec.labels == "soft" and isinstance(examples.soft, HeadLabels):
        hidden = examples.soft.hidden_N_K_D
        drawn = DrawnCredit(hidden.new_zeros(hidden.shape[:2]))
    else:
        examples = replace(examples, soft=None)
    result = attribute_examples(
        target.model, examples, metric, AttributionSpec(), small.inner, group_size=1, sink=drawn
    )
    credit_N = result.example_N if drawn is None else drawn.token_N_K.sum(1)
    error = dataset_error(small.recipe, examples, credit_N, size)
    return ScalarProspect(size, tokens, config.policy.kl_budget, error)
