"""The snippets of docs/recipes.md run, and its commands are ones that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from builders import HeldOutLoss, make_examples, make_target

from dpg_cli.attribution.checkpoint import read_checkpoint
from dpg_cli.cli.app import app
from dpg_cli.engine import Batches, OptimizerSpec, Recipe, metagradient
from dpg_cli.recipes import read_recipe
from dpg_cli.settings.config import LoraConfig

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"```python\n# (\w+)[^\n]*\n(.*?)```", PAGE, re.DOTALL))


def test_saved_arguments_are_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    exec(SNIPPETS["save"], {})
    inner = read_recipe(tmp_path / "recipe.json").settings["inner"]
    assert (inner["schedule"], inner["epochs"], inner["accumulation"], inner["max_length"]) == ("cosine", 3.0, 2, 512)


def test_the_library_snippets_run() -> None:
    rows = make_examples(6)
    sequences = [ids[real].tolist() for ids, real in zip(rows.ids_N_S, rows.attention_N_S, strict=True)]
    names: dict[str, Any] = {
        "model": make_target("gpt2", tied=True), "metric": HeldOutLoss(make_examples(3, seed=9)), "sequences": sequences
    }  # fmt: skip
    exec(SNIPPETS["library"], names)
    result = names["result"]
    assert len(result.visits.credit_M) == 12  # six examples, two epochs
    assert torch.allclose(result.visits.credit_M.sum(), result.example_N.sum())
    assert 0 <= result.stats["clipped_share"] <= 1
    exec(SNIPPETS["plan"], names)
    assert bool((names["result"].example_N[4:] == 0).all()) and bool((names["result"].example_N[:4] != 0).all())


def test_a_loop_of_one_s_own_saves_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, examples = make_target("gpt2", tied=True), make_examples(6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.0)
    recipe = Recipe(OptimizerSpec("adamw", lr=1e-3, eps=1e-4), batches=Batches(2))
    for step in (1, 2, 3):
        batch = examples.rows(2 * step - 2, 2 * step)
        labels = batch.ids_N_S.masked_fill(~batch.label_N_S, -100)
        loss = model(input_ids=batch.ids_N_S).logits[:, :-1].transpose(1, 2)
        torch.nn.functional.cross_entropy(loss, labels[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 2:
            exec(SNIPPETS["checkpoint"], {"model": model, "optimizer": optimizer, "step": step})
    fresh = make_target("gpt2", tied=True)
    known = read_checkpoint(tmp_path / "mine.safetensors", fresh, recipe, 3, LoraConfig())
    final = metagradient(fresh, examples, recipe, HeldOutLoss(make_examples(3, seed=9)), start=known.start).final
    apart = max(float((final[name] - p).detach().abs().max()) for name, p in model.named_parameters())
    assert apart < 1e-12


def test_the_commands_are_known() -> None:
    command: Any = typer.main.get_command(app)
    known = {flag for parameter in command.commands["attribute"].params for flag in parameter.opts}
    blocks = re.findall(r"```\n(dpg .*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 2
    used = {word for block in blocks for word in shlex.split(block.replace("\\\n", " ")) if word.startswith("--")}
    assert len(used) >= 10 and used <= known
