"""Second order by differences of ordinary passes: its credits, its step, its estimate of its own error, and its refusals."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from cases import CASES, Case
from test_soft_labels import Kept, soft_examples
from torch import Tensor, nn
from toys import WIDTH, Block, ToyLM
from transformers import GPT2Config, GPT2LMHeadModel
from zoo.judge import judge
from zoo.tiny import tiny_model

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, Recipe, metagradient, metagradients
from dpg_cli.engine.inner import head as head_module
from dpg_cli.engine.inner.recipe import Batches
from dpg_cli.engine.inner.target import TargetRun, loss_gradient
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.reverse import head as second_head
from dpg_cli.engine.reverse.choice import SecondOrder
from dpg_cli.engine.reverse.differences.one_sided import Base, one_sided_pass
from dpg_cli.engine.reverse.differences.stepping import WORST, Differences, Errors, _checked
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.errors import BadValueError, DegenerateError, UsageError

METRIC = HeldOutLoss(make_examples(4, seed=9))
ADAMW = OptimizerSpec("adamw", lr=1e-2, eps=1e-3, eps_root=1e-6, weight_decay=0.01)


NEAR: dict[SecondOrder, float] = {"difference": 1e-8, "one-sided": 1e-5}  # in float64
both = pytest.mark.parametrize("way", NEAR)


def off(ours: Tensor | None, exact: Tensor | None) -> float:
    """Relative difference."""
    assert ours is not None and exact is not None
    return float((ours - exact).double().norm() / exact.double().norm())


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


EVERYTHING = [case for case in CASES if case.label == "all"]


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(architecture="llama", tied=False),
        Case("adamw", 1),
        Case("sgd-momentum", 8),
        Case("muon"),
        *EVERYTHING,
    ],
    ids=lambda case: case.name,
)
@both
def test_float64_credits_are_the_exact_ones(case: Case, way: SecondOrder) -> None:
    """Examples, tokens, labels and visits, through every element of a recipe; and the error is what it says."""
    exact = case.fast(METRIC, labels=True, visits=True)
    ours = case.fast(METRIC, labels=True, visits=True, second_order=way, micro_batch=3)
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]
    assert off(ours.example_N, exact.example_N) < NEAR[way]
    assert off(ours.label_N_S_V, exact.label_N_S_V) < NEAR[way]
    assert ours.visits is not None and exact.visits is not None
    assert off(ours.visits.credit_M, exact.visits.credit_M) < NEAR[way]
    assert ours.value == pytest.approx(exact.value, rel=1e-12)
    true = off(ours.token_N_S, exact.token_N_S)
    assert 0.2 < ours.stats["difference_error"] / true < 5
    assert "difference_error" not in exact.stats
    if way == "one-sided":  # from the losses that the inner run kept
        ours = case.fast(METRIC, second_order=way, micro_batch=3)
        true = off(ours.token_N_S, exact.token_N_S)
        assert true < NEAR[way] and 0.2 < ours.stats["difference_error"] / true < 5


def gpt2(dtype: torch.dtype = torch.float32, **options: Any) -> GPT2LMHeadModel:
    """A small GPT-2 from a random start, as the benchmarks have it."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 128, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, **options)
    return GPT2LMHeadModel(config).to(dtype).eval()


def random_rows(count: int, length: int = 24, seed: int = 1) -> Examples:
    """Rows of random tokens."""
    return Examples.from_sequences(
        torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    )


@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec("adamw", lr=1e-3, beta1=0.95, beta2=0.975, eps=1e-8, eps_root=1e-8, weight_decay=0.01),
        OptimizerSpec("adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=3e-3),
        OptimizerSpec("adamw", lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, eps_root=1e-12),  # nearly sign(g)
    ],
    ids=("benchmark", "large-eps", "sign"),
)
@both
def test_float32_credits_are_near_and_the_estimate_is_honest(spec: OptimizerSpec, way: SecondOrder) -> None:
    examples, metric = random_rows(64), HeldOutLoss(random_rows(8, seed=2))
    results: list[Metagradient] = [
        metagradient(gpt2(), examples, spec, metric, batch_size=8, second_order=each) for each in ("exact", way)
    ]
    exact, ours = results
    error, most = off(ours.token_N_S, exact.token_N_S), {"difference": 2e-3, "one-sided": 1e-2}[way]
    assert error < most and off(ours.example_N, exact.example_N) < most
    assert spearman(ours.example_N, exact.example_N) > 0.9995
    assert 0.2 < ours.stats["difference_error"] / error < 5
    assert any("are about" in note for note in ours.notes)


@pytest.mark.parametrize("drawn", [False, True])
@both
def test_soft_labels_and_their_sink_take_differences(drawn: bool, way: SecondOrder) -> None:
    model, examples = make_target("gpt2", tied=True), replace(soft_examples(6), drawn=drawn)
    kept = Kept(examples), Kept(examples)
    exact, ours = (
        metagradient(model, examples, ADAMW, METRIC, batch_size=2, second_order=each, sink=sink)
        for each, sink in zip(("exact", way), kept, strict=True)  # type: ignore[arg-type]
    )
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]
    assert off(kept[1].credit, kept[0].credit) < NEAR[way]
    assert off(kept[1].drawn, kept[0].drawn) < NEAR[way]
    plain = metagradient(model, examples, ADAMW, METRIC, batch_size=2, second_order=way)
    assert off(plain.token_N_S, exact.token_N_S) < NEAR[way]


@both
def test_packed_rows_have_the_credits_of_padded_ones(way: SecondOrder) -> None:
    model, examples = make_target("llama", tied=False), make_examples(12)
    recipe = Recipe(ADAMW, batches=Batches(6))
    exact = metagradient(model, examples, recipe, METRIC)
    ours = metagradient(model, examples, recipe, METRIC, packing=True, second_order=way)
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]


@pytest.mark.parametrize("name", ["mixtral", "bloom", "recurrent_gemma", "gemma2", "xglm"])
@both
def test_architectures_equal_the_stock_run(name: str, way: SecondOrder) -> None:
    """Experts without the loop over them, autograd functions of a model's own, capped logits, a padding row among the data."""
    model = tiny_model(
        name, tie_word_embeddings=True, **({"num_hidden_layers": 3} if name == "recurrent_gemma" else {})
    )
    verdict = judge(model, second_order=way)
    assert verdict.error < {"difference": 1e-6, "one-sided": 1e-5}[way] and verdict.size > 1e-6
    assert not any("eager" in note or "double" in note for note in verdict.notes)


@both
def test_a_gradient_that_is_cut_is_refused(way: SecondOrder) -> None:
    model = tiny_model("hrm_text", tie_word_embeddings=True)
    with pytest.raises(UsageError, match=r"cuts its gradient .* second_order = 'exact'"):
        judge(model, second_order=way)


class Gate(nn.Module):
    """A router that takes one of two experts; both have the same scores at the beginning, so that any step decides."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden)
        taken = (scores[..., :1] > scores[..., 1:]).to(hidden.dtype)
        share = torch.softmax(scores, -1)
        return taken * share[..., :1] * self.first(hidden) + (1 - taken) * share[..., 1:] * self.second(hidden)


def tied_gate(dtype: torch.dtype) -> ToyLM:
    """A toy whose router stands at a tie for every token."""
    model = ToyLM(Gate())
    with torch.no_grad():
        model.block.router.weight[1] = model.block.router.weight[0]  # type: ignore[union-attr,index]
        model.block.router.bias.fill_(0.0)  # type: ignore[union-attr,operator]
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both
def test_a_router_at_a_tie_is_refused(dtype: torch.dtype, way: SecondOrder) -> None:
    with pytest.raises((UsageError, DegenerateError), match=r"jumps|off") as refusal:
        metagradient(tied_gate(dtype), make_examples(6), ADAMW, METRIC, batch_size=3, second_order=way)
    assert "'exact'" in refusal.value.remedy


class Late(nn.Module):
    """A step in the hidden states that only a few tokens of later rows stand at; below it, or (`on`) above."""

    def __init__(self, at: float) -> None:
        super().__init__()
        self.first, self.at, self.on = nn.Linear(WIDTH, WIDTH), at, False

    def forward(self, hidden: Tensor) -> Tensor:
        taken = hidden[..., :1] >= self.at if self.on else hidden[..., :1] > self.at
        return self.first(hidden) + taken.to(hidden.dtype)


@both
@pytest.mark.parametrize("on", [False, True])
def test_a_jump_that_the_self_check_does_not_meet_is_passed_by_or_refused(way: SecondOrder, on: bool) -> None:
    """At a distance of 1e-11 from the edge of a jump: a step short enough meets none."""
    examples = make_examples(9, shortest=6)
    model = ToyLM(Late(0.0))
    seen: list[Tensor] = []
    handle = model.block.register_forward_hook(lambda module, given, made: seen.append(given[0].detach()))
    model(examples.ids_N_S)
    handle.remove()
    model.block.at = float(seen[0][8, 3, 0])  # type: ignore[assignment]  # the last row's
    model.block.on = on  # type: ignore[assignment]
    spec = OptimizerSpec("sgd", lr=1e-11)
    exact = metagradient(model, examples, spec, METRIC, batch_size=3)
    try:
        ours = metagradient(model, examples, spec, METRIC, batch_size=3, second_order=way)
    except DegenerateError as refusal:
        assert "jumps" in refusal.cause or "off" in refusal.cause
    else:
        assert off(ours.token_N_S, exact.token_N_S) < 1e-3


class Kinked(nn.Module):
    """Many units with kinks, of which a step meets some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.second(torch.relu(3 * self.first(hidden)))


@both
@pytest.mark.parametrize("seed", range(4))
def test_kinks_between_the_sides_are_passed_by_or_told(way: SecondOrder, seed: int) -> None:
    """A kink that a step meets is a jump of its gradient, of whatever rows and inner step: no check need have seen it."""
    torch.manual_seed(seed)
    model = ToyLM(Kinked()).float()
    metric = HeldOutLoss(make_examples(4, seed=9))
    exact, ours = (
        metagradient(model, make_examples(24, seed=seed), OptimizerSpec("adamw", lr=1e-2, eps=1e-2), metric, batch_size=8,
                     second_order=each)
        for each in ("exact", way)
    )  # fmt: skip
    true = off(ours.token_N_S, exact.token_N_S)
    assert true < max(2e-3, 5 * ours.stats["difference_error"])


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_one_sided_differences_go_with_their_step(clip: float) -> None:
    """The error of credits and of the Hessian-vector product halves with ε, whatever the inner run kept, or its clip."""
    model, examples = make_target("gpt2", tied=True), make_examples(6)
    run = TargetRun(model, ParameterSpace(model), second_order="one-sided", micro_batch=4)
    theta, weights = run.space.read(model), torch.linspace(0.5, 2, 6, dtype=torch.float64)
    losses = theta.new_empty(examples.ids_N_S.shape)
    grad, _ = loss_gradient(run, theta, examples, weights, losses_into=losses)
    direction = torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.enable_grad():
        exact = dual_pass(
            replace(run, second_order="dual"), theta, direction, examples, weights, need_hvp=True, need_labels=True
        )
    bases = [Base(losses, clip * grad, clip), Base(None, clip * grad, clip), Base()]
    for base in bases:
        errors = []
        for epsilon in (1e-4, 5e-5):
            found, labels = (
                one_sided_pass(
                    run, theta, direction, examples, weights, epsilon, base, need_hvp=True, need_labels=asked
                )
                for asked in (False, True)
            )
            assert off(labels.hvp, found.hvp) < 1e-7
            errors.append([off(found.token_B_S, exact.token_B_S), off(found.hvp, exact.hvp)])
            errors[-1] += [off(labels.token_B_S, exact.token_B_S), off(labels.label_B_S_V, exact.label_B_S_V)]
        for wide, narrow in zip(*errors, strict=True):
            assert 1e-6 < narrow < 0.1 and wide / narrow == pytest.approx(2, abs=0.1)


class Double(torch.autograd.Function):
    """x -> x², with a backward and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * bar


def custom(function: Any) -> ToyLM:
    """A toy with a block around a function."""
    return ToyLM(Block(lambda hidden, first, second: second(function(torch.tanh(first(hidden))))))


def test_auto_is_exact_where_it_can_be_and_takes_differences_where_not() -> None:
    examples = make_examples(6)
    options: dict[str, Any] = {"batch_size": 3}
    exact = metagradient(custom(lambda x: x * x), examples, ADAMW, METRIC, **options)
    chosen = metagradient(custom(lambda x: x * x), examples, ADAMW, METRIC, second_order="auto", **options)
    assert torch.equal(chosen.token_N_S, exact.token_N_S)
    assert chosen.notes == ("Second order is exact.",)
    with pytest.raises(UsageError, match="cannot be trusted"):
        metagradient(custom(Double.apply), examples, ADAMW, METRIC, **options)
    ours = metagradient(custom(Double.apply), examples, ADAMW, METRIC, second_order="auto", **options)
    assert off(ours.token_N_S, exact.token_N_S) < 1e-8
    assert ours.notes[0].startswith("Second order by differences: The metagradient of this target cannot be trusted")


def test_auto_takes_differences_where_the_dual_pass_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpg_cli.engine.reverse.choice.free_bytes", lambda device: 1e4)
    ours = metagradient(make_target("gpt2", tied=True), make_examples(4), ADAMW, METRIC, second_order="auto")
    assert "0.0 are free" in ours.notes[0] and "difference_error" in ours.stats


@both
def test_compiled_code_runs_and_is_right(way: SecondOrder) -> None:
    """The model that `torch.compile` made, with a backend that only traces."""
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(graph, inputs)

        def run(*args: Any) -> Any:
            calls.append(1)
            return compiled(*args)

        return run

    torch._dynamo.reset()
    examples, model = make_examples(6, shortest=7, longest=7), make_target("gpt2", tied=True)
    exact = metagradient(model, examples, ADAMW, METRIC, batch_size=3)
    ours = metagradient(torch.compile(model, backend=backend), examples, ADAMW, METRIC, batch_size=3, second_order=way)
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]
    assert len(calls) >= 6  # two steps, both sides of each, and what measures their step
    assert model._compiled_call_impl is None


class Checkpointed(nn.Module):
    """A block whose activations are computed again in its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.again = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), True

    def forward(self, hidden: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

        if not self.again:
            return inner(hidden)
        return torch.utils.checkpoint.checkpoint(inner, hidden, use_reentrant=False)


@both
def test_checkpoints_are_computed_again_with_the_weights_of_their_step(way: SecondOrder) -> None:
    examples, model = make_examples(8), ToyLM(Checkpointed())
    ours = metagradient(model, examples, ADAMW, METRIC, batch_size=2, second_order=way)
    model.block.again = False  # type: ignore[assignment]
    exact = metagradient(model, examples, ADAMW, METRIC, batch_size=2)
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]


@both
def test_checkpoints_of_transformers_are_made_and_change_nothing(way: SecondOrder) -> None:
    examples, model = make_examples(4), make_target("gpt2", tied=True)
    exact = metagradient(model, examples, ADAMW, METRIC, batch_size=2)
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    calls: list[int] = []
    for layer in model.transformer.h:  # type: ignore[union-attr]
        made = layer._gradient_checkpointing_func

        def counted(*args: Any, made: Any = made, **named: Any) -> Any:
            calls.append(1)
            return made(*args, **named)

        layer._gradient_checkpointing_func = counted
    ours = metagradient(model, examples, ADAMW, METRIC, batch_size=2, second_order=way)
    assert off(ours.token_N_S, exact.token_N_S) < NEAR[way]
    assert len(calls) > 10 and not any(module.training for module in model.modules())


def test_bf16_and_unknown_ways_are_refused() -> None:
    model, examples = make_target("gpt2", tied=True, dtype=torch.float32), make_examples(4)
    for way in NEAR:
        with pytest.raises(UsageError, match="float32"):
            metagradient(model, examples, ADAMW, METRIC, precision="bf16", second_order=way)
    with pytest.raises(BadValueError, match="exact, difference, one-sided, auto"):
        metagradient(model, examples, ADAMW, METRIC, second_order="best")  # type: ignore[arg-type]
    assert not any("differences" in note for note in metagradient(model, examples, ADAMW, METRIC).notes)


@pytest.mark.parametrize("order", [1, 2])
def test_truncation_and_rounding_are_told_apart(order: int) -> None:
    """From the differences that a truncation T and a rounding R make at three steps."""
    for truncation, rounding in ((1e-3, 1e-5), (1e-5, 1e-3), (1e-4, 1e-4)):
        wide = ((4**order - 1) * truncation) ** 2 + (1 + 1 / 16) * rounding**2
        narrow = ((1 - 4**-order) * truncation) ** 2 + 17 * rounding**2
        found = Errors.of(4 * wide, 4 * narrow, 4.0, order)
        assert found.truncation**0.5 == pytest.approx(truncation, rel=1e-6)
        assert found.rounding**0.5 == pytest.approx(rounding, rel=1e-6)
        best = min((0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0), key=found.at)
        assert found.at(found.best) <= found.at(best)
    assert [number for number in range(70) if _checked(number)] == [0, 3, 15, 63]
    assert 0 < WORST <= 0.1


def test_a_model_of_plain_tensors_has_no_configuration() -> None:
    """`auto` judges the memory of models that say how large they are, and takes the others for small."""
    model = ToyLM(Block(lambda hidden, first, second: second(torch.tanh(first(hidden)))))
    assert not hasattr(model, "config") and isinstance(model(torch.zeros(1, 2, dtype=torch.int64)), SimpleNamespace)
    result = metagradient(model, make_examples(4), ADAMW, METRIC, second_order="auto")
    assert result.notes == ("Second order is exact.",)


@both
def test_several_queries_share_a_walk_by_differences(way: SecondOrder) -> None:
    model, examples = make_target("gpt2", tied=True), make_examples(6)
    metrics = [METRIC, HeldOutLoss(make_examples(4, seed=3))]
    recipe = Recipe(ADAMW, batches=Batches(2))
    exact = metagradients(model, examples, recipe, metrics)
    ours = metagradients(model, examples, recipe, metrics, second_order=way)
    assert off(ours.token_Q_N_S, exact.token_Q_N_S) < NEAR[way]
    assert ours.stats["difference_error"] < NEAR[way]


def test_a_walk_goes_on_where_another_process_was() -> None:
    run: Any = SimpleNamespace(second_order="difference")
    first, second = Differences(run, ""), Differences(run, "")
    first.walked, first.aim, first._carried, first._product = 5, 1e-3, 2e-8, Errors(1e-9, 2e-9)
    first._wrong, first._all, first._reference, first._length = 1e-6, 2.0, (3e-3, 4e-3, 5e-3), 7.0
    second.go_on(first.state())
    assert second == first and second.error == pytest.approx((0.5e-6) ** 0.5)


def test_states_that_are_computed_again_or_read_from_disk_change_nothing_to_one_side() -> None:
    """The token losses of a step are there with each choice of memory."""
    model, examples = make_target("gpt2", tied=True), make_examples(10)
    results = [
        metagradient(model, examples, ADAMW, METRIC, batch_size=2, second_order="one-sided", memory=memory)
        for memory in ("keep", "sqrt", "offload")
    ]
    for other in results[1:]:
        assert torch.equal(other.token_N_S, results[0].token_N_S)


@pytest.mark.parametrize("way", ["exact", "one-sided"])
def test_tokens_without_a_loss_have_no_logits(monkeypatch: pytest.MonkeyPatch, way: SecondOrder) -> None:
    """The head's products, in both orders, are of labelled tokens alone: a prompt's tokens have none."""
    model, examples = make_target("llama", tied=False), make_examples(6, shortest=9, longest=9)
    label = examples.label_N_S.clone()
    label[:, :6] = False
    asked = replace(examples, label_N_S=label)
    made: list[int] = []

    def counted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append(len(hidden))
        return stock(hidden, weight, bias)

    stock = head_module.logits_at
    monkeypatch.setattr(head_module, "logits_at", counted)
    monkeypatch.setattr(second_head, "logits_at", counted)
    metagradient(model, asked, ADAMW, METRIC, batch_size=6, second_order=way)
    assert made and max(made) <= int(label.sum()) == 18
    made.clear()
    metagradient(model, examples, ADAMW, METRIC, batch_size=6, second_order=way)
    assert max(made) == 48
