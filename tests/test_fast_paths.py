"""The engine's fast paths against plain PyTorch in float64, and the choices of memory against each other."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconConfig, FalconForCausalLM

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, metagradient
from dpg_cli.engine.inner import head as head_module
from dpg_cli.engine.inner import tape as tape_module
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.inner.remembered import Remembered
from dpg_cli.engine.inner.run import inner_run
from dpg_cli.engine.inner.tape import Memory, SqrtTape, Step
from dpg_cli.engine.inner.target import TargetRun, fused_activations, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.errors import UsageError
from dpg_cli.models import allocator

ADAMW = OptimizerSpec("adamw", lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, eps_root=1e-5, weight_decay=0.1)
SGD = OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.01)
METRIC = HeldOutLoss(make_examples(4, seed=9))


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-12
    return float(((value - reference).norm() / reference.norm()).detach())


def plain_reference(
    run: TargetRun, theta: Tensor, direction: Tensor, batch: Examples, weights: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """Loss, gradient, Hessian-vector product and token credits by nothing but autograd, differentiated twice."""
    leaf = theta.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        kwargs = {"input_ids": batch.ids_N_S, "use_cache": False}
        logits = functional_call(run.model, run.space.views(leaf), (), kwargs).logits[:, :-1]
    losses = -torch.log_softmax(logits, -1).gather(-1, batch.ids_N_S[:, 1:, None])[..., 0]
    losses = losses * batch.label_N_S[:, 1:] / run.normalizer(batch)
    loss = (losses.sum(1) * weights).sum()
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (product,) = torch.autograd.grad(grad @ direction, leaf, retain_graph=True)
    tokens = torch.zeros(batch.ids_N_S.shape, dtype=theta.dtype)
    for row, column in batch.label_N_S.nonzero().tolist():
        (one,) = torch.autograd.grad(losses[row, column - 1], leaf, retain_graph=True)
        tokens[row, column] = one @ direction
    return float(loss.detach()), grad.detach(), product, tokens


@pytest.mark.parametrize("closed_head", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_both_passes_equal_double_backward(
    architecture: str, tied: bool, closed_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK", 29 * 4)  # four tokens a chunk
    model, batch = make_target(architecture, tied=tied), make_examples(5)
    rng = torch.Generator().manual_seed(3)
    weights = 1 + torch.rand(5, dtype=torch.float64, generator=rng)
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1], 2, closed_head)
    assert (run.head is not None) == closed_head
    theta = run.space.read(model)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=rng)
    loss, grad, product, tokens = plain_reference(run, theta, direction, batch, weights)

    remembered = Remembered()
    fast_grad, fast_loss = loss_gradient(run, theta, batch, weights, remembered)
    assert abs(fast_loss - loss) < 1e-12
    assert relative(fast_grad, grad) < 1e-9
    for known in (None, remembered):
        into = torch.ones_like(theta)
        dual = dual_pass(
            run, theta, direction, batch, weights, need_hvp=True, need_labels=True, hvp_into=into, remembered=known
        )
        assert dual.hvp is into
        assert relative(into - 1, product) < 1e-9
        assert relative(dual.token_B_S, tokens) < 1e-9
        assert dual.label_B_S_V is not None
        assert relative(dual.label_B_S_V.gather(-1, batch.ids_N_S[..., None])[..., 0], tokens) < 1e-9
        assert bool((dual.label_B_S_V[~batch.label_N_S] == 0).all())
    assert not remembered.pieces
    cheap = dual_pass(run, theta, direction, batch, weights, need_hvp=False, need_labels=False)
    assert cheap.hvp is None
    assert relative(cheap.token_B_S, tokens) < 1e-9


@pytest.mark.parametrize("closed_head", [True, False])
def test_remembered_products_are_not_made_again(closed_head: bool) -> None:
    model, batch = make_target("gpt2", tied=False), make_examples(5)
    weights = torch.ones(5, dtype=torch.float64)
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1], 2, closed_head)
    theta = run.space.read(model)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    remembered, tight = Remembered(), Remembered(limit=10_000)
    loss_gradient(run, theta, batch, weights, remembered)
    loss_gradient(run, theta, batch, weights, tight)
    assert 0 < tight.bytes <= 10_000 < remembered.bytes
    counts, products = [], []
    for known in (None, tight, remembered):
        with FlopCounterMode(display=False) as counter:
            dual = dual_pass(run, theta, direction, batch, weights, need_hvp=True, need_labels=False, remembered=known)
        products.append(dual.hvp)
        counts.append(counter.get_total_flops())
    assert counts[0] > counts[1] > counts[2]
    assert counts[2] < 0.8 * counts[0]
    assert all(relative(other, products[0]) < 1e-12 for other in products[1:])


def test_only_the_last_steps_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(12)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])

    def steps() -> list[Step]:
        ones = torch.ones(12, dtype=torch.float64)
        return inner_run(run, run.space.read(model), examples, ADAMW, ones, 3, remember=True).steps

    every = [step.remembered for step in steps()]
    sizes = [remembered.bytes for remembered in every if remembered is not None]
    assert len(sizes) == 4
    monkeypatch.setattr(tape_module, "LIMIT", sizes[2] + sizes[3])
    assert [step.remembered is not None for step in steps()] == [False, False, True, True]


def test_what_is_forgotten_is_free_at_once() -> None:
    model, batch = make_target("gpt2", tied=False), make_examples(5)
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1], 2)
    remembered = Remembered()
    loss_gradient(run, run.space.read(model), batch, torch.ones(5, dtype=torch.float64), remembered)
    first = next(iter(remembered.pieces[0].linears.values()))[0].out
    watch = weakref.ref(first)
    gc.disable()  # no cycle may keep it
    try:
        del remembered, first
        assert watch() is None
    finally:
        gc.enable()


def falcon() -> nn.Module:
    """Multi-query attention."""
    config = FalconConfig(
        vocab_size=29, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0, eos_token_id=0
    )
    return FalconForCausalLM(config).double().eval()


def writing_llama() -> nn.Module:
    """A model that writes to what a linear map gave."""
    model = make_target("llama", tied=False)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, inputs, output: output.mul_(1.5))
    return model


@pytest.mark.parametrize("make", [falcon, writing_llama])
def test_a_model_may_write_to_what_its_linear_maps_give(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, batch = make(), make_examples(5)
    weights = torch.ones(5, dtype=torch.float64)
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1])
    theta = run.space.read(model)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, grad, product, tokens = plain_reference(run, theta, direction, batch, weights)
    remembered = Remembered()
    assert relative(loss_gradient(run, theta, batch, weights, remembered)[0], grad) < 1e-9
    dual = dual_pass(run, theta, direction, batch, weights, need_hvp=True, need_labels=False, remembered=remembered)
    assert dual.hvp is not None
    assert relative(dual.hvp, product) < 1e-9
    assert relative(dual.token_B_S, tokens) < 1e-9


@pytest.mark.parametrize("frozen", ["transformer", "lm_head", "transformer.wte"])
def test_frozen_parts_stay_out(frozen: str) -> None:
    model, batch = make_target("gpt2", tied=False), make_examples(5)
    model.get_submodule(frozen).requires_grad_(False)
    weights = torch.ones(5, dtype=torch.float64)
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1])
    theta = run.space.read(model)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, grad, product, tokens = plain_reference(run, theta, direction, batch, weights)
    assert relative(loss_gradient(run, theta, batch, weights)[0], grad) < 1e-9
    dual = dual_pass(run, theta, direction, batch, weights, need_hvp=True, need_labels=False)
    assert dual.hvp is not None
    assert relative(dual.hvp, product) < 1e-9
    assert relative(dual.token_B_S, tokens) < 1e-9


class Scaled(nn.Linear):
    """A head that no closed form knows."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * torch.tanh(super().forward(hidden) / 3)


def test_unusual_heads_take_the_plain_path() -> None:
    model = make_target("gpt2", tied=False)
    assert find_head(model) is not None
    model.config.final_logit_softcapping = 30.0
    assert find_head(model) is None
    del model.config.final_logit_softcapping
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    assert find_head(model) is None
    handle.remove()
    assert find_head(model) is not None
    odd = make_target("gpt2", tied=False)
    head = Scaled(16, 29, bias=False).double()
    head.weight = odd.lm_head.weight
    odd.lm_head = head
    assert find_head(odd) is None
    examples = make_examples(7)
    result = metagradient(odd, examples, ADAMW, METRIC, batch_size=3)
    h, slopes = 1e-4, []
    for i in (0, 6):
        values = []
        for k in (-2, -1, 1, 2):
            weights = torch.ones(7, dtype=torch.float64)
            weights[i] += k * h
            values.append(metagradient(odd, examples, ADAMW, METRIC, batch_size=3, weights_N=weights).value)
        a, b, c, d = values
        slopes.append((a - 8 * b + 8 * c - d) / (12 * h))
    assert relative(result.example_N[[0, 6]], torch.tensor(slopes, dtype=torch.float64)) < 1e-6


def test_fused_activations_equal_the_spelled_ones_and_go_again() -> None:
    model, ids = make_target("gpt2", tied=True), make_examples(3).ids_N_S
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with fused_activations(model):
            inside = model(input_ids=ids).logits
    assert relative(inside, before) < 1e-14
    assert all("forward" not in vars(module) for module in model.modules())


def attribution(examples: Examples, spec: OptimizerSpec, **options: object) -> Metagradient:
    return metagradient(make_target("gpt2", tied=True), examples, spec, METRIC, batch_size=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("count", [1, 4, 15, 20])  # T = 1, 2, 8, 10
def test_every_choice_of_memory_gives_the_same(count: int, spec: OptimizerSpec) -> None:
    examples = make_examples(count)
    kept = attribution(examples, spec, labels=True)
    for memory in ("sqrt", "offload"):
        other = attribution(examples, spec, labels=True, memory=memory)
        assert relative(other.token_N_S, kept.token_N_S) < 1e-12
        assert other.label_N_S_V is not None
        assert kept.label_N_S_V is not None
        assert relative(other.label_N_S_V, kept.label_N_S_V) < 1e-12
        assert all(torch.equal(other.final[name], value) for name, value in kept.final.items())
        assert other.value == kept.value


@pytest.mark.parametrize("memory", ["keep", "sqrt", "offload"])
def test_no_tape_holds_the_first_weights_where_they_can_be_read_again(memory: Memory) -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(8)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    theta = run.space.read(model)
    watch = weakref.ref(theta)
    ones = torch.ones(8, dtype=torch.float64)
    trace = inner_run(run, theta, examples, ADAMW, ones, 2, memory=memory, origin=lambda: run.space.read(model))
    del theta
    assert watch() is None
    for _ in range(4):
        step = trace.tape.pop()
    assert torch.equal(step.before.theta, run.space.read(model))


def test_sqrt_keeps_few_states_at_a_time() -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(33)
    run = TargetRun(model, ParameterSpace(model), "token", examples.ids_N_S.shape[1])
    trace = inner_run(run, run.space.read(model), examples, ADAMW, torch.ones(33).double(), 1, memory="sqrt")
    tape = trace.tape
    assert isinstance(tape, SqrtTape)
    most = len(tape.checkpoints) + len(tape.segment)
    for _ in range(33):
        tape.pop()
        most = max(most, len(tape.checkpoints) + len(tape.segment))
    assert most <= 2 * 6 + 1
    assert (tape.checkpoints, tape.segment) == ([], [])


def test_offload_refuses_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(UsageError, match="TMPDIR"):
        attribution(make_examples(4), ADAMW, memory="offload")


@pytest.mark.parametrize(
    ("given", "calls", "pages"),
    [
        ({}, [(-3, allocator.KEPT), (-1, 2**31 - 1)], "1"),
        ({"DPG_ALLOCATOR": "default"}, [], None),
        ({"MALLOC_TRIM_THRESHOLD_": "1000", "THP_MEM_ALLOC_ENABLE": "0"}, [], "0"),
    ],
)
def test_the_allocator_is_set_unless_the_user_has_set_it(
    given: dict[str, str], calls: list[tuple[int, int]], pages: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *arguments: made.append(arguments))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: library)
    for name in ("DPG_ALLOCATOR", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    allocator.settle()
    assert made == calls
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == pages
