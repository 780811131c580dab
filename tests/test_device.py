"""The engine where DPG_TEST_DEVICE points (`cuda`; the CPU by default): exactness in float64, where results lie, number formats, steps.

`make gpu-check` runs this file on a card. The judge is the CPU: the reference by plain autograd, and the same stage there.
"""

from __future__ import annotations

import os

import pytest
import torch
from builders import HeldOutLoss, make_adapted, make_examples, make_target
from torch import Tensor

from dpg_cli.driver.build import build
from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.engine.loop import outer_step
from dpg_cli.engine.reverse.reference import reference_metagradient
from dpg_cli.models.lora import Lora
from dpg_cli.settings.presets import find, resolve

DEVICE = torch.device(os.environ.get("DPG_TEST_DEVICE", "cpu"))
SPEC = OptimizerSpec("adamw", lr=1e-2, eps=1e-2, weight_decay=0.1)


def credits(architecture: str, device: torch.device, **more: object) -> Tensor:
    """Token credits of eight ragged examples in three inner steps, where they came to lie."""
    dtype = more.pop("dtype", torch.float64)
    model = make_target(architecture, tied=False, dtype=dtype).to(device)  # type: ignore[arg-type]
    metric = HeldOutLoss(make_examples(4, seed=5).to(device))
    result = metagradient(model, make_examples(8).to(device), SPEC, metric, batch_size=3, **more)  # type: ignore[arg-type]
    assert result.token_N_S.device.type == result.example_N.device.type == device.type
    return result.token_N_S


@pytest.fixture(scope="module")
def judges() -> dict[str, Tensor]:
    """The reference's credits, by architecture, on the CPU."""
    found = {}
    for architecture in ("gpt2", "llama"):
        model, metric = make_target(architecture, tied=False), HeldOutLoss(make_examples(4, seed=5))
        found[architecture] = reference_metagradient(model, make_examples(8), SPEC, metric, batch_size=3).token_N_S
    return found


@pytest.mark.parametrize("states", ["keep", "sqrt", "offload"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_float64_is_exact(architecture: str, states: str, judges: dict[str, Tensor]) -> None:
    ours = credits(architecture, DEVICE, memory=states).cpu()
    assert float((ours - judges[architecture]).norm() / judges[architecture].norm()) < 1e-9


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_float32_is_near(architecture: str, judges: dict[str, Tensor]) -> None:
    ours = credits(architecture, DEVICE, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert float((ours.cpu() - judges[architecture]).norm() / judges[architecture].norm()) < 1e-3


def test_bf16_is_near_and_keeps_float32(judges: dict[str, Tensor]) -> None:
    ours = credits("gpt2", DEVICE, dtype=torch.float32, precision="bf16")
    assert ours.dtype == torch.float32
    error = float((ours.cpu() - judges["gpt2"]).norm() / judges["gpt2"].norm())
    assert 1e-4 < error < 0.25  # rounded, and no more than the engine itself lets pass


def test_differences_are_near(judges: dict[str, Tensor]) -> None:
    ours = credits("gpt2", DEVICE, second_order="difference")
    assert float((ours.cpu() - judges["gpt2"]).norm() / judges["gpt2"].norm()) < 1e-3


def test_adapters_are_exact() -> None:
    lora = Lora(2, 4.0, ("all-linear",))
    found = []
    for device in (torch.device("cpu"), DEVICE):
        metric = HeldOutLoss(make_examples(4, seed=5).to(device))
        model = make_adapted("llama", lora).to(device)
        found.append(metagradient(model, make_examples(8).to(device), SPEC, metric, batch_size=3).token_N_S.cpu())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 1e-9


@pytest.mark.parametrize("preset", ["l2-shrink.prose", "pattern-67.tiny"])
def test_an_outer_step_equals_that_of_the_cpu(preset: str) -> None:
    """Natural steps on the head, and AdamW on all weights: the same completions (drawn by a table), Φ and change of the generator."""
    found = []
    for device in ("cpu", str(DEVICE)):
        config = resolve(
            find(preset).data(),
            [
                "models.dtype=float64", "prompts.per_step=8", "rollout.max_tokens=8", "inner.batch_size=8", "rollout.portable=true",
                "rollout.min_tokens=8", f"device={device}",
            ],
        )  # fmt: skip
        built = build(config)
        before = built.players.generator.head.detach().clone()
        report = outer_step(built.players, built.spec, built.prompts.at(0), 0)
        assert report.rollout.ids_N_K.device.type == torch.device(device).type
        change = (built.players.generator.head.detach() - before).cpu()
        found.append((report.rollout.ids_N_K.cpu(), report.numbers["phi"], change))
    (ids, phi, change), (other_ids, other_phi, other_change) = found
    assert torch.equal(ids, other_ids)
    assert other_phi == pytest.approx(phi, rel=1e-9)
    assert float(change.norm()) > 0
    assert (
        float((other_change - change).norm() / change.norm()) < 1e-6
    )  # conjugate gradients and Adam's root amplify the last digits


def test_the_device_is_the_one_that_was_asked_for() -> None:
    if DEVICE.type == "cuda":
        assert torch.cuda.is_available()
    assert torch.empty(1, device=DEVICE).device.type == DEVICE.type
