"""The cost model against what is counted: operations by PyTorch's own counter, messages by a process that counts them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.models.loading import load_target
from dpg_cli.planning.cost import estimate
from dpg_cli.planning.job import Device, Job, Size, job_of
from dpg_cli.planning.scaling import operations, predict, sent_numbers
from dpg_cli.settings.config import ModelsConfig
from dpg_cli.settings.presets import find, resolve

ROOT = Path(__file__).parent.parent
DEVICE = Device("a device", 1e9, 1e11, 0.5, 1e10, 1e9, 1e8)


@pytest.fixture(scope="module")
def size() -> Size:
    return Size.of(load_target(ModelsConfig(), torch.device("cpu")))


def small(size: Size, *more: str) -> Job:
    """24 examples of 33 tokens in T = 3 inner steps."""
    config = resolve(
        find("pattern-67.tiny").data(), ["prompts.per_step=6", "inner.batch_size=8", "policy.minibatch=12", *more]
    )
    return job_of(config, size, size)


@dataclass(frozen=True)
class Counting(Ranks):
    """A process that counts what it would send."""

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        SENT.append(tensor.numel())
        return tensor


SENT: list[int] = []


@pytest.mark.parametrize("states", ["keep", "sqrt"])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_operations_and_messages_are_those_counted(size: Size, steps: int, states: str) -> None:
    """A forward pass is taken as 2 · parameters · tokens, without the embeddings, which multiply nothing."""
    target = load_target(
        ModelsConfig(dtype="float64"), torch.device("cpu")
    )  # float32 goes to oneDNN, unseen by the counter
    job = replace(small(size), inner_batch=24 // steps, states=states)
    ids = torch.randint(0, 500, (24, 33), generator=torch.Generator().manual_seed(0)).tolist()

    def once(ranks: Ranks) -> None:
        metagradient(
            target.model, Examples.from_sequences(ids), OptimizerSpec(eps=1e-3), NormMetric(target.model),
            batch_size=24 // steps, memory=states, ranks=ranks,
        )  # fmt: skip

    in_place = {torch.ops.aten.addmm_: lambda _, left, right, *rest, **kw: 2 * left[0] * left[1] * right[1]}
    once(ALONE)  # the self-check of two short rows comes once for each model
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        once(ALONE)
    work = operations(job)
    predicted = work["inner run"] + work["reverse"]
    assert counter.get_total_flops() == pytest.approx(predicted, rel=0.04)
    SENT.clear()
    once(Counting(0, 2))
    assert sum(count for count in SENT if count == size.parameters) == sent_numbers(job)[0]


def test_what_is_shared_shrinks_and_what_is_not_stays(size: Size) -> None:
    job = small(size)
    one, two, many = (predict(job, DEVICE, world) for world in (1, 2, 64))
    for part in ("rollout", "inner run", "reverse", "policy"):
        assert two.seconds_by_part[part] == pytest.approx(one.seconds_by_part[part] / 2, rel=1e-9)
    assert one.seconds_by_part["own vectors"] == many.seconds_by_part["own vectors"]
    assert one.sent == 0 and one.seconds_by_part["sending"] == 0
    assert two.sent == sum(sent_numbers(job)) * 4  # 2 (W - 1) / W = 1
    assert many.seconds_by_part["inner run"] == pytest.approx(one.seconds_by_part["inner run"] / 8)  # 8 rows a batch
    assert many.seconds_by_part["sending"] > 9 * two.seconds_by_part["sending"]  # between nodes
    assert two.flops == one.flops
    assert two.bytes_by_part["states"] == one.bytes_by_part["states"] + 4 * size.parameters
    assert one.largest()[0] in one.seconds_by_part and one.largest()[1] in one.bytes_by_part


def test_dry_run_predicts_for_processes() -> None:
    config = resolve(find("pattern-67.tiny").data(), [])
    one, two = estimate(config), estimate(config, processes=2)
    assert one.processes == 1 and two.processes == 2
    assert one.flops_per_step == two.flops_per_step
    assert "for each of 2 processes" in two.as_text() and "processes" not in one.as_text()
    # expected credit on 256 x 33 x 512 labels, three quarters of a gigabyte with Python and its libraries: docs/log.md
    assert 500 < one.memory_mb < 1500


def test_the_page_holds_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    try:
        page = scaling.PAGE.read_text(encoding="utf-8")
        assert page.partition(scaling.BEGIN)[2].partition(scaling.END)[0].strip() == scaling.text().strip()
    finally:
        sys.modules.pop("scaling")
