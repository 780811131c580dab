"""Targets as people bring them: wrapped, compiled, with adapters, in half precision, with experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import make_target
from torch import Tensor, nn
from toys import Block, ToyLM
from zoo.judge import ADAMW, HeldOut, judge, rows
from zoo.tiny import tiny_model

from dpg_cli.engine import Metagradient, OptimizerSpec, metagradient
from dpg_cli.engine.attribution import InnerSettings, effect
from dpg_cli.engine.inner.prepare import prepared, unwrap
from dpg_cli.errors import UsageError

SPEC = OptimizerSpec("adamw", lr=0.02, beta1=0.8, beta2=0.95, eps=0.03, weight_decay=0.1)
METRIC = HeldOut(rows(3, 5))


def attribution(model: nn.Module, **options: Any) -> Metagradient:
    return metagradient(model, rows(6, 0), SPEC, METRIC, batch_size=3, **options)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compiled_layers(model: Any) -> nn.Module:
    for place, block in enumerate(model.transformer.h):
        model.transformer.h[place] = torch.compile(block)
    return model


class DistributedDataParallel(nn.Module):
    """As torch's, which needs a process group: the module is an attribute, and forward goes to it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


OPENED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": torch.compile,
    "model.compile": compiled_in_place,
    "its layers": compiled_layers,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "both": lambda model: DistributedDataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("way", OPENED)
def test_a_wrapped_model_gives_the_numbers_of_the_model(way: str) -> None:
    plain = attribution(make_target("gpt2", tied=True))
    model = make_target("gpt2", tied=True)
    wrapped = OPENED[way](model)
    result = attribution(wrapped)
    assert relative(result.token_N_S, plain.token_N_S) < 1e-12
    assert result.value == pytest.approx(plain.value, rel=1e-12)
    if way != "its layers":  # whose names have the wrapper in them
        assert set(result.final) == set(plain.final)
    assert not any(parameter.grad is not None for parameter in model.parameters())


class FullyShardedDataParallel(DistributedDataParallel):
    """By its name."""


class DeepSpeedEngine(DistributedDataParallel):
    """By its name."""


class LightningModule(DistributedDataParallel):
    """By its name."""


def quantised(model: nn.Module) -> nn.Module:
    model.is_quantized = True
    return model


def on_meta(model: nn.Module) -> nn.Module:
    return model.to("meta")


def mixed_forward(model: nn.Module) -> nn.Module:
    model._original_forward = model.forward
    return model


CLOSED: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "FSDP": (FullyShardedDataParallel, "FullyShardedDataParallel"),
    "DeepSpeed": (DeepSpeedEngine, "DeepSpeedEngine"),
    "Lightning": (LightningModule, "LightningModule"),
    "sharded within": (lambda model: nn.DataParallel(DistributedDataParallel(FullyShardedDataParallel(model))), "FullyS"),
    "quantised": (quantised, "quantised"),
    "meta": (on_meta, "meta device"),
    "accelerate": (mixed_forward, "mixed precision"),
}  # fmt: skip


@pytest.mark.parametrize("way", CLOSED)
def test_other_wrappers_are_refused_by_name(way: str) -> None:
    wrap, cause = CLOSED[way]
    with pytest.raises(UsageError, match=cause) as caught:
        attribution(wrap(make_target("gpt2", tied=True)))
    assert caught.value.remedy


def test_lora_is_right_and_its_base_stays() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.1)
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    verdict = judge(model)
    assert verdict.size > 1e-5
    assert verdict.error < 1e-6
    assert set(attribution(model).final) == trained
    assert all("lora" in name for name in trained)


def test_peft_without_adapters_is_its_base_and_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.delete_adapter("default")
    assert not model.peft_config
    assert unwrap(model) is base
    base.requires_grad_(True)  # PEFT has frozen it
    assert set(attribution(model).final) == {name for name, _ in base.named_parameters()}
    prompt = peft.get_peft_model(
        tiny_model("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(UsageError, match="PromptTuningConfig"):
        attribution(prompt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_half_precision_weights_have_float32_masters(architecture: str, dtype: torch.dtype) -> None:
    """A step of 1e-5 would be lost in a bf16 weight: the run is that of the same weights in float32."""
    model = make_target(architecture, tied=True).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exact = attribution(make_twin(model, architecture, torch.float64))
    result = attribution(model)
    assert result.example_N.dtype == torch.float32
    assert relative(result.token_N_S, exact.token_N_S) < 1e-3
    assert all(value.dtype == torch.float32 for value in result.final.values())
    assert "keeps them in float32" in " ".join(result.notes)
    after = model.state_dict()
    assert all(value.dtype == dtype and torch.equal(value, before[name]) for name, value in after.items())
    same = effect(model, rows(6, 0), METRIC, InnerSettings(SPEC, 3))
    assert same.value == pytest.approx(result.value, rel=1e-6)


def make_twin(model: nn.Module, architecture: str, dtype: torch.dtype) -> nn.Module:
    twin = make_target(architecture, tied=True)
    twin.load_state_dict(model.state_dict())
    return twin.to(dtype)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_experts_in_float32_take_what_has_a_derivative_and_give_it_back(name: str) -> None:
    """The implementation that a loaded model has, grouped_mm, has no forward derivative."""
    model = tiny_model(name).float()
    model.set_experts_implementation("grouped_mm")
    exact = attribution(tiny_model(name))
    result = attribution(model)
    assert relative(result.token_N_S, exact.token_N_S) < 1e-3
    assert "Experts ran as 'eager'" in " ".join(result.notes)
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(UsageError), prepared(model):
        raise UsageError("anything")
    assert model.config._experts_implementation == "grouped_mm"


def test_each_module_has_its_own_mode_afterwards() -> None:
    model = make_target("gpt2", tied=True).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    attribution(model)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


def test_the_double_backward_is_chosen_by_itself_and_said_once() -> None:
    result = attribution(tiny_model("bloom"))
    assert len(result.notes) == 1
    assert "double backward" in result.notes[0]
    assert not attribution(tiny_model("gpt2")).notes
    labels = attribution(tiny_model("bloom"), labels=True)
    assert labels.label_N_S_V is not None
    sampled = labels.label_N_S_V.gather(-1, rows(6, 0).ids_N_S[..., None])[..., 0]
    assert relative(sampled, result.token_N_S) < 1e-9


def test_a_pass_that_pytorch_gets_wrong_gives_way_to_the_double_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own reverse of a layer norm's tangent is wrong without a word: without our form, the check must find it."""
    from dpg_cli.engine.reverse.forms import table

    for function in (nn.functional.layer_norm, torch.layer_norm):
        monkeypatch.delitem(table.REPLACED, function)
    model = ToyLM(Block(lambda hidden, first, second: nn.functional.layer_norm(first(hidden), (8,)) + second(hidden)))
    verdict = judge(model, ADAMW)
    assert verdict.error < 1e-6
    assert "double backward" in " ".join(verdict.notes)
