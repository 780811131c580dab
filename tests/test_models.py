"""Loading models: untying keeps the head, blank models are equal under a seed, bad names give one clear error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import make_target

from dpg_cli.engine.params import ParameterSpace
from dpg_cli.errors import UsageError
from dpg_cli.models import load, pick_device, same_tokenizer, untie_head
from dpg_cli.tiny import MODEL_DIR

CPU = torch.device("cpu")


def save_with_tokenizer(model: torch.nn.Module, folder: Path) -> None:
    """A checkpoint of another architecture, with the embedded tokeniser's files beside it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL_DIR / name).read_bytes())


def test_untying_keeps_the_heads_values() -> None:
    model = load("tiny", device=CPU).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, size = model.get_output_embeddings().weight.detach().clone(), ParameterSpace(model).size
    untie_head(model)
    head = model.get_output_embeddings().weight
    assert head is not model.get_input_embeddings().weight
    assert torch.equal(head, before)
    assert ParameterSpace(model).size == size + before.numel()
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, load("tiny", device=CPU).model(input_ids=ids).logits)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_checkpoints_load(architecture: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = type(make_target(architecture, tied=tied))(make_target(architecture, tied=tied).config)
    save_with_tokenizer(model, tmp_path / "model")
    loaded = load(str(tmp_path / "model"), device=CPU)
    assert (loaded.head is loaded.model.get_input_embeddings().weight) == tied
    assert torch.equal(loaded.head, model.get_output_embeddings().weight)
    untie_head(loaded.model)
    assert torch.equal(loaded.head, model.get_output_embeddings().weight)
    loaded.model.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "tokenizer.json").write_bytes((MODEL_DIR / "tokenizer.json").read_bytes())
    (tmp_path / "again" / "tokenizer_config.json").write_bytes((MODEL_DIR / "tokenizer_config.json").read_bytes())
    again = load(str(tmp_path / "again"), device=CPU)
    assert again.head is not again.model.get_input_embeddings().weight
    assert same_tokenizer(again, loaded)


def test_blank_models_are_equal_under_a_seed_and_leave_the_rng_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (load("tiny", device=CPU, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.head, second.head)
    assert not torch.equal(first.head, other.head)
    assert not torch.equal(first.head, load("tiny", device=CPU).head)


def test_bad_models_give_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for name in (str(tmp_path / "empty"), str(tmp_path / "missing"), str(broken), "nobody/no-such-model"):
        with pytest.raises(UsageError, match=r"no model folder|cannot be loaded") as caught:
            load(name, device=CPU)
        assert len(str(caught.value).splitlines()) == 1
        assert caught.value.remedy


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    for name in ("cuda:99", "quantum"):
        with pytest.raises(UsageError, match="cannot be used"):
            pick_device(name)
