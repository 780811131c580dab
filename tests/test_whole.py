"""Natural steps on all of a generator's parameters, or on its adapters: in float64 against explicit matrices, autograd and
measured KL; and whole runs of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import VOCAB, make_target
from test_scalar import natural
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dpg_cli.driver import build as build_module
from dpg_cli.driver.build import build
from dpg_cli.driver.execute import StopRequest, execute
from dpg_cli.engine.generator.contexts import contexts, standard_head
from dpg_cli.engine.generator.policy import completion_logits
from dpg_cli.engine.generator.rollout import Sampling
from dpg_cli.engine.inner import head as head_module
from dpg_cli.engine.loop import outer_step
from dpg_cli.engine.natural.head_policy import LabelGradient, add_advantages
from dpg_cli.engine.natural.step import NaturalSpec
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.records import Credit, Rollout
from dpg_cli.engine.soft import HeadLabels
from dpg_cli.engine.whole import fisher as fisher_module
from dpg_cli.engine.whole.policy import WholePolicy
from dpg_cli.errors import DegenerateError, InterruptedRunError, UsageError
from dpg_cli.models.fingerprint import fingerprint
from dpg_cli.models.loading import load
from dpg_cli.models.lora import Lora, adapt, without_adapters
from dpg_cli.runs.folder import RunFolder

N, Q, K, TEMPERATURE = 3, 3, 4, 1.3
KINDS = ("gpt2 tied", "gpt2 untied", "llama untied", "gpt2 lora", "llama lora")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 100)
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 2)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def make_model(kind: str) -> nn.Module:
    name, form = kind.split()
    model: Any = make_target(name, tied=form == "tied")
    if form != "lora":
        return model
    adapted = adapt(model, Lora(2, 4.0, ("c_proj",) if name == "gpt2" else ("down_proj", "q_proj")), 0).double().eval()
    with torch.no_grad():
        for parameter in adapted.parameters():  # B too: at zero it would leave A without a derivative
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double())
    return adapted


def make_rollout() -> Rollout:
    """Ragged prompts, padded on the left, and ragged completions."""
    rng = torch.Generator().manual_seed(4)
    prompt, ids = (torch.randint(1, VOCAB, (N, width), generator=rng) for width in (Q, K))
    prompt_mask, mask = torch.ones(N, Q, dtype=torch.bool), torch.ones(N, K, dtype=torch.bool)
    prompt_mask[1, :2] = mask[0, 3:] = mask[2, 2:] = False
    return Rollout([""] * N, prompt, prompt_mask, ids, mask, torch.zeros(N, K).double(), 1, 0.0)


def make(kind: str, **spec: Any) -> tuple[WholePolicy, Rollout, HeadLabels]:
    torch.manual_seed(0)
    model, rollout = make_model(kind), make_rollout()
    policy = WholePolicy(NaturalSpec(**spec), model, micro_batch=2)
    sampling = Sampling(group_size=1, max_tokens=K, min_tokens=1, temperature=TEMPERATURE, eos_id=0, pad_id=0)
    return policy, rollout, contexts(model, standard_head(model), rollout, sampling)


def flat_gradient(value: Tensor, model: nn.Module) -> Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(trained, grads, strict=True)]
    )


def log_pi(model: nn.Module, rollout: Rollout) -> Tensor:
    """Of the completion tokens, (M, V), by the model's own logits and masks."""
    return torch.log_softmax(completion_logits(model, rollout)[rollout.mask_N_K] / TEMPERATURE, -1)


def explicit(model: nn.Module, rollout: Rollout) -> Tensor:
    """F from every logit's gradient."""
    logits = completion_logits(model, rollout)[rollout.mask_N_K]
    total: Any = 0
    for row in logits:
        jacobian = torch.stack([flat_gradient(one, model) for one in row])
        q = torch.softmax(row.detach() / TEMPERATURE, -1)
        total = total + jacobian.mT @ (q.diag() - q[:, None] * q) @ jacobian
    return total / len(logits) / TEMPERATURE**2


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_explicit_fisher(kind: str) -> None:
    policy, rollout, labels = make(kind)
    reader, theta, places = policy.contexts(rollout), policy.space.read(policy.model), policy.places(rollout.mask_N_K)
    assert reader.tokens == len(places) == 9
    assert relative(reader.hidden(theta), labels.hidden(places)) < 1e-12
    matrix = explicit(policy.model, rollout)
    vector = torch.randn(len(theta), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = reader.product(theta, vector, lambda part: labels.at(places[part]), TEMPERATURE)
    assert relative(found, matrix @ vector) < 1e-9
    assert float(found.norm()) > 1e-3


def test_the_diagonal_is_that_of_the_fisher_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_module, "PROBES", 400)
    policy, rollout, labels = make("gpt2 lora")
    reader, theta, places = policy.contexts(rollout), policy.space.read(policy.model), policy.places(rollout.mask_N_K)
    rng = torch.Generator().manual_seed(3)
    found = reader.diagonal(theta, reader.hidden(theta), lambda part: labels.at(places[part]), TEMPERATURE, rng)
    exact = explicit(policy.model, rollout).diagonal().clone()
    for view in policy.space.views(exact).values():
        view.lerp_(view.mean().expand_as(view), 0.5)
    assert relative(found, exact) < 0.1
    assert bool((found > 0).all())


@pytest.mark.parametrize("kind", ["gpt2 lora", "llama lora"])
def test_the_direction_is_that_of_a_dense_solve(kind: str) -> None:
    policy, rollout, labels = make(kind, iterations=500, tolerance=1e-11, damping=0.1)
    reader, theta, places = policy.contexts(rollout), policy.space.read(policy.model), policy.places(rollout.mask_N_K)
    gradient = torch.randn(len(theta), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden, rng = reader.hidden(theta), torch.Generator()

    def q(part: slice) -> Tensor:
        return labels.at(places[part])

    found = policy.direction(reader, theta, hidden, q, TEMPERATURE, gradient.clone(), rng.manual_seed(7))
    diagonal = reader.diagonal(theta, hidden, q, TEMPERATURE, rng.manual_seed(7))
    dense = torch.linalg.solve(explicit(policy.model, rollout) + 0.1 * diagonal.diag(), gradient)
    assert relative(found.x, dense) < 1e-7


def random_gradient(policy: WholePolicy, rollout: Rollout, labels: HeadLabels) -> tuple[LabelGradient, Tensor, Credit]:
    """Credits of labels, and advantages, put into a gradient by two calls."""
    rng = torch.Generator().manual_seed(9)
    places = policy.places(rollout.mask_N_K)
    credit = torch.randn(len(places), VOCAB, generator=rng, dtype=torch.float64)
    advantage = torch.randn(N, K, generator=rng, dtype=torch.float64)
    gradient = LabelGradient.like(labels, places, backbone=True)
    for part in (slice(0, 5), slice(5, None)):
        at = places[part]
        gradient.add(labels, at, rollout.ids_N_K.flatten()[at], labels.at(at), credit[part].clone())
    whole = Credit(advantage)
    add_advantages(gradient, labels, rollout, whole)
    return gradient, credit, whole


@pytest.mark.parametrize("kind", KINDS)
def test_credits_reach_all_parameters(kind: str) -> None:
    policy, rollout, labels = make(kind)
    gradient, credit, whole = random_gradient(policy, rollout, labels)
    assert gradient.hidden_bar is not None
    reader, theta = policy.contexts(rollout), policy.space.read(policy.model)
    own = standard_head(policy.model).weight in policy.space.names
    found = reader.pull(theta, gradient.hidden_bar[policy.places(rollout.mask_N_K)], gradient.total)
    logs = log_pi(policy.model, rollout)
    chosen = logs.gather(1, rollout.ids_N_K[rollout.mask_N_K][:, None])[:, 0]
    value = (logs.exp() * credit).sum() + (whole.advantage_N_K[rollout.mask_N_K] * chosen).sum()
    assert relative(found, flat_gradient(value, policy.model)) < 1e-10
    assert own == (not kind.endswith("lora"))


@pytest.mark.parametrize("kind", ["gpt2 tied", "llama untied", "gpt2 lora"])
def test_small_steps_cost_what_they_are_to(kind: str) -> None:
    policy, rollout, labels = make(kind, trust=1e-7, iterations=30)
    before = log_pi(policy.model, rollout).detach()
    gradient, credit, _ = random_gradient(policy, rollout, labels)
    gradient.total.zero_()
    gradient.hidden_bar = torch.zeros_like(gradient.hidden_bar)  # type: ignore[arg-type]
    places = policy.places(rollout.mask_N_K)
    gradient.add(labels, places, rollout.ids_N_K.flatten()[places], labels.at(places), credit.clone())
    numbers = policy.step(labels, rollout, gradient, 0.0, torch.Generator())
    after = log_pi(policy.model, rollout).detach()
    measured = float((after.exp() * (after - before)).sum(1).mean())
    assert numbers["step_kl"] == pytest.approx(measured, rel=1e-6)
    assert measured == pytest.approx(1e-7, rel=0.01)
    assert numbers["kl"] == pytest.approx(measured, rel=1e-6)
    assert float(((after.exp() - before.exp()) * credit).sum()) > 0


def test_the_whole_keeps_to_the_budget_and_a_coefficient_pulls_back() -> None:
    policy, rollout, labels = make("gpt2 lora", trust=0.02, kl_budget=0.03)
    for step in range(8):
        gradient, *_ = random_gradient(policy, rollout, labels)
        numbers = policy.step(labels, rollout, gradient, float(step), torch.Generator())
        sampling = Sampling(group_size=1, max_tokens=K, min_tokens=1, temperature=TEMPERATURE, eos_id=0, pad_id=0)
        labels = contexts(policy.model, standard_head(policy.model), rollout, sampling)
        assert 0 < numbers["kl"] <= 0.03
    assert numbers["kl"] > 0.028
    gradient, *_ = random_gradient(policy, rollout, labels)
    gradient.scale(1e-6)
    policy.spec, policy.trust = replace(policy.spec, kl=1.0), 0.002
    back = policy.step(labels, rollout, gradient, 4.0, torch.Generator())
    assert back["kl"] < 0.8 * numbers["kl"]


def test_a_gradient_that_is_not_finite_leaves_the_generator_alone() -> None:
    policy, rollout, labels = make("gpt2 untied")
    gradient, *_ = random_gradient(policy, rollout, labels)
    gradient.scale(float("nan"))
    before = policy.space.read(policy.model)
    with pytest.raises(DegenerateError, match="not finite"):
        policy.step(labels, rollout, gradient, 0.0, torch.Generator())
    assert torch.equal(policy.space.read(policy.model), before)


SMALL = ("policy.fisher_tokens=160", "policy.cg_iterations=6", "prompts.per_step=32", "steps=2", "policy.lora_rank=2")


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_a_run_is_saved_as_an_ordinary_checkpoint_and_goes_on_to_the_same_end(parameters: str, tmp_path: Path) -> None:
    config = natural(f"policy.parameters={parameters}", *SMALL)
    whole, cut, stop = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "cut"), StopRequest()
    execute(config, whole)
    rows = whole.read_metrics()
    assert all(0 < row["policy_kl"] <= 0.02 for row in rows)
    assert rows[1]["phi_z"] > 0.2
    trained: Any = AutoModelForCausalLM.from_pretrained(whole.generator)
    start = dict(load("tiny", device=torch.device("cpu")).model.named_parameters())
    changed = {name for name, value in trained.named_parameters() if not torch.equal(value, start[name])}
    assert "transformer.h.0.attn.c_attn.weight" in changed
    assert ("transformer.wte.weight" in changed) == (parameters == "all")
    assert len(start) == len(dict(trained.named_parameters()))

    def ask(report: Any) -> None:
        stop.asked = report.step == 0

    with pytest.raises(InterruptedRunError):
        execute(config, cut, stop=stop, on_step=ask)
    execute(cut.read_config(), cut, resume=True)
    name = Path("generator") / "model.safetensors"
    assert (cut.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_adapters_are_trained_by_adamw_too_and_leave_the_base_alone() -> None:
    built = build(natural("policy.step=adamw", "inner.labels=drawn", "policy.parameters=lora", *SMALL))
    model = built.players.generator.model
    before = ParameterSpace(model).read(model)
    base = fingerprint(load("tiny", device=torch.device("cpu")))
    outer_step(built.players, built.spec, built.prompts.at(0), 0)
    assert not torch.equal(ParameterSpace(model).read(model), before)
    assert fingerprint(built.players.generator) == base
    assert set(without_adapters(model).state_dict()) == set(load("tiny", device=torch.device("cpu")).model.state_dict())


def test_a_module_that_is_not_there_is_refused_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(build_module, "load_target", refuse)
    monkeypatch.setattr(build_module, "load_generator", refuse)
    with pytest.raises(UsageError, match=r"generator has no module 'c_atn'.*c_attn"):
        build(natural("policy.parameters=lora", "policy.lora_modules=['c_atn']"))


def test_a_generator_without_a_right_forward_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("gpt2 tied", "llama lora"):
        make(kind)[0].require_products("fine")
    policy, product = make("llama untied")[0], fisher_module.Contexts.product

    def wrong(*args: Any) -> Tensor:
        return 3 * product(*args)

    def none(*args: Any) -> Tensor:
        raise NotImplementedError("Trying to use forward AD with such that does not support it")

    for broken, says in ((wrong, "is to cost 0.001 nats"), (none, "forward AD")):
        monkeypatch.setattr(fisher_module.Contexts, "product", broken)
        with pytest.raises(UsageError, match=f"'mine' cannot take natural steps of more than its head: .*{says}"):
            policy.require_products("mine")
