"""What a pattern in the LM head costs at least, in nats a token, before anything is trained (DESIGN §9).

Tilt the generator's logits of the pattern's rows R by a_r · h on its columns C. To first order one inner step moves the head by
m = F a, F = E[(diag q - q qᵀ)_RR ⊗ h_C h_Cᵀ], and the tilt costs ½ aᵀ F a nats a token. Drawn tokens, N of them, leave the
noise σ_rc² = F_rc,rc / N. Every pixel at z standard errors on its right side, m = z Y σ, then costs

    z² · pixels · κ / (2 N)        κ = Yᵀ C⁻¹ Y / pixels,   C = the correlation matrix of F

h is the target's: a generator with other features pays more, and so does one whose tokens the target predicts badly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpg_cli.engine.inner.head import chunks, find_head
from dpg_cli.engine.inner.target import CPU_TOKENS, Labelled, fused_activations, hidden_of
from dpg_cli.engine.natural.fisher import TokenFisher, conjugate_gradients
from dpg_cli.engine.records import Examples

EXACT, MOST = 1e-3, 300  # relative residual and products of the solve


@dataclass(frozen=True)
class PatternLaw:
    """The cost of a pattern.

    Attributes:
        pixels: of it.
        kappa: κ, at least 1/pixels; 1 where pixels do not depend on each other.
        rarest: mean probability of the rarest of its rows' tokens.
        columns: of the pattern.
    """

    pixels: int
    kappa: float
    rarest: float
    columns: int

    def nats(self, z: float, tokens: float) -> float:
        """Least KL a token for z standard errors on every pixel at so many tokens."""
        return z**2 * self.pixels * self.kappa / (2 * tokens)

    def tokens(self, z: float, nats: float) -> float:
        """Tokens of a dataset that such a KL needs for z standard errors on every pixel."""
        return z**2 * self.pixels * self.kappa / (2 * nats)

    def first_order(self, z: float, tokens: float) -> float:
        """How large the tilt of the rarest row's logit is then, about: beyond 1 the law is too hopeful."""
        return z * (self.columns * self.kappa / max(self.rarest * tokens, 1e-30)) ** 0.5


@torch.no_grad()
def pattern_law(
    model: nn.Module, examples: Examples, window: tuple[slice, slice], signs_R_C: Tensor
) -> PatternLaw | None:
    """The law of a pattern on these examples; None where the target has no standard head.

    Args:
        model: the target θ_0.
        examples: of the starting generator, with its distributions.
        window: the pattern's rows and columns of the head.
        signs_R_C: Y.
    """
    head = find_head(model)
    if head is None:
        return None
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    rows, columns = window
    read, likely = [], []
    size = max(1, CPU_TOKENS // examples.ids_N_S.shape[1])
    for start in range(0, len(examples), size):
        piece = examples.rows(start, start + size)
        marked = Labelled.of(piece, signs_R_C.new_ones(len(piece)), 1.0)
        if marked.expected is None:
            raise ValueError("the law of a pattern needs the generator's distributions")
        with fused_activations(model):
            hidden = hidden_of(head, parameters, piece).flatten(0, 1)[marked.before_M]
        read.append(hidden[:, columns])
        likely += [marked.expected.q(part)[:, rows] for part in chunks(len(hidden), head.layer.out_features)]
    fisher = TokenFisher(torch.cat(read).double(), torch.cat(likely).double().__getitem__, len(signs_R_C))
    return law_of(fisher, signs_R_C.double())


def law_of(fisher: TokenFisher, signs_R_C: Tensor) -> PatternLaw:
    """The law from a Fisher of the pattern's rows and columns."""
    q, hidden = fisher.q(slice(None)), fisher.hidden_M_D
    diagonal = ((q * (1 - q)).mT @ hidden.square()).div_(fisher.tokens)
    size = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).sqrt()
    wanted = signs_R_C * size
    kronecker = fisher.kronecker()
    found = conjugate_gradients(fisher.product, kronecker.solve, wanted.clone(), iterations=MOST, tolerance=EXACT)
    pixels = signs_R_C.numel()
    return PatternLaw(pixels, float((wanted * found.x).sum()) / pixels, float(q.mean(0).min()), signs_R_C.shape[1])
