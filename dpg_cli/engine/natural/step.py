"""The natural policy step on the generator's LM head (DESIGN §9).

    d = (F + λ K)⁻¹ ∇J,   scaled to ½ dᵀ F d = δ nats a token,   ∇J = ∇Φ - β ∇KL(π ‖ π_start)

1. ∇Φ of the head's weights: of labels, Σ_s h_s Σ_y ∇π(y) τ_s(y), which a sink takes while the inner run is reversed, and of
   sampled tokens, Σ_s A_s (e_y - q_s) h_s. Nothing is normalised: it is the derivative of Φ itself.
2. d by conjugate gradients on products with the Fisher of the generator's tokens (`fisher.py`), of the very tokens that the
   gradient was taken of: a row of the head whose token is likely in a few contexts only has curvature there alone, and a
   gradient from other contexts would be answered by a change without bound.
3. δ is halved when Φ has fallen since the step before, and grows slowly otherwise. Should the step cost more than it was to,
   being no longer small, it is shortened.
4. KL(π ‖ π_start) a token, measured on the rollout's contexts, is kept to a budget: beyond it the whole change of the head so
   far is scaled down, which in the metric of F is the projection onto the ball of that budget.

Hidden states are those of the starting generator, always: there is no backward pass and no optimiser state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpg_cli.engine.natural.fisher import KEPT, Solution, TokenFisher, conjugate_gradients, dot
from dpg_cli.engine.natural.head_policy import HeadChange, divergence, divergence_gradient, step_divergence, with_ones
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.errors import DegenerateError

GROWTH, FALL = 1.1, 0.5  # of the trust region, after a step that raised Φ and after one that did not
COSTLY = 1.5  # times δ that a step may cost before it is shortened
CLOSE = 0.02  # of the budget, within which a scaled change ends
SHARE, MEMORY = (
    0.5,
    2.0,
)  # of a step whose length counts that is taken; with another generator over the outer steps so far


@dataclass(frozen=True)
class NaturalSpec:
    """Settings of the natural step.

    Attributes:
        trust: δ of the first step, nats a token.
        kl_budget: most KL(π ‖ π_start), nats a token.
        kl: β, in units of Φ per nat a token.
        damping: λ, without a unit.
        iterations, tolerance: of the conjugate gradients.
        tokens: that the gradient, the Fisher and the KL are taken of, at most; 0 for as many as have `KEPT` probabilities.
    """

    trust: float = 1e-3
    kl_budget: float = 0.1
    kl: float = 0.0
    damping: float = 1e-2
    iterations: int = 10
    tolerance: float = 0.05
    tokens: int = 0


@dataclass
class TrustRegion:
    """The size of natural steps.

    Attributes:
        spec: settings.
        trust: δ of the next step, nats a token.
        phi: Φ before the last step; nan before the first.
    """

    spec: NaturalSpec
    trust: float = field(init=False)
    phi: float = field(init=False, default=math.nan)

    def __post_init__(self) -> None:
        self.trust = self.spec.trust

    def seen(self, phi: float) -> float:
        """Take in Φ of the generator as it is, and adapt δ by what the last step did to it."""
        if not math.isnan(self.phi):
            self.trust *= FALL if phi < self.phi else GROWTH
        self.phi = phi
        return self.trust


@dataclass
class NaturalPolicy(TrustRegion):
    """A generator's head under natural steps.

    Attributes:
        change: the head, and where it began.
    """

    change: HeadChange

    def places(self, mask_N_K: Tensor) -> Tensor:
        """The completion tokens that a step is taken from, on the flat (N · K) axis: evenly spread ones."""
        most = self.spec.tokens or max(1, KEPT // self.change.head.layer.out_features)
        return spread(mask_N_K.flatten().nonzero()[:, 0], most)

    @torch.no_grad()
    def step(
        self,
        labels: HeadLabels,
        places: Tensor,
        gradient_V_D: Tensor,
        phi: float,
        *,
        start: Tensor | None = None,
        share: float = 0.0,
    ) -> dict[str, float]:
        """One step.

        Args:
            labels: the rollout's distributions under the head as it is; their `width` is K.
            places: the tokens that the gradient is of.
            gradient_V_D: ∇Φ by the head, the bias as its last column; used up.
            phi: Φ of the generator as it is.
            start: a change of the head whose multiple is near the solution, where one is known; used up.
            share: of the solution that is the step, where the gradient asks for certain changes and δ only bounds it
                (`aimed_share`); 0 where δ is its length.

        Returns:
            Figures for the log: δ, the step's and the whole KL in nats a token, iterations, residual, gradient norm.

        Raises:
            DegenerateError: if the gradient is not finite; the head is left as it was.
        """
        norm = float(gradient_V_D.norm())
        if not math.isfinite(norm):
            raise DegenerateError("The generator's gradient is not finite.", "Look at the rewards, or lower inner.lr.")
        trust = self.seen(phi)
        hidden = labels.hidden(places)
        if self.spec.kl > 0:
            toward = divergence_gradient(hidden, self.change.now, self.change.start, labels.temperature)
            gradient_V_D.add_(toward, alpha=-self.spec.kl)
        numbers = {"grad_norm": norm, "trust": trust, "step_kl": 0.0, "iterations": 0.0, "residual": 0.0}
        if norm > 0:
            fisher = TokenFisher.of(
                with_ones(hidden, labels.bias),
                lambda part: labels.at(places[part]),
                len(labels.weight),
                labels.temperature,
            )
            found = direction(fisher, gradient_V_D, self.spec, start)
            length = dot(found.x, fisher.product(found.x, gradient_V_D))
            del fisher, gradient_V_D
            scale = (2 * trust / length) ** 0.5 if length > 0 else 0.0
            scale = min(scale, share) if share else scale
            self.change.add(found.x, scale)
            cost = step_divergence(hidden, self.change.now, found.x, scale, labels.temperature)
            while cost > COSTLY * trust:  # no longer small: shorten it
                shorter = max(0.1, (trust / cost) ** 0.5)
                self.change.add(found.x, scale * (shorter - 1))
                scale *= shorter
                cost = step_divergence(hidden, self.change.now, found.x, scale, labels.temperature)
            numbers |= {"step_kl": cost, "iterations": float(found.iterations), "residual": found.residual}
        numbers["kl"] = self.keep_to_budget(hidden, labels.temperature)
        return numbers

    def keep_to_budget(self, hidden_M_D: Tensor, temperature: float) -> float:
        """Scale the change since the start down to the budget, where it is beyond; KL(π ‖ π_start) then, nats a token."""
        budget, start = self.spec.kl_budget, self.change.start
        kl = divergence(hidden_M_D, self.change.now, start, temperature)
        for _ in range(20):
            if kl <= budget:
                break
            self.change.shrink(((1 - CLOSE / 2) * budget / kl) ** 0.5)
            kl = divergence(hidden_M_D, self.change.now, start, temperature)
        return kl


def aimed_share(step: int, one_model: bool) -> float:
    """The share of a Gauss-Newton step that outer step `step` takes.

    What is missing is measured on one rollout, with the noise of its contexts. With another generator than the target, which
    answers that noise by larger changes, shares that fall like 1/step make the end the mean over rollouts, not the last one's answer.
    """
    return SHARE if one_model else min(SHARE, MEMORY / (step + 1))


def spread(places: Tensor, most: int) -> Tensor:
    """At most so many of some places, evenly spread over them."""
    if len(places) <= most:
        return places
    index = torch.arange(most, device=places.device, dtype=torch.float64) * (len(places) / most)
    return places[index.long()]


def direction(fisher: TokenFisher, gradient_V_D: Tensor, spec: NaturalSpec, start: Tensor | None = None) -> Solution:
    """(F + λ K)⁻¹ ∇J; the gradient is used up, and so is `start`, whose best multiple is where to begin."""
    kronecker = fisher.kronecker()
    return conjugate_gradients(
        lambda vector, out: kronecker.add_product(fisher.product(vector, out), vector, spec.damping),
        kronecker.solve,
        gradient_V_D,
        iterations=spec.iterations,
        tolerance=spec.tolerance,
        start=start,
    )
