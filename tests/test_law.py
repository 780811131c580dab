"""The least cost of a pattern, against the dense formula and against Gaussian features where κ is known."""

from __future__ import annotations

import pytest
import torch

from dpg_cli.engine.natural.fisher import TokenFisher
from dpg_cli.engine.natural.law import law_of


def make(rows: int, columns: int, tokens: int, mixing: float, seed: int = 0) -> tuple[TokenFisher, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, columns, dtype=torch.float64, generator=rng)
    hidden = hidden + mixing * hidden.roll(1, 1)
    q = torch.softmax(torch.randn(tokens, 4 * rows, dtype=torch.float64, generator=rng), -1)[:, :rows]
    signs = torch.where(torch.rand(rows, columns, dtype=torch.float64, generator=rng) < 0.5, -1.0, 1.0).double()
    return TokenFisher(hidden, q.__getitem__, rows), signs


def test_kappa_is_that_of_the_dense_correlation_matrix() -> None:
    fisher, signs = make(5, 4, 300, 0.7)
    q, hidden = fisher.q(slice(None)), fisher.hidden_M_D
    spread = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    matrix = torch.einsum("mrs,mc,md->rcsd", spread, hidden, hidden).flatten(0, 1).flatten(1) / 300
    size = matrix.diagonal().sqrt()
    correlation = matrix / size[:, None] / size
    kappa = float(signs.flatten() @ torch.linalg.solve(correlation, signs.flatten())) / 20
    law = law_of(fisher, signs)
    assert law.kappa == pytest.approx(kappa, rel=1e-4)
    assert (law.pixels, law.columns) == (20, 4)
    assert law.rarest == pytest.approx(float(q.mean(0).min()))
    assert kappa > 1.2


def test_independent_pixels_have_a_kappa_of_one_and_the_law_is_z_squared() -> None:
    fisher, signs = make(3, 4, 40000, 0.0)
    rare = TokenFisher(
        fisher.hidden_M_D, lambda part: 1e-3 * fisher.q(part), 3
    )  # rare tokens do not crowd each other out
    law = law_of(rare, signs)
    assert law.kappa == pytest.approx(1.0, abs=0.02)
    assert law.nats(3.0, 50_000) == pytest.approx(9 * 12 * law.kappa / 100_000)
    assert law.tokens(3.0, law.nats(3.0, 50_000)) == pytest.approx(50_000)


def test_the_law_is_what_the_best_tilt_costs() -> None:
    """½ aᵀ F a of the tilt that moves every pixel by z σ."""
    fisher, signs = make(5, 4, 300, 0.7, seed=3)
    q, hidden = fisher.q(slice(None)), fisher.hidden_M_D
    spread = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    matrix = torch.einsum("mrs,mc,md->rcsd", spread, hidden, hidden).flatten(0, 1).flatten(1) / 300
    z, tokens = 2.5, 4000
    sigma = (matrix.diagonal() / tokens).sqrt()
    tilt = torch.linalg.solve(matrix, z * signs.flatten() * sigma)
    assert law_of(fisher, signs).nats(z, tokens) == pytest.approx(0.5 * float(tilt @ matrix @ tilt), rel=1e-4)
