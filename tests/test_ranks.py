"""Several processes give what one gives; a lost one ends the run; the run goes on with another number of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from dpg_cli.engine.generator.rollout import from_uniforms, uniforms
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.errors import LostProcessError

HERE = Path(__file__).parent
WORLDS = (2, 4)


def started(*command: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, one thread wide."""
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=timeout, env=env)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every rank of one, two and four processes got."""
    out = tmp_path_factory.mktemp("ranks")
    answer = started(str(HERE / "ranks_worker.py"), "engine", str(out))
    assert answer.returncode == 0, answer.stderr[-3000:]
    return out


def got(results: Path, world: int, rank: int = 0) -> dict[str, Any]:
    return torch.load(results / f"world-{world}-rank-{rank}.pt")


def test_shards_are_a_partition() -> None:
    for world in range(1, 7):
        for count in range(9):
            shards = [range(count)[Ranks(rank, world).shard(count)] for rank in range(world)]
            assert [row for shard in shards for row in shard] == list(range(count))
            assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_same_rewards_as_one_process(results: Path, world: int) -> None:
    one, several = got(results, 1), got(results, world)
    assert one.keys() == several.keys()
    moved = 0.0
    for name, value in one.items():
        if name.startswith("f32"):  # sums in another order: rounding relative to the largest
            assert (several[name] - value).abs().max() <= 2e-5 * value.abs().max(), name
        elif value.dtype == torch.float64:
            assert (several[name] - value).abs().max() <= 1e-10 * max(1.0, float(value.abs().max())), name
            if name.endswith(("token", "label", "example")):  # tiny rewards must agree relatively, too
                assert (several[name] - value).abs().max() <= 1e-10 * value.abs().max(), name
                moved = max(moved, float((several[name] - value).abs().max()))
        else:
            assert torch.equal(several[name], value), name
    assert moved > 0  # sums over ranks were really taken in another order
    assert one["gpt2 token"].abs().max() > 1e-4
    assert one["ids"].shape[0] == 6


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_hold_the_same(results: Path, world: int) -> None:
    first = got(results, world)
    for rank in range(1, world):
        other = got(results, world, rank)
        for name, value in first.items():
            assert torch.equal(value, other[name]), (name, rank)


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_run_by_several_leaves_what_one_leaves(results: Path, world: int) -> None:
    one, several = results / "run-1", results / f"run-{world}"
    for name in ("train", "control"):
        first, second = (pq.read_table(run / "dataset" / f"{name}.parquet").to_pydict() for run in (one, several))
        assert first["token_ids"] == second["token_ids"]
        for row, other in zip(first["reward"], second["reward"], strict=True):
            assert row is other is None or abs(row - other) <= 1e-9 * max(abs(r) for r in first["reward"])
    for line, other in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, several)), strict=True):
        numbers, figures = json.loads(line), json.loads(other)
        assert numbers.keys() == figures.keys()
        for key, value in numbers.items():
            if not key.startswith("seconds"):
                # the three count coordinates with a gradient: some have none but for rounding
                loose = key in ("sign_share", "elasticity", "gradient_median")
                assert figures[key] == pytest.approx(value, rel=1e-4 if loose else 1e-8, abs=1e-12), key
    assert sorted(p.name for p in several.iterdir()) == sorted(p.name for p in one.iterdir())
    assert json.loads((several / "run.json").read_text())["hardware"]["processes"] == world


def test_uniforms_invert_the_distribution() -> None:
    """Frequencies over an even table are the probabilities; what has none is never drawn, not even at the ends."""
    pi = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64)
    even = torch.cat([torch.arange(1000, dtype=torch.float64) / 1000, torch.tensor([1 - 2**-53])])[:, None]
    drawn = from_uniforms(even, 0, slice(None), pi.expand(1001, -1))[:, 0].bincount(minlength=6)
    assert drawn.tolist() == [0, 500, 0, 300, 201, 0]
    rng = torch.Generator().manual_seed(3)
    first, second = uniforms(rng, 5, 4), uniforms(rng, 5, 4)
    assert first.shape == (5, 4) and not torch.equal(first, second)
    assert torch.equal(first, uniforms(torch.Generator().manual_seed(3), 5, 4))


def test_alone_costs_nothing() -> None:
    tensor = torch.ones(3)
    assert ALONE.sum_(tensor) is tensor and ALONE.gather(tensor) is tensor and ALONE.copy_from_first_(tensor) is tensor
    assert ALONE.total(2.5) == 2.5 and ALONE.any(True) and ALONE.shard(7) == slice(0, 7)


def test_a_connection_that_broke_is_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("[/build/gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1. More.\nStack")

    monkeypatch.setattr("torch.distributed.all_reduce", broken)
    with pytest.raises(LostProcessError, match=r"reached \(Connection closed by peer \[127.0.0.1\]:1\)") as caught:
        Ranks(0, 2).sum_(torch.ones(2))
    assert caught.value.exit_code == 5


@pytest.mark.slow
def test_killing_one_ends_all_with_one_message_and_the_run_goes_on(tmp_path: Path) -> None:
    answer = started(str(HERE / "ranks_worker.py"), "kill", str(tmp_path))
    assert answer.returncode == 0, answer.stderr[-3000:]
    figures = json.loads(answer.stdout)
    assert [figure["size"] for figure in figures] == [2, 3, 4]
    for figure in figures:
        codes = dict(enumerate(figure["codes"]))
        assert codes.pop(figure["victim"]) == -9
        assert set(codes.values()) == {5}
        assert figure["seconds"] < 15
        assert len(figure["lines"]) == 1, figure
        assert re.search(r"Another process of this run ended.*Go on with: dpg resume \S+/run$", figure["lines"][0])
    sessions = json.loads((tmp_path / "run" / "run.json").read_text())["sessions"]
    assert [session["hardware"]["processes"] for session in sessions] == [2, 3, 4]
    assert sessions[2]["first_step"] > sessions[1]["first_step"] > 0
    answer = started("-m", "dpg_cli", "inspect", str(tmp_path / "run"))
    assert answer.returncode == 0, answer.stderr
