"""Optimisers without a useful derivative, or another one than torch's: refused with the reason, by every door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpg_cli.errors import ConfigError
from dpg_cli.recipes import files
from dpg_cli.settings.config import validate
from dpg_cli.settings.optimizers import why_not

SIGN, FACTORED, BITS = "sign of a momentum", "factored second moments", "rounded to a few bits"
AXOLOTL = {"base_model": "x", "datasets": [], "sequence_len": 8, "micro_batch_size": 2, "learning_rate": 1e-4}
NAMES = [
    ("lion_32bit", SIGN),
    ("paged_lion_32bit", SIGN),
    ("lion_8bit", BITS),
    ("adafactor", FACTORED),
    ("galore_adafactor", FACTORED),
    ("adamw_bnb_8bit", BITS),
    ("adamw_8bit", BITS),
    ("paged_adamw_8bit", BITS),
    ("adamw_torch_4bit", BITS),
    ("galore_adamw", "projects gradients"),
    ("schedule_free_adamw", "another point"),
]


def read(folder: Path, data: dict[str, Any]) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return files.read_recipe(path)


@pytest.mark.parametrize(("name", "why"), NAMES)
def test_settings_and_recipes_say_why(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        validate({"inner": {"optimizer": name}})
    with pytest.raises(ConfigError, match=why):
        read(tmp_path, {"optim": name, "learning_rate": 1e-4, "packing": False})
    with pytest.raises(ConfigError, match=why):
        read(tmp_path, {**AXOLOTL, "optimizer": name})


@pytest.mark.parametrize(
    ("name", "why"),
    [("bitsandbytes.optim.PagedAdamW8bit", BITS), ("torchao.optim.AdamW8bit", BITS), ("x.Lion", SIGN), ("x.Y", "Adam")],
)
def test_torchtune_says_why(name: str, why: str, tmp_path: Path) -> None:
    data = {"optimizer": {"_component_": name, "lr": 1e-4}, "model": {"_component_": "torchtune.models.x"}, "epochs": 1}
    with pytest.raises(ConfigError, match=why):
        read(tmp_path, data)


def test_paged_states_in_full_precision_are_adamw_without_decay(tmp_path: Path) -> None:
    data = {"optim": "paged_adamw_32bit", "learning_rate": 1e-4, "packing": False, "bf16": False}
    assert read(tmp_path, data).settings["inner"]["optimizer"] == "adamw"
    with pytest.raises(ConfigError, match="after the update"):
        read(tmp_path, {**data, "weight_decay": 0.1})


def test_what_is_followed_has_no_reason() -> None:
    assert [why_not(name) for name in ("adamw", "adam", "sgd", "muon", "adamw_torch_fused")] == [""] * 5
    with pytest.raises(ConfigError, match=r"inner\.optimizer"):
        validate({"inner": {"optimizer": "rprop"}})
