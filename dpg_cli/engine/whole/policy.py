"""The natural policy step on any of a generator's parameters: all of them, or its adapters (DESIGN §9).

    d = (F + λ D)⁻¹ ∇J,   scaled to ½ dᵀ F d = δ nats a token,   ∇J = ∇Φ - β ∇KL(π ‖ π_start)

As on the head (`../natural/step.py`), with three differences. Credits reach θ by a backward pass: what the logits' adjoints make of
hidden states is kept, (N, K, D), and pulled back once. F and D, its diagonal in the place of the head's Kronecker product, come
from passes through the backbone (`fisher.py`). And since hidden states change with θ, every KL is measured with those of both sides.

A step looks at whole completions, evenly spread ones. Adapters enter as what is trained of the model, whatever they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.head import chunks
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.natural.fisher import KEPT, Solution, conjugate_gradients, dot
from dpg_cli.engine.natural.head_policy import LabelGradient
from dpg_cli.engine.natural.step import CLOSE, COSTLY, TrustRegion, spread
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.engine.records import Examples, Rollout
from dpg_cli.engine.soft import HeadLabels, Rows
from dpg_cli.engine.whole.fisher import Contexts, as_examples
from dpg_cli.errors import DegenerateError, UsageError

HALVINGS = 12  # of the share of a change that a budget allows
MOST = 8192  # tokens a step, unless asked for more: each product with F is four passes over them

TRIED, TRIAL = 8, 1e-3  # tokens of each of two rows that products are tried on, and nats a token of that change
LACKING = "The generator {name!r} cannot take natural steps of more than its head"
ELSE = "Set policy.parameters = 'head', or policy.step = 'adamw'."

Side = tuple[Tensor, Tensor, Tensor | None]  # hidden states (M, D), the head's weight and bias


@dataclass
class WholePolicy(TrustRegion):
    """A generator under natural steps of all that is trainable in it.

    Attributes:
        model: the generator; its trainable parameters are changed in place.
        micro_batch: completions in memory at once; 0 takes about 4,096 tokens on the CPU, and all elsewhere.
        start: θ before any training.
    """

    model: nn.Module
    micro_batch: int = 0
    start: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.space = ParameterSpace(self.model)
        self.start = self.space.read(self.model)

    def rows(self, mask_N_K: Tensor) -> Tensor:
        """The completions that a step is taken from: evenly spread ones."""
        most = self.spec.tokens or min(MOST, max(1, KEPT // self.vocabulary))
        count = max(1, most * len(mask_N_K) // max(1, int(mask_N_K.sum())))
        return spread(torch.arange(len(mask_N_K), device=mask_N_K.device), count)

    def places(self, mask_N_K: Tensor) -> Tensor:
        """Their tokens, on the flat (N · K) axis, in order."""
        chosen = torch.zeros_like(mask_N_K)
        chosen[self.rows(mask_N_K)] = True
        return (mask_N_K & chosen).flatten().nonzero()[:, 0]

    def contexts(self, rollout: Rollout, ranks: Ranks = ALONE) -> Contexts:
        """Those completions, as the generator reads them."""
        examples = as_examples(rollout.rows(self.rows(rollout.mask_N_K)))
        run = TargetRun(self.model, self.space, micro_batch=self.micro_batch, masked=True, ranks=ranks)
        return Contexts(run, examples)

    @torch.no_grad()
    def require_products(self, name: str) -> None:
        """Try a product with F on a few tokens: ½ vᵀ F v of a random v against the KL that moving by ± v costs.

        Args:
            name: of the generator.

        Raises:
            UsageError: if the generator has no forward derivative, or a wrong one.
        """
        ids = (7 * torch.arange(2 * TRIED, device=self.start.device) % self.vocabulary).view(2, TRIED)
        label = torch.ones_like(ids, dtype=torch.bool)
        label[:, 0] = False
        run = TargetRun(self.model, self.space, masked=True)
        contexts = Contexts(run, Examples(ids, torch.ones_like(label), label))
        vector = torch.randn(len(self.start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        vector, now = vector.to(self.start), self.side(contexts, self.start)
        try:
            image = contexts.product(self.start, vector, lambda part: log_pi(now, part, 1.0).exp(), 1.0)
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{LACKING.format(name=name)}: {str(error).splitlines()[0][:100]}.", ELSE) from error
        length = dot(vector, image)
        vector *= (2 * TRIAL / length) ** 0.5 if length > 0 else 0.0
        costs = [divergence_of(self.side(contexts, self.start + sign * vector), now, 1.0) for sign in (1, -1)]
        if not 0.6 < sum(costs) / 2 / TRIAL < 1.6:
            found = f"a change that is to cost {TRIAL:g} nats a token costs {sum(costs) / 2:.2g}"
            raise UsageError(f"{LACKING.format(name=name)}: {found}.", ELSE)

    @property
    def vocabulary(self) -> int:
        """V of the generator."""
        model: Any = self.model
        return int(model.get_output_embeddings().out_features)

    @torch.no_grad()
    def step(
        self,
        labels: HeadLabels,
        rollout: Rollout,
        gradient: LabelGradient,
        phi: float,
        rng: torch.Generator,
        *,
        share: float = 0.0,
        ranks: Ranks = ALONE,
    ) -> dict[str, float]:
        """One step.

        Args:
            labels: the rollout's distributions under θ as it is; their `width` is K.
            rollout: the completions.
            gradient: of Φ by the head and by the hidden states, summed over ranks; of the tokens of `places`.
            phi: Φ of the generator as it is.
            rng: of the diagonal's estimate, on the CPU.
            share: see `NaturalPolicy.step`.
            ranks: the processes that share the completions.

        Returns:
            Figures for the log, as `NaturalPolicy.step` has them.

        Raises:
            DegenerateError: if the gradient is not finite; the generator is left as it was.
        """
        if gradient.hidden_bar is None:
            raise ValueError("a step of the backbone needs the adjoints of hidden states")
        contexts, theta = self.contexts(rollout, ranks), self.space.read(self.model)
        places = self.places(rollout.mask_N_K)
        climb = contexts.pull(theta, gradient.hidden_bar[places], gradient.total)
        norm = float(climb.norm())
        if not math.isfinite(norm):
            raise DegenerateError("The generator's gradient is not finite.", "Look at the rewards, or lower inner.lr.")
        trust, temperature = self.seen(phi), labels.temperature
        before = self.side(contexts, theta)
        begun = self.side(contexts, self.start)

        def q(part: slice) -> Tensor:
            return labels.at(places[part])

        if self.spec.kl > 0:

            def toward(likely: Tensor, part: slice) -> Tensor:
                pull = log_pi(before, part, temperature)
                pull -= log_pi(begun, part, temperature)
                return pull.sub_(torch.linalg.vecdot(likely, pull)[:, None]).mul_(likely)

            bars = contexts.cotangents(theta, before[0], q, toward)
            climb.sub_(contexts.pull(theta, *bars), alpha=self.spec.kl / (len(places) * temperature))
        numbers = {"grad_norm": norm, "trust": trust, "step_kl": 0.0, "iterations": 0.0, "residual": 0.0}
        if norm > 0:
            found = self.direction(contexts, theta, before[0], q, temperature, climb, rng)
            length = dot(found.x, contexts.product(theta, found.x, q, temperature))
            scale = (2 * trust / length) ** 0.5 if length > 0 else 0.0
            scale = min(scale, share) if share else scale
            while True:
                self.space.write(self.model, torch.add(theta, found.x, alpha=scale))
                after = self.side(contexts, self.space.read(self.model))
                cost = divergence_of(after, before, temperature)
                if cost <= COSTLY * trust:
                    break
                scale *= max(0.1, (trust / cost) ** 0.5)  # no longer small: shorten it
            numbers |= {"step_kl": cost, "iterations": float(found.iterations), "residual": found.residual}
        numbers["kl"] = self.keep_to_budget(contexts, begun, temperature)
        return numbers

    def direction(
        self,
        contexts: Contexts,
        theta: Tensor,
        hidden_M_D: Tensor,
        q: Rows,
        temperature: float,
        climb: Tensor,
        rng: torch.Generator,
    ) -> Solution:
        """(F + λ D)⁻¹ ∇J; the gradient is used up."""
        diagonal = contexts.diagonal(theta, hidden_M_D, q, temperature, rng)
        return conjugate_gradients(
            lambda vector, out: contexts.product(theta, vector, q, temperature, out).addcmul_(
                diagonal, vector, value=self.spec.damping
            ),
            lambda vector, out: torch.div(vector, diagonal, out=out),
            climb,
            iterations=self.spec.iterations,
            tolerance=self.spec.tolerance,
        )

    def side(self, contexts: Contexts, theta: Tensor) -> Side:
        """What the tokens' distributions at θ are made of."""
        weight, bias = contexts.weights(theta)
        return contexts.hidden(theta), weight.detach(), None if bias is None else bias.detach()

    def keep_to_budget(self, contexts: Contexts, begun: Side, temperature: float) -> float:
        """Scale the change since the start down to the budget, where it is beyond; KL(π ‖ π_start) then, nats a token.

        The KL need not be quadratic in the change of a backbone: the share that the budget allows is found by bisection.
        """
        budget, beyond = self.spec.kl_budget, self.space.read(self.model)

        def at(share: float) -> float:
            theta = torch.lerp(self.start, beyond, share)
            self.space.write(self.model, theta)
            return divergence_of(self.side(contexts, theta), begun, temperature)

        found = divergence_of(self.side(contexts, beyond), begun, temperature)
        if found <= budget:
            return found
        within, outside, share, kl = 0.0, 1.0, (budget / found) ** 0.5, 0.0
        for _ in range(HALVINGS):
            found = at(share)
            if found <= budget:
                within, kl = share, found
            else:
                outside = share
            if (1 - 2 * CLOSE) * budget <= found <= budget:
                return kl
            share = (within + outside) / 2
        return at(within)


def log_pi(side: Side, part: slice, temperature: float) -> Tensor:
    """Log-probabilities of a chunk of tokens, (m, V)."""
    hidden, weight, bias = side
    return torch.log_softmax(nn.functional.linear(hidden[part], weight, bias).div_(temperature), -1)


@torch.no_grad()
def divergence_of(now: Side, other: Side, temperature: float) -> float:
    """Mean KL(now ‖ other) a token, nats."""
    total = 0.0
    for part in chunks(len(now[0]), len(now[1])):
        first, second = log_pi(now, part, temperature), log_pi(other, part, temperature)
        total += float(torch.linalg.vecdot(first.exp(), first - second).sum(dtype=torch.float64))
    return total / max(1, len(now[0]))
