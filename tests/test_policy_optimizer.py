"""The policy's AdamW with moments of 8 bits beside torch's own."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest
import torch
from torch import nn

from dpg_cli.driver.build import build
from dpg_cli.engine.generator.optimizer import is_quantised, moments_of, policy_optimizer, put, step_of
from dpg_cli.errors import UsageError
from dpg_cli.settings.config import settle
from dpg_cli.settings.presets import find, resolve

pytest.importorskip("bitsandbytes")

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}


def wide() -> nn.Sequential:
    """A model with large and small tensors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 4))


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int = 1) -> list[float]:
    """Losses of a regression."""
    rng = torch.Generator().manual_seed(seed)
    inputs, outputs = torch.randn(128, 64, generator=rng), torch.randn(128, 4, generator=rng)
    found = []
    for _ in range(count):
        loss = (model(inputs) - outputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


def test_it_walks_as_adamw_does_with_a_fraction_of_the_memory() -> None:
    ours, plain = wide(), wide()
    begin = [parameter.detach().clone() for parameter in plain.parameters()]
    made = policy_optimizer(list(ours.parameters()), "8bit", **OPTIONS)
    stock = policy_optimizer(list(plain.parameters()), **OPTIONS)
    assert is_quantised(made) and not is_quantised(stock)
    losses, others = steps(ours, made, 20), steps(plain, stock, 20)
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(others[-1], rel=0.05)
    for one, other, before in zip(ours.parameters(), plain.parameters(), begin, strict=True):
        assert (one - other).norm() < 0.15 * (other - before).norm()
    large = next(iter(ours.parameters()))
    sizes = [
        sum(tensor.nbytes for tensor in moments_of(optimizer, parameter).values())
        for optimizer, parameter in ((made, large), (stock, next(iter(plain.parameters()))))
    ]
    assert sizes[0] < 0.27 * sizes[1]


@pytest.mark.parametrize("states", ["float32", "8bit"])
def test_a_state_that_is_put_back_goes_on_alike(states: str) -> None:
    model = wide()
    first = policy_optimizer(list(model.parameters()), states, **OPTIONS)  # type: ignore[arg-type]
    names = {name: set(moments_of(first, parameter)) for name, parameter in model.named_parameters()}
    steps(model, first, 3)
    assert names == {name: set(moments_of(first, parameter)) for name, parameter in model.named_parameters()}
    twin = deepcopy(model)
    second = policy_optimizer(list(twin.parameters()), states, **OPTIONS)  # type: ignore[arg-type]
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert step_of(first, one) == 3
        put(second, other, step_of(first, one), moments_of(first, one))
    assert steps(model, first, 3) == steps(twin, second, 3)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"optimizer_states.*adamw"):
        settle(resolve(find("l2-shrink.prose").data(), ["policy.optimizer_states=8bit"]))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = settle(resolve(find("pattern-67.tiny").data(), ["policy.optimizer_states=8bit"]))
    with pytest.raises(UsageError, match=r"needs the library 'bitsandbytes'") as refusal:
        build(config)
    assert "dpg-cli[8bit]" in refusal.value.remedy
