"""Adapters (PEFT): merged, beside their base or alone; what is not whole, or cannot be merged, is refused in one line."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import CPU, add_tokenizer, cut, loaded, make, saved
from safetensors.torch import load_file, save_file

from dpg_cli.errors import UsageError
from dpg_cli.models.folder import ModelError
from dpg_cli.models.loading import load

peft = pytest.importorskip("peft")
WEIGHTS = "adapter_model.safetensors"


def trained(base: torch.nn.Module, **options: Any) -> Any:
    """A base with an adapter whose weights are all random, B too."""
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    return wrapped.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_is_merged(architecture: str, beside: bool, options: dict[str, Any], tmp_path: Path) -> None:
    """The loaded model is the adapted one, not its base: alone, by the base that it names; beside, on the base's folder."""
    tied = "modules_to_save" in options and architecture == "gpt2"
    base = saved(make(architecture, tied), tmp_path / "base")
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    wrapped = trained(loaded(base).model, target_modules=targets, **options)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    folder = base if beside else tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    found = load(str(folder), device=CPU)
    assert float((logits(found.model) - logits(wrapped)).abs().max()) < 1e-5
    assert (
        float((logits(found.model) - logits(loaded(saved(make(architecture, tied), tmp_path / "x")).model)).abs().max())
        > 0.01
    )
    assert all(parameter.requires_grad for parameter in found.model.parameters())
    assert not [name for name, _ in found.model.named_parameters() if "lora" in name or "base_layer" in name]
    found.model.save_pretrained(tmp_path / "again")
    add_tokenizer(tmp_path / "again")
    assert torch.equal(logits(load(str(tmp_path / "again"), device=CPU).model), logits(found.model))
    exact = load(str(folder), device=CPU, dtype="float64").model
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float64}


def adapter(tmp_path: Path, **options: Any) -> Path:
    """An adapter alone, beside it its base."""
    base = saved(make("llama"), tmp_path / "base")
    wrapped = trained(loaded(base).model, target_modules=["q_proj"], **options)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def settings(folder: Path, **values: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_bases_place(tmp_path: Path) -> None:
    """Full, from the adapter's folder, or nowhere."""
    folder = adapter(tmp_path)
    wanted = logits(loaded(folder).model)
    settings(folder, base_model_name_or_path="../base")
    assert torch.equal(logits(loaded(folder).model), wanted)
    for base, words in (
        ("someone/base", "adapter .*to the model 'someone/base', which is not on this machine"),
        (str(tmp_path / "gone"), "which is not on this machine"),
        (None, "does not name the model"),
        (str(folder), "which is not on this machine as a plain model folder"),
    ):
        settings(folder, base_model_name_or_path=base)
        with pytest.raises(ModelError, match=words) as caught:
            loaded(folder)
        assert "base_model_name_or_path" in caught.value.remedy
        assert len(str(caught.value).splitlines()) == 1


def test_the_adapters_own_tokeniser_is_taken(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    assert loaded(folder).tokenizer.chat_template is None
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert loaded(folder).tokenizer.chat_template == "{{ messages[0]['content'] }}"


def dropped(folder: Path, part: str) -> None:
    tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if part not in name}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def renamed(folder: Path, before: str, after: str) -> None:
    tensors = {name.replace(before, after): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), "but no adapter_model.safetensors"),
        (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"), "as a pickle"),
        (lambda folder: cut(folder / WEIGHTS), "cut short or damaged"),
        (lambda folder: dropped(folder, "layers.1.self_attn.q_proj.lora_B"), "lacks .*lora_B"),
        (lambda folder: dropped(folder, "lora_A"), "lacks .*lora_A"),
        (lambda folder: renamed(folder, "layers.1", "layers.7"), "does not fit its base"),
        (lambda folder: settings(folder, r=3), "cannot be loaded"),
        (lambda folder: settings(folder, target_modules=["no_such"]), "cannot be loaded"),
        (lambda folder: settings(folder, peft_type="MAGIC"), "cannot be loaded"),
        (lambda folder: settings(folder, modules_to_save=["lm_head"]), "lacks the weights of lm_head"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "no JSON|cannot be loaded"),
    ],
)  # fmt: skip
def test_adapters_that_are_not_whole(beside: bool, damage: Any, words: str, tmp_path: Path) -> None:
    """peft only warns of most of these, and goes on with the base's weights."""
    folder = adapter(tmp_path)
    if beside:
        for file in folder.glob("adapter*"):
            shutil.copy(file, tmp_path / "base")
        folder = tmp_path / "base"
    damage(folder)
    with pytest.raises(ModelError, match=words) as caught:
        loaded(folder)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.remedy


def test_an_adapter_has_no_module_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft imports the module that a Megatron adapter names, from the working folder too."""
    folder = adapter(tmp_path)
    (tmp_path / "hostile.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings(folder, megatron_config={"a": 1}, megatron_core="hostile")
    with pytest.raises(ModelError, match="asks for more than its weights"):
        loaded(folder)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    settings(folder, base_model_name_or_path=str(saved(make("gpt2"), tmp_path / "other")))
    with pytest.raises(ModelError, match="cannot be loaded"):
        loaded(folder)


def test_prompts_cannot_be_merged(tmp_path: Path) -> None:
    base = saved(make("llama"), tmp_path / "base")
    options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    wrapped = peft.get_peft_model(loaded(base).model, options)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is a prompt"):
        loaded(tmp_path / "adapter")


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the base alone in silence."""
    folder = adapter(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"has an adapter .*pip install 'dpg-cli\[peft\]'"):
        loaded(folder)


def test_a_blank_model_has_no_adapter(tmp_path: Path) -> None:
    """Its configuration is the base's; neither base nor adapter need have weights."""
    folder = adapter(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    (folder / WEIGHTS).unlink()
    assert loaded(folder, init="random", seed=2).head.shape == (512, 16)
