"""Attention in slabs: every mask, cap and sink against PyTorch differentiated twice; models against the dense forms; nothing of S x S.

float64. The zoo's rows are judged against finite differences elsewhere; here some of them run with slabs of a few numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import make_examples
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from zoo.exact import Exact
from zoo.judge import judge, rows
from zoo.tiny import tiny_model

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.inner import head
from dpg_cli.engine.inner.attention import served, slabs
from dpg_cli.engine.inner.attention.plain import attention
from dpg_cli.engine.inner.attention.seen import Biased, Causal, Full, Given, Indexed, Seen
from dpg_cli.engine.inner.packing import pack
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.reverse.choice import activation_numbers
from dpg_cli.engine.reverse.dual import DualMode
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.engine.reverse.forms import attention as form

B, H, G, S, D, E = 2, 4, 2, 13, 3, 5
CPU = torch.device("cpu")
PLACE = torch.arange(S)
WINDOW = (PLACE[None] <= PLACE[:, None]) & (PLACE[None] > PLACE[:, None] - 4)
ALIBI = torch.randn(H, 1, S, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
OWNER = torch.tensor([[0] * 6 + [1] * 7, [0] * 11 + [1] * 2])


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (j > i - 4)


def packed(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (j <= i) & (OWNER[b, i] == OWNER[b, j])


def shut(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)


LATER = shut(PLACE[None] <= PLACE[:, None])
PACKED = shut(((OWNER[:, None] == OWNER[:, :, None]) & (LATER == 0))[:, None])
MASKS: dict[str, tuple[Seen, Tensor]] = {
    "full": (Full(), torch.zeros(S, S, dtype=torch.float64)),
    "causal": (Causal(), LATER),
    "window": (Indexed(window, CPU), shut(WINDOW)),
    "window-mapped": (Indexed(window, CPU, vmap=True), shut(WINDOW)),
    "packed": (Indexed(packed, CPU), PACKED),
    "given-mask": (Given(WINDOW), shut(WINDOW)),
    "given-bias": (Given(PACKED), PACKED),
    "alibi": (Biased(Causal(), ALIBI), LATER + ALIBI),
}


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of a few numbers for rows of any length."""
    monkeypatch.setitem(slabs.NUMBERS, "cpu", 40)
    monkeypatch.setattr(slabs, "LEAST", 2)
    monkeypatch.setattr(form, "LONG", 1)
    monkeypatch.setattr(served, "LONG", 1)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 1e-9
    return float(((value - reference).norm() / reference.norm()).detach())


def spelled(q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor, cap: float | None) -> Tensor:
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    scores = 0.7 * q @ k.mT
    scores = (scores if cap is None else cap * torch.tanh(scores / cap)) + bias
    if sink is not None:
        scores = torch.cat((scores, sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), -1)
    weights = torch.exp(scores)
    return (weights / weights.sum(-1, keepdim=True))[..., :S] @ v


def drawn(with_sink: bool) -> tuple[list[Tensor], list[Tensor]]:
    rng = torch.Generator().manual_seed(1)
    shapes = [(B, H, S, D), (B, G, S, D), (B, G, S, E), *([(H,)] if with_sink else [])]
    made = [torch.randn(shape, dtype=torch.float64, generator=rng).requires_grad_() for shape in shapes + shapes]
    return made[: len(shapes)], made[len(shapes) :]


def dual(leaves: list[Tensor], tangents: list[Tensor], seen: Seen, cap: float | None) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level(), DualMode():
        q, k, v, *sink = (forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True))
        made = attention(q, k, v, seen, scale=0.7, cap=cap, sink=sink[0] if sink else None)
        value, value_t = forward_ad.unpack_dual(made)
    assert value_t is not None
    return value, value_t


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("with_sink", [False, True], ids=["", "sink"])
@pytest.mark.parametrize("cap", [None, 1.5], ids=["", "cap"])
@pytest.mark.parametrize("name", MASKS)
def test_both_orders_equal_pytorch_differentiated_twice(name: str, cap: float | None, with_sink: bool) -> None:
    seen, bias = MASKS[name]
    leaves, tangents = drawn(with_sink)
    reference = spelled(*leaves[:3], leaves[3] if with_sink else None, bias, cap)
    vector = torch.ones_like(reference, requires_grad=True)
    products = torch.autograd.grad(reference, leaves, vector, create_graph=True)
    (reference_t,) = torch.autograd.grad(products, vector, tangents, create_graph=True)
    rng = torch.Generator().manual_seed(3)
    bars = [torch.randn(reference.shape, dtype=torch.float64, generator=rng) for _ in range(2)]
    expected = torch.autograd.grad((reference, reference_t), leaves + tangents, bars, retain_graph=True)

    value, value_t = dual(leaves, tangents, seen, cap)
    assert relative(value, reference) < 1e-13
    assert relative(value_t, reference_t) < 1e-13
    for mine, theirs in zip(torch.autograd.grad((value, value_t), leaves + tangents, bars), expected, strict=True):
        assert relative(mine, theirs) < 1e-12

    plain = attention(*leaves[:3], seen, scale=0.7, cap=cap, sink=leaves[3] if with_sink else None)
    assert relative(plain, reference) < 1e-13
    first = torch.autograd.grad(reference, leaves, bars[0])
    for mine, theirs in zip(torch.autograd.grad(plain, leaves, bars[0]), first, strict=True):
        assert relative(mine, theirs) < 1e-12


@pytest.mark.usefixtures("small")
def test_tangent_and_its_reverse_are_those_of_finite_differences() -> None:
    seen, _ = MASKS["packed"]
    leaves, tangents = drawn(True)
    start = [leaf.detach() for leaf in leaves]
    along = [tangent.detach() for tangent in tangents]
    value, value_t = dual(leaves, tangents, seen, 1.5)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
    bars = torch.autograd.grad((weight * value_t).sum(), leaves)
    h = 2e-5

    def moved(step: float) -> list[Tensor]:
        return [leaf + step * tangent for leaf, tangent in zip(start, along, strict=True)]

    ends = [attention(*at[:3], seen, scale=0.7, cap=1.5, sink=at[3]) for at in (moved(h), moved(-h))]
    assert relative((ends[0] - ends[1]) / (2 * h), value_t) < 1e-7
    # d/dε <weight, ȯ(x + ε u)> along another direction u = ẋ: the reverse of the tangent
    slope = sum(float((bar * tangent).sum()) for bar, tangent in zip(bars, along, strict=True))
    tangents_at = [dual(moved(step), along, seen, 1.5)[1] for step in (h, -h)]
    found = float((weight * (tangents_at[0] - tangents_at[1])).sum()) / (2 * h)
    assert abs(found - slope) < 1e-7 * abs(slope)


@pytest.mark.usefixtures("small")
def test_a_query_that_sees_nothing_gives_zeros() -> None:
    keep = torch.ones(B, 1, S, S, dtype=torch.bool)
    keep[1, :, 4:9] = False
    leaves, tangents = drawn(False)
    value, value_t = dual(leaves, tangents, Given(keep), None)
    assert bool((value[1, :, 4:9] == 0).all()) and bool((value_t[1, :, 4:9] == 0).all())
    bars = torch.autograd.grad((value.square() + value_t.square()).sum(), leaves + tangents)
    assert all(bool(torch.isfinite(bar).all()) for bar in bars)
    assert bool((bars[0][1, :, 4:9] == 0).all())


def test_slabs_leave_out_what_is_hidden() -> None:
    def scores(seen: Seen, length: int) -> int:
        shape = slabs.Shape(1, 2, 1, length, length, 64, 64)
        found = list(slabs.slabs(shape, seen, CPU))
        assert max((s.queries.stop - s.queries.start) * (s.keys.stop - s.keys.start) for s in found) <= 1 << 17
        return sum(
            (s.groups.stop - s.groups.start) * (s.queries.stop - s.queries.start) * (s.keys.stop - s.keys.start)
            for s in found
        )

    for length in (1024, 4096):
        assert 0.5 < scores(Causal(), length) / (2 * length**2) < 0.57
    near = Indexed(lambda b, h, i, j: (j <= i) & (j > i - 256), CPU)
    assert scores(near, 4096) / (2 * 4096**2) < 0.08
    one = torch.arange(4096)[None] // 512
    rows_of_eight = Indexed(lambda b, h, i, j: (j <= i) & (one[b, i] == one[b, j]), CPU)
    assert scores(rows_of_eight, 4096) / (2 * 4096**2) < 0.08


MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {},
    "gpt_oss": {},
    "granite_swa": {},
    "mimo_v2_flash": {},
    "mpt": {},
    "opt": {},
    "llama4_text": {"no_rope_layers": [1, 0]},
    "deepseek_v3": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_slabs_has_the_numbers_of_the_dense_forms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name, **MODELS[name])
    examples, held_out = rows(6, 0, longest=14), rows(3, 5, longest=14)
    spec = OptimizerSpec("adamw", lr=0.02, eps=0.03, weight_decay=0.1)

    def metric(parameters: Any, model: nn.Module) -> Tensor:
        logits: Tensor = torch.func.functional_call(
            model, dict(parameters), (), {"input_ids": held_out.ids_N_S, "use_cache": False}
        ).logits
        return -logits.log_softmax(-1).square().mean()

    with Exact():
        dense = metagradient(model, examples, spec, metric, batch_size=3)
        shrink(monkeypatch)
        ours = metagradient(model, examples, spec, metric, batch_size=3)
    assert relative(ours.token_N_S, dense.token_N_S) < 1e-9
    assert all(relative(ours.final[name], value) < 1e-9 for name, value in dense.final.items() if value.norm() > 0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gpt_oss"])
def test_a_model_in_slabs_has_the_metagradient_of_the_stock_run(name: str) -> None:
    verdict = judge(tiny_model(name))
    assert verdict.size > 1e-6
    assert verdict.error < 1e-6


class Largest(TorchDispatchMode):
    """Within this context: the most numbers of any tensor that an operation makes, views that repeat a number counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                held = one.untyped_storage().nbytes() // max(1, one.element_size())
                self.numbers = max(self.numbers, min(one.numel(), held))
        return made


WIDTH = 32
SIZES = {"vocab_size": 29, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = {
    **SIZES, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip
LONG_MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=4096, n_embd=WIDTH, n_layer=2, n_head=4)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=256)),
}


def largest(model: nn.Module, batch: Examples, packing: bool = False) -> int:
    run = TargetRun(model, ParameterSpace(model), "token", batch.ids_N_S.shape[1], 1, packing=packing)
    theta = run.space.read(model)
    weights = torch.ones(len(batch))
    if run.slabs:
        assert served.is_same(model)
    with Largest() as counted:
        grad, _ = loss_gradient(run, theta, batch, weights)
        dual_pass(run, theta, grad, batch, weights, need_hvp=True, need_labels=False)
    return counted.numbers


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("name", LONG_MODELS)
def test_no_pass_makes_anything_of_queries_x_keys(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 1 << 16)
    torch.manual_seed(0)
    model = LONG_MODELS[name]().eval()
    batch = make_examples(1, shortest=length, longest=length)
    most = largest(model, batch)
    assert most <= max(1 << 17, 5 * WIDTH * length)
    assert most < length**2 / 4


def test_packed_rows_make_nothing_of_queries_x_keys() -> None:
    torch.manual_seed(0)
    model = LONG_MODELS["gpt2"]().eval()
    ids = torch.randint(1, 29, (4, 1024), generator=torch.Generator().manual_seed(0))
    examples = Examples.from_sequences(
        [row[:count].tolist() for row, count in zip(ids, (1024, 700, 200, 100), strict=True)], pad_id=0
    )
    assert pack(examples).layout is not None
    assert largest(model, examples, packing=True) <= max(1 << 17, 5 * WIDTH * 1024)


def test_the_dense_forms_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(form, "LONG", 10**9)
    torch.manual_seed(0)
    model = LONG_MODELS["gpt2"]().eval()
    assert largest(model, make_examples(1, shortest=512, longest=512)) >= 4 * 512**2


class Held(TorchDispatchMode):
    """Within this context: the most bytes that tensors held at once, of those made here."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.most = 0, 0
        self.sizes: dict[int, int] = {}

    def _let_go(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in self.sizes:
                storage = one.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._let_go, storage._cdata)
        self.most = max(self.most, self.bytes)
        return made


def held(layers: int, length: int) -> int:
    """Numbers that a dual pass holds at its peak, beyond the vectors of all parameters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=4096, n_embd=WIDTH, n_layer=layers, n_head=4)).eval()
    batch = make_examples(1, shortest=length, longest=length)
    run = TargetRun(model, ParameterSpace(model), "token", length, 1)
    theta = run.space.read(model)
    into = torch.zeros_like(theta)
    with Held() as counted:
        dual_pass(run, theta, theta, batch, torch.ones(1), need_hvp=True, need_labels=False, hvp_into=into)
    return counted.most // 4


def test_memory_is_what_the_planner_says_and_grows_linearly() -> None:
    one, three = held(1, 1024), held(3, 1024)
    predicted = activation_numbers(1024, 1024, 2, WIDTH, 4)
    assert 0.7 * predicted < three - one < 1.1 * predicted
    assert held(3, 2048) < 2.1 * three
    dense = activation_numbers(1024, 1024, 2, WIDTH, 4, matrices=True)
    assert dense > 10 * predicted


def test_a_model_that_reads_its_mask_keeps_its_own_attention() -> None:
    torch.manual_seed(0)
    model = tiny_model("doge")
    assert not served.is_same(model)
    assert "target's own" in served.note(model, 4096)
    assert not served.note(model, served.LONG - 1)
    assert not served.is_same(tiny_model("bigbird_pegasus"))  # without a mask its attention is not causal
    assert not served.is_same(tiny_model("gptj"))  # it never asks for an implementation
    with served.in_slabs(model, 10**6):
        assert model.config._attn_implementation == "sdpa"
    gpt2 = tiny_model("gpt2")
    with served.in_slabs(gpt2, 10**6):
        assert gpt2.config._attn_implementation == served.NAME
    assert gpt2.config._attn_implementation == "sdpa"
    with served.in_slabs(gpt2, served.LONG - 1):
        assert gpt2.config._attn_implementation == "sdpa"
