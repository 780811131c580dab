"""Packed rows give the numbers of padded ones, and bins are filled as TRL fills its own. float64."""

from __future__ import annotations

import random

import datasets
import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target, make_uneven
from torch import Tensor, nn

from dpg_cli.engine import Batches, OptimizerSpec, Recipe, Schedule, metagradient
from dpg_cli.engine.inner.packing import bins, bins_of_trl, pack, unpack
from dpg_cli.engine.inner.recipe.plan import Plan
from dpg_cli.engine.inner.target import TargetRun, can_pack, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import UsageError

RECIPE = Recipe(
    OptimizerSpec("adamw", lr=0.02, eps_root=1e-5, weight_decay=0.1),
    Schedule("cosine", warmup=1),
    0.5,
    batches=Batches(6, epochs=2, order="shuffled"),
)
METRIC = HeldOutLoss(make_examples(4, seed=9))


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize(("architecture", "tied"), [("gpt2", True), ("llama", False)])
def test_a_packed_row_at_a_time_changes_nothing(architecture: str, tied: bool) -> None:
    """Packed against the reference, which knows no packing: `test_reference.py`."""
    examples, model = make_uneven(), make_target(architecture, tied=tied)
    assert len(pack(examples)) < len(examples) / 2
    options = {"labels": True, "visits": True, "packing": True}
    packed = metagradient(model, examples, RECIPE, METRIC, **options)
    alone = metagradient(model, examples, RECIPE, METRIC, micro_batch=1, **options)
    assert relative(alone.token_N_S, packed.token_N_S) < 1e-10
    assert alone.label_N_S_V is not None
    assert packed.label_N_S_V is not None
    assert relative(alone.label_N_S_V, packed.label_N_S_V) < 1e-10
    assert packed.notes == ()


def test_a_row_of_several_examples_and_back() -> None:
    examples = make_uneven()
    packed = pack(examples)
    assert packed.layout is not None
    assert int(packed.attention_N_S.sum()) == int(examples.attention_N_S.sum())
    assert int(packed.label_N_S.sum()) == int(examples.label_N_S.sum())
    ids = unpack(packed.ids_N_S, packed, examples)
    assert torch.equal(ids, examples.ids_N_S.masked_fill(~examples.attention_N_S, 0))
    part = packed.rows(1, 2)
    assert part.layout is not None and part.layout.owner_N_S.shape == part.ids_N_S.shape
    even = make_examples(4, shortest=7, longest=7)
    assert pack(even) is even  # nothing to gain


@pytest.mark.parametrize("capacity", [5, 16, 64])
def test_bins_are_those_of_trl(capacity: int) -> None:
    trl = pytest.importorskip("trl")
    rng = random.Random(capacity)
    lengths = [rng.randint(0, 2 * capacity if rng.random() < 0.05 else capacity) for _ in range(2300)]
    rows = datasets.Dataset.from_dict({"input_ids": [[number] * length for number, length in enumerate(lengths)]})
    theirs = trl.pack_dataset(rows, capacity, "bfd")["input_ids"]
    assert [list(dict.fromkeys(row)) for row in theirs] == bins_of_trl(lengths, capacity)
    filled = bins([length for length in lengths if length], capacity)
    assert sum(map(len, filled)) == sum(map(bool, lengths))


def test_a_model_that_looks_over_the_edge_is_not_packed() -> None:
    """A convolution over neighbours, which knows of no positions."""

    class Leaky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model = make_target("gpt2", tied=False)
    model.transformer.ln_f = nn.Sequential(Leaky(), model.transformer.ln_f)
    examples = make_uneven()
    run = TargetRun(model, ParameterSpace(model))
    assert run.head is not None
    assert not can_pack(run, examples)
    padded = metagradient(model, examples, RECIPE, METRIC)
    packed = metagradient(model, examples, RECIPE, METRIC, packing=True)
    assert torch.equal(packed.token_N_S, padded.token_N_S)
    assert "not packed" in packed.notes[-1]


def test_fewer_tokens_go_through_the_model() -> None:
    examples, model = make_uneven(33, longest=30), make_target("llama", tied=True)
    seen, counted = list[int](), list[int]()
    handle = model.model.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    for packing in (False, True):
        run = TargetRun(model, ParameterSpace(model), packing=packing)
        seen.clear()
        loss_gradient(run, run.space.read(model), examples, torch.ones(33).double())
        counted.append(sum(seen))
    handle.remove()
    assert counted[1] < counted[0] / 3


def test_a_plan_of_packed_rows() -> None:
    lengths = [5, 3, 2, 7, 1, 4, 6, 2]
    rows = bins_of_trl(lengths, 8)
    batches = Batches(2, epochs=2, order="shuffled", seed=3, pack=8)
    plan = batches.plan(8, lengths)
    by_row = Batches(2, epochs=2, order="shuffled", seed=3).plan(len(rows))
    assert [plan.index(t).tolist() for t in range(len(plan))] == [
        [number for row in by_row.index(t).tolist() for number in rows[row]] for t in range(len(by_row))
    ]
    assert sorted(torch.cat([plan.index(t) for t in range(len(plan) // 2)]).tolist()) == list(range(8))
    with pytest.raises(UsageError, match="9 tokens"):
        batches.plan(2, [9, 3])
    with pytest.raises(ValueError, match="lengths"):
        batches.plan(8)
    assert isinstance(plan, Plan)
