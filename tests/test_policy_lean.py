"""Adapters, checkpointed activations and bf16 in the policy step: the same gradient, less memory, runs that go on where they were."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_target
from policies import KL, SPEC, credit_of, gradients, moved, rollout_of, twin_gradients
from safetensors.torch import load_file
from short_run import call
from test_policy_step import close

from dpg_cli.driver.build import build
from dpg_cli.driver.execute import execute
from dpg_cli.driver.state import trained as trained_of
from dpg_cli.engine.generator.contexts import contexts
from dpg_cli.engine.generator.rollout import Sampling
from dpg_cli.engine.generator.step import rows as layout
from dpg_cli.engine.inner.head import find_head
from dpg_cli.models.loading import load_generator
from dpg_cli.models.lora import Lora, adapt, merged_parameters
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.presets import find, resolve

pytest.importorskip("peft")


def adapted(seed: int = 0) -> Any:
    """A GPT-2 with adapters that have already moved."""
    model = adapt(make_target("gpt2", tied=True), Lora(rank=3), seed, "generator")  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.double() + 0.05 * torch.randn(parameter.shape, generator=rng).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("share", [False, True])
def test_adapters_are_a_merged_twin_and_their_base_is_the_reference(
    share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """∂/∂A and ∂/∂B against the chain rule through the gradient of the merged model's weights."""
    monkeypatch.setattr(layout, "members", lambda shape, prompt, completion, group: group)
    model, rollout = adapted(), rollout_of()
    credit, spec = credit_of(rollout, True), replace(SPEC, kl=KL, share=share)
    base = make_target("gpt2", tied=True)
    found, stats = gradients(model, rollout, credit, spec, model)
    assert all(p.requires_grad == (".lora_" in name) for name, p in model.named_parameters())
    expected, wanted = twin_gradients(model, rollout, credit, spec, base)
    close(found, expected)
    assert stats["kl"] == pytest.approx(wanted["kl"], rel=1e-9)
    assert stats["kl"] > 1e-3

    leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
    merged = merged_parameters(model, leaves)
    plain = moved(make_target("gpt2", tied=True), 0.0)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(merged[name])
    by_weight, _ = twin_gradients(plain, rollout, credit, spec, base)
    changed = [name for name in by_weight if merged[name].requires_grad]
    assert len(changed) >= 4
    chain = torch.autograd.grad(
        [merged[name] for name in changed], list(leaves.values()), [by_weight[n] for n in changed]
    )
    close(found, dict(zip(leaves, chain, strict=True)))


def test_a_model_without_adapters_is_no_reference_of_its_own() -> None:
    model, rollout = moved(make_target("gpt2", tied=True)), rollout_of()
    with pytest.raises(ValueError, match="adapters"):
        gradients(model, rollout, credit_of(rollout, False), replace(SPEC, kl=KL), model)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_activations_computed_again_give_the_same(
    architecture: str, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "members", lambda shape, prompt, completion, group: group)
    model, rollout = moved(make_target(architecture, tied=False)), rollout_of()
    credit, spec = credit_of(rollout, True), replace(SPEC, share=share)
    expected, _ = twin_gradients(model, rollout, credit, spec)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    for layer in model.modules():
        made = getattr(layer, "_gradient_checkpointing_func", None)
        if made is not None:

            def counted(*args: Any, made: Any = made, **options: Any) -> Any:
                calls.append(1)
                return made(*args, **options)

            layer._gradient_checkpointing_func = counted
    close(gradients(model, rollout, credit, spec)[0], expected)
    assert len(calls) == 2  # both layers


def test_bf16_is_near_and_leaves_float32_weights() -> None:
    """Forward and backward round to 8 bits: the direction stays, weights and gradients are float32."""
    rollout = rollout_of(dtype=torch.float32)
    model = moved(make_target("gpt2", tied=True, dtype=torch.float32))
    credit = credit_of(rollout, True)
    exact, _ = gradients(model, rollout, credit, SPEC)
    found, _ = gradients(model, rollout, credit, replace(SPEC, precision="bf16"))
    first, second = (torch.cat([value.flatten() for value in each.values()]) for each in (exact, found))
    assert second.dtype == torch.float32
    assert not torch.equal(first, second)
    cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=0))
    assert cosine > 0.995
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_hidden_states_of_shared_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "members", lambda shape, prompt, completion, group: group)
    model, rollout = moved(make_target("gpt2", tied=True)), rollout_of()
    head = find_head(model)
    assert head is not None
    sampling = Sampling(group_size=3, max_tokens=5, min_tokens=1, temperature=1.0, eos_id=0, pad_id=0)
    apart, together = (contexts(model, head, rollout, sampling, share=share).hidden_N_K_D for share in (False, True))
    real = rollout.mask_N_K
    torch.testing.assert_close(together[real], apart[real], rtol=1e-9, atol=1e-12)


RUN = [
    "steps=2", "prompts.per_step=4", "rollout.max_tokens=6", "rollout.min_tokens=2", "dataset.examples=8",
    "dataset.control=false", "policy.parameters=lora", "policy.lora_rank=4", "policy.kl=0.1",
]  # fmt: skip


def test_a_run_of_adapters_by_adamw(tmp_path: Path) -> None:
    """The KL to the base begins at zero, the adapters move it, and the saved generator has them merged. Resuming: `test_resume_variants.py`."""
    config = resolve(find("pattern-67.tiny").data(), [*RUN, "policy.gradient_checkpointing=true"])
    folder = RunFolder(tmp_path / "run")
    execute(config, folder)
    kl = [line["policy_kl"] for line in folder.read_metrics()]
    assert abs(kl[0]) < 1e-6 < kl[1]
    saved = load_file(folder.path / "generator" / "model.safetensors")
    start = load_generator(config.models, torch.device("cpu")).model.state_dict()
    moved_most = {name: float((value - start[name]).abs().max()) for name, value in saved.items() if name in start}
    assert not any("lora" in name for name in saved)
    assert moved_most["transformer.h.0.attn.c_attn.weight"] > 1e-5
    assert moved_most["transformer.wte.weight"] == 0


def test_adapters_need_a_quarter_of_the_memory(tmp_path: Path) -> None:
    """Gradients and moments are those of the adapters, and the KL's reference is no second model."""
    built = {}
    for kind in ("all", "lora"):
        config = resolve(find("pattern-67.tiny").data(), ["policy.kl=0.1", f"policy.parameters={kind}"])
        built[kind] = build(config).players
    trained = {kind: sum(p.numel() for p in trained_of(players).values()) for kind, players in built.items()}
    assert trained["lora"] < trained["all"] / 4
    assert built["lora"].reference is built["lora"].generator.model
    assert built["all"].reference is not built["all"].generator.model


def test_bad_settings_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is loaded; a reference of another name has no place among the settings."""
    monkeypatch.setattr("dpg_cli.driver.build.load_generator", None)
    for extra, said in (
        (['policy.lora_modules=["nothing_such"]'], "no module 'nothing_such'"),
        (["policy.reference=other"], "policy.reference"),
        (["policy.step=natural", "policy.precision=bf16"], "policy.precision"),
        (["policy.step=natural", "policy.gradient_checkpointing=true"], "policy.gradient_checkpointing"),
        (["policy.parameters=head", "policy.gradient_checkpointing=true"], "policy.gradient_checkpointing"),
        (
            ["trainer=trl", "credit.mode=sequence", "policy.parameters=all", "policy.micro_batch_tokens=64"],
            "micro_batch_tokens",
        ),
    ):
        options = [part for one in (*RUN, *extra) for part in ("--set", one)]
        found = call(capsys, monkeypatch, "run", "pattern-67", *options, "--out", tmp_path / "run")
        assert found.code == 2
        assert said in found.err
        assert "Traceback" not in found.err
        assert not (tmp_path / "run").exists()


def test_the_base_keeps_its_weights() -> None:
    model, rollout = adapted(), rollout_of()
    before = copy.deepcopy(model.state_dict())
    gradients(model, rollout, credit_of(rollout, True), replace(SPEC, kl=KL), model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
