"""What `dpg verify` trains by, TRL's SFTTrainer and the plain loop, against our inner run: each element of a recipe. float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from builders import VOCAB, make_target
from test_fidelity import word_tokenizer
from torch import nn

from dpg_cli.driver.recipe import inner_recipe
from dpg_cli.engine import Examples, Replay
from dpg_cli.engine.attribution import InnerSettings
from dpg_cli.engine.inner.packing import bins_of_trl
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.errors import UsageError
from dpg_cli.evidence import stock, stock_trl
from dpg_cli.evidence.stock import stock_side, train
from dpg_cli.evidence.stock_plan import Row, packed, stock_plan
from dpg_cli.evidence.stock_trl import plainly, train_by_trl
from dpg_cli.models.lora import Lora, adapt
from dpg_cli.settings.config import validate
from dpg_cli.settings.inner import InnerConfig

SEED, COUNT, DRAWN = 7, 14, 7  # the dataset is twice an outer step's completions
CPU = torch.device("cpu")
SHUFFLED = {"batch_size": 2, "epochs": 2.0, "order": "shuffled"}
RECIPES: dict[str, tuple[dict[str, Any], Lora | None]] = {
    "schedule, clipping, the Trainer's groups": (
        {
            **SHUFFLED, "weight_decay": 0.2, "no_decay": ["biases", "norms"], "schedule": "cosine", "warmup": 0.2,
            "lr_floor": 0.1, "max_grad_norm": 0.5, "accumulation": 2,
        },
        None,
    ),
    "own groups, Adam, so many steps": (
        {
            "optimizer": "adam", "batch_size": 3, "max_steps": 5, "weight_decay": 0.1, "schedule": "polynomial",
            "groups": [{"names": ["*mlp*"], "lr": 0.004}, {"names": ["*.0.*"], "frozen": True}],
        },
        None,
    ),
    "LoRA": ({**SHUFFLED, "schedule": "linear", "max_grad_norm": 1.0}, Lora(3, 6.0)),
    "averaged weights": ({**SHUFFLED, "ema": 0.7, "schedule": "linear"}, Lora(3, 6.0)),
    "replay": ({**SHUFFLED, "replay": "own.jsonl", "replay_share": 0.4, "max_grad_norm": 0.5}, None),
    "packed rows": ({**SHUFFLED, "packed_rows": 16, "max_length": 16}, None),
}  # fmt: skip


def sequences(count: int = COUNT) -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(VOCAB, size=size).astype(np.int32) for size in random.integers(2, 13, size=count)]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Relative to the update; without GPT-2's key bias, see `test_fidelity.distance`."""
    names = [name for name in ours if not name.endswith("c_attn.bias")]
    gap = sum(float((ours[name] - theirs[name]).square().sum()) for name in names)
    return (gap / sum(float((theirs[name] - start[name]).square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("name", RECIPES)
def test_trl_and_the_plain_loop_train_as_the_inner_run(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl")
    settings, lora = RECIPES[name]
    inner = validate({"inner": {"eps": 1e-8, "lr": 0.01, **settings}}).inner
    start: Any = make_target("llama" if lora else "gpt2", tied=True)
    start = adapt(start, lora, SEED) if lora else start
    rows = sequences()
    own = [Row(row.tolist(), [place > 1 for place in range(len(row))]) for row in sequences(5)] if inner.replay else []
    plan = stock_plan(rows, inner, inner.steps_of_epoch(DRAWN), SEED, DRAWN, own)

    examples, recipe = Examples.from_sequences([row.tolist() for row in rows]), inner_recipe(inner, SEED)
    recipe = type(recipe)(**{**recipe.__dict__, "batches": recipe.batches.rescaled(DRAWN, COUNT)})
    model = copy.deepcopy(start)
    replay = Replay(Examples.from_sequences([list(row.ids) for row in own], prefix=2), 0.4) if own else None
    examples, laid = InnerSettings(recipe, replay=replay).laid_out(examples)
    with recipe.prepared(model):
        run = TargetRun(model, recipe.space(model))
        theta = run.space.read(model)
        trace = inner_run(run, theta, examples, recipe, theta.new_ones(len(examples)), plan=laid)
        ours, before = ({n: v.clone() for n, v in run.space.views(at).items()} for at in (trace.theta, theta))
    assert [sorted(step) for step in plan.steps] == [
        sorted(trace.plan.index(number).tolist()) for number in range(len(trace.plan))
    ]
    assert len(plan.steps) > 2

    plain = copy.deepcopy(start)
    train(plain.eval(), plan, inner)
    assert apart(ours, trained(plain), before) < 1e-10
    seen: list[tuple[int, int]] = []
    capfd.readouterr()
    by_trl = train_by_trl(
        copy.deepcopy(start), word_tokenizer(), plan, inner, SEED, 2, lambda done, whole: seen.append((done, whole))
    )
    assert capfd.readouterr().out == ""  # stdout is the verdict's
    assert apart(ours, trained(by_trl), before) < 1e-10
    assert seen[-1] == (sum(map(len, plan.steps)),) * 2 and len(seen) == len(plan.steps)
    assert plainly(inner) == (not name.startswith("own"))  # else torch's optimiser is handed over


def test_packed_rows_are_those_of_trl() -> None:
    lengths = np.random.default_rng(0).integers(0, 30, size=2300).tolist()
    assert packed(lengths, 40) == bins_of_trl(lengths, 40)


def test_who_trains_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, muon = validate({}), validate({"inner": {"optimizer": "muon"}})
    assert not stock_side(plain, "plain", CPU).trl
    if stock.find_spec("trl") is not None:
        assert stock_side(plain, "auto", CPU).about.startswith("TRL 1.")
        assert "one optimiser" in stock_side(muon, "auto", CPU).about
        with pytest.raises(UsageError, match="one optimiser"):
            stock_side(muon, "trl", CPU)
        monkeypatch.setattr(stock_trl, "version", lambda name: "1.9.2")
        assert "TRL 1.9.2 is older than 1.16" in stock_side(plain, "auto", CPU).about
    monkeypatch.setattr(stock, "find_spec", lambda name: None)
    assert stock_side(plain, "auto", CPU) == stock.StockSide(
        False, "a plain loop of torch.optim (TRL is not installed)"
    )
    with pytest.raises(UsageError, match="not installed"):
        stock_side(plain, "trl", CPU)
    with pytest.raises(UsageError, match="no trainer 'axolotl'"):
        stock_side(plain, "axolotl", CPU)


def test_a_row_says_what_it_trains() -> None:
    plan = stock_plan(sequences(3), InnerConfig(), 1, 0)
    assert [row.tokens for row in plan.rows] == [len(row.ids) - 1 for row in plan.rows]
