"""How much of a change of Φ is the noise of drawn tokens, and what a change of Φ costs at least (DESIGN §9).

For a metric without pixels: a norm, a loss on text, one of your own. To first order Φ of a dataset is a sum over its examples,
each with the credit of the tokens that were drawn, R_i = Σ_s τ_is(y_is). A step's gradient is a mean over its batch's tokens, so
that an example counts by how it differs from the mean of as many tokens: over the examples of a step

    σ² = Σ_i (R_i - n_i Σ R / Σ n)²        (n = 1 for all where the loss is normalised by examples)

summed over the steps; examples are drawn independently, their tokens need not be. A dataset of another size has σ² in inverse
proportion. Where an example is trained on more than once, all of its visits are one credit.

By Cauchy and Schwarz a generator whose distributions are KL nats a token from where it began moves Φ by at most, to first order,

    z = sqrt(2 · KL · tokens)        standard errors of a dataset of so many tokens,

the law of a pattern (`law.py`) with one pixel. The tilt that reaches it is the credit itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.records import Examples

ERROR, Z = "phi_error", "phi_z"  # names of the figures in the log


def step_of_examples(recipe: Recipe, examples: Examples) -> Tensor:
    """The inner step that trains on each example, (N,) int64; 0 for all where some are trained on more than once, or never."""
    steps, rows = recipe.plan(examples).flat
    found = torch.zeros(len(examples), dtype=torch.int64)
    if len(rows) == len(examples) == len(rows.unique()):
        found[rows] = steps
    return found


@torch.no_grad()
def drawn_error(example_N: Tensor, tokens_N: Tensor, step_N: Tensor) -> float:
    """σ: the standard error of Φ's first order by which examples were drawn, for a dataset of as many.

    Args:
        example_N: R, the credit of each example's drawn tokens.
        tokens_N: by which an example counts in its step's loss: its trained tokens, or 1.
        step_N: the inner step that trains on each.
    """
    credit, tokens, step = example_N.double().cpu(), tokens_N.double().cpu(), step_N.cpu()
    steps = int(step.max()) + 1
    rate = torch.zeros(steps, dtype=torch.float64).index_add_(0, step, credit)
    count = torch.zeros(steps, dtype=torch.float64).index_add_(0, step, tokens)
    apart = credit - tokens * (rate / count.clamp_min(1))[step]
    sizes = torch.bincount(step, minlength=steps).double()
    unbiased = (sizes / (sizes - 1).clamp_min(1))[step]
    return float((apart.square() * unbiased).sum().sqrt())


def dataset_error(recipe: Recipe, examples: Examples, example_N: Tensor, size: int) -> float:
    """The standard error of Φ for a dataset of `size` examples, trained on in as many inner steps.

    Args:
        recipe: of the inner run.
        examples: of an outer step.
        example_N: credits of their drawn tokens.
        size: of the final dataset.
    """
    tokens = examples.label_N_S.sum(1) if recipe.normalization == "token" else torch.ones(len(examples))
    return drawn_error(example_N, tokens, step_of_examples(recipe, examples)) * (len(examples) / size) ** 0.5


def above_start(first: Mapping[str, float], numbers: Mapping[str, float]) -> dict[str, float]:
    """z of an outer step: how far its Φ lies above that of the starting generator, in standard errors of the latter's data.

    Args:
        first: figures of outer step 0, whose generator is the starting one.
        numbers: figures of the outer step.
    """
    error = first.get(ERROR, 0.0)
    return {Z: (numbers["phi"] - first["phi"]) / error} if error > 0 and ERROR in numbers else {}


@dataclass(frozen=True)
class ScalarProspect:
    """What a budget of nats can do to a metric without pixels.

    Attributes:
        examples: of the final dataset, and `tokens` of it.
        budget: of the policy, nats a token.
        error: standard error of Φ at that size, of the starting generator's data; None where it was not measured.
    """

    examples: int
    tokens: float
    budget: float
    error: float | None = None

    @property
    def z(self) -> float:
        """Standard errors that the budget can move Φ by, at most."""
        return (2 * self.budget * self.tokens) ** 0.5

    def nats(self, z: float) -> float:
        """Least KL a token that moves Φ by z standard errors."""
        return z**2 / (2 * self.tokens)

    def line(self) -> str:
        """For people."""
        lifts = "" if self.error is None else f", {self.z * self.error:.3g} (a standard error is {self.error:.2g})"
        return (
            f"at {self.examples:,} examples {self.budget:g} nats a token raise phi by at most {self.z:,.0f} standard errors"
            f"{lifts}; three of them cost {self.nats(3.0):.1g} nats"
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        most = None if self.error is None else self.z * self.error
        return {**asdict(self), "z": self.z, "most": most, "least_nats": self.nats(3.0)}
