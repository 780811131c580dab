"""The Fisher information of a generator's tokens on any of its parameters θ, as products with vectors (DESIGN §9).

For M tokens with hidden states h_m(θ), a head W(θ) and distributions q_m at temperature τ, and a change v of θ:

    u_m = W ḣ_m + Ẇ h_m        by one forward pass that carries the tangent of θ along v (the engine's dual pass)
    w_m = q_m ⊙ (u_m - <q_m, u_m>) / (M τ²)
    F v = Σ_m (∂h_m/∂θ)ᵀ Wᵀ w_m + (∂W/∂θ)ᵀ w_m h_mᵀ        by one backward pass

F has as many rows as θ and is never formed; rows of completions go by in micro-batches, and the logits of their tokens in chunks.

Its diagonal preconditions the conjugate gradients. It is estimated from a few backward passes of (e_y - q) with a label drawn
from q and a random sign for each token: the square of their sum has the diagonal's mean. Half of it is the mean of each parameter
tensor, which smooths the estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dpg_cli.engine.inner.head import Head, chunks
from dpg_cli.engine.inner.target import TargetRun, backward, fused_activations, hidden_of
from dpg_cli.engine.records import Examples, Rollout
from dpg_cli.engine.reverse.dual import DualMode
from dpg_cli.engine.soft import Rows

PROBES = 4  # backward passes that the diagonal is estimated from


def as_examples(rollout: Rollout) -> Examples:
    """Prompts and completions as right-padded rows, of which the completions' tokens are labelled."""
    ids = torch.cat([rollout.prompt_ids_N_Q, rollout.ids_N_K], 1)
    attention = torch.cat([rollout.prompt_mask_N_Q, rollout.mask_N_K], 1)
    label = torch.cat([torch.zeros_like(rollout.prompt_mask_N_Q), rollout.mask_N_K], 1)
    return Examples(ids, attention, label).aligned()


@dataclass(frozen=True)
class Contexts:
    """Some completions, read by a generator at any θ.

    Attributes:
        run: the generator, its trainable parameters, rows in memory at once, and the processes that share them.
        examples: the completions; M labelled tokens, in the order of rows and columns.
    """

    run: TargetRun
    examples: Examples

    @property
    def head(self) -> Head:
        """Of the generator."""
        if self.run.head is None:
            raise ValueError("natural steps need a standard LM head")
        return self.run.head

    @property
    def tokens(self) -> int:
        """M."""
        return int(self.examples.label_N_S.sum())

    def pieces(self) -> Iterator[tuple[Examples, Tensor, slice]]:
        """This rank's rows in micro-batches: each with the places whose hidden states predict its tokens, on its flat axis, and
        which of the M tokens these are."""
        ends = self.examples.label_N_S.sum(1).cumsum(0).tolist()
        for rows, piece in self.run.pieces(self.examples):
            places = piece.label_N_S.flatten().nonzero()[:, 0] - 1
            yield piece, places, slice(ends[rows.start - 1] if rows.start else 0, ends[rows.stop - 1])

    @torch.no_grad()
    def hidden(self, theta: Tensor) -> Tensor:
        """The hidden states that predict the tokens, (M, D); the same on every rank."""
        leaves, found = self.run.space.views(theta), theta.new_zeros(self.tokens, self.head.layer.in_features)
        for piece, places, part in self.pieces():
            with fused_activations(self.run.model):
                found[part] = hidden_of(self.head, leaves, piece, self.run.masked).flatten(0, 1)[places]
        return self.run.ranks.sum_(found)

    def weights(self, theta: Tensor) -> tuple[Tensor, Tensor | None]:
        """The head's weight and bias at θ."""
        return self.head.parameters(self.run.space.views(theta))

    def pull(self, theta: Tensor, hidden_bar_M_D: Tensor, head_bar_V_D: Tensor | None = None) -> Tensor:
        """The adjoint of θ, (n,), from those of the hidden states and of the head.

        Args:
            theta: θ.
            hidden_bar_M_D: of this rank's tokens at least.
            head_bar_V_D: of the head, of all ranks; a bias as its last column. Left out where the head is not among θ.
        """
        total = torch.zeros_like(theta)
        leaves = self.run.leaves(theta, total)
        for piece, places, part in self.pieces():
            with torch.enable_grad(), fused_activations(self.run.model):
                hidden = hidden_of(self.head, leaves, piece, self.run.masked)
            backward([(hidden, scattered(hidden, places, hidden_bar_M_D[part]))], leaves)
        self.run.ranks.sum_(total)
        if head_bar_V_D is not None:
            weight_bar, bias_bar = self.head_bars(total)
            if weight_bar is not None:
                weight_bar.add_(head_bar_V_D[:, : weight_bar.shape[1]])
            if bias_bar is not None:
                bias_bar.add_(head_bar_V_D[:, -1])
        return total

    def head_bars(self, total: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Views of a vector like θ where the head's weight and bias have their places; None where these are frozen."""
        views = self.run.space.views(total)
        return views.get(self.head.weight), views.get(self.head.bias or "")

    def product(self, theta: Tensor, vector: Tensor, q: Rows, temperature: float, out: Tensor | None = None) -> Tensor:
        """F v, (n,).

        Args:
            theta: θ.
            vector: v.
            q: the tokens' distributions at θ, chunk by chunk of the M, (m, V).
            temperature: τ.
            out: may be written to.
        """
        total = torch.zeros_like(theta) if out is None else out.zero_()
        leaves, tangents = self.run.leaves(theta, total), self.run.space.views(vector)
        weight = self.weights(theta)[0]
        weight_dot, bias_dot = self.head_bars(vector)
        weight_bar, bias_bar = self.head_bars(total)
        for piece, places, part in self.pieces():
            with (
                torch.enable_grad(),
                forward_ad.dual_level(),
                DualMode(),
                fused_activations(self.run.model),
            ):
                duals = {name: forward_ad.make_dual(leaf, tangents[name]) for name, leaf in leaves.items()}
                hidden, moved = forward_ad.unpack_dual(hidden_of(self.head, duals, piece, self.run.masked))
                del duals
            with torch.no_grad():
                h = hidden.detach().flatten(0, 1)[places]
                moving = torch.zeros_like(h) if moved is None else moved.detach().flatten(0, 1)[places]
                del moved
                bar = torch.empty_like(h)
                for some in chunks(len(h), len(weight)):
                    likely = q(slice(part.start + some.start, part.start + some.stop))
                    u = moving[some] @ weight.mT
                    u = u if weight_dot is None else u.addmm_(h[some], weight_dot.mT)
                    u = u if bias_dot is None else u.add_(bias_dot)
                    u.sub_(torch.linalg.vecdot(likely, u)[:, None]).mul_(likely)
                    bar[some] = u @ weight
                    if weight_bar is not None:
                        weight_bar.addmm_(u.mT, h[some])
                    if bias_bar is not None:
                        bias_bar.add_(u.sum(0))
            backward([(hidden, scattered(hidden, places, bar))], leaves)
        return self.run.ranks.sum_(total).div_(self.tokens * temperature**2)

    def diagonal(self, theta: Tensor, hidden_M_D: Tensor, q: Rows, temperature: float, rng: torch.Generator) -> Tensor:
        """An estimate of F's diagonal, (n,), every entry positive; see the module.

        Args:
            theta: θ.
            hidden_M_D: hidden states at θ.
            q: see `product`.
            temperature: τ.
            rng: of the labels and signs, on the CPU.
        """
        total = torch.zeros_like(theta)
        for _ in range(PROBES):
            draws = torch.rand(self.tokens, 2, generator=rng, dtype=torch.float64).to(theta.device)

            def pulls(likely: Tensor, part: slice, draws: Tensor = draws) -> Tensor:
                label = (likely.cumsum(1) < draws[part, :1]).sum(1, keepdim=True).clamp_max(likely.shape[1] - 1)
                sign = torch.where(draws[part, 1:] < 0.5, -1.0, 1.0).to(likely)
                return likely.neg().scatter_add_(1, label, torch.ones_like(sign)) * sign

            pulled = self.pull(theta, *self.cotangents(theta, hidden_M_D, q, pulls))
            total.addcmul_(pulled, pulled)
        total.div_(PROBES * self.tokens * temperature**2)
        for view in self.run.space.views(total).values():
            view.lerp_(view.mean().expand_as(view), 0.5)
        return total.clamp_min_(torch.finfo(total.dtype).eps * float(total.max()) or torch.finfo(total.dtype).tiny)

    @torch.no_grad()
    def cotangents(
        self, theta: Tensor, hidden_M_D: Tensor, q: Rows, pulls: Callable[[Tensor, slice], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """What the adjoints of logits make of hidden states, (M, D), and of the head where it is among θ.

        Args:
            theta: θ.
            hidden_M_D: hidden states at θ.
            q: distributions.
            pulls: the adjoints of the logits of a chunk, (m, V), from its distributions and its place; may be written to.
        """
        weight, bias = self.weights(theta)
        own = self.head.weight in self.run.space.names
        head_bar = None
        if own:
            head_bar = weight.new_zeros(len(weight), weight.shape[1] + (bias is not None))
        bar = torch.empty_like(hidden_M_D)
        for part in chunks(len(hidden_M_D), len(weight)):
            pull = pulls(q(part), part)
            bar[part] = pull @ weight
            if head_bar is not None:
                head_bar[:, : weight.shape[1]].addmm_(pull.mT, hidden_M_D[part])
                if bias is not None:
                    head_bar[:, -1].add_(pull.sum(0))
        return bar, head_bar


def scattered(hidden: Tensor, places: Tensor, bar_m_D: Tensor) -> Tensor:
    """Adjoints of some places of hidden states (B, S, D), zero elsewhere."""
    return torch.zeros_like(hidden).flatten(0, 1).index_copy_(0, places, bar_m_D).view_as(hidden)
