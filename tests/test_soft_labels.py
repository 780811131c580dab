"""Soft labels in the inner run: against finite differences with q as the variable, and against every drawn run there can be."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
import torch
from builders import VOCAB, HeldOutLoss, make_examples, make_target
from torch import Tensor, nn

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.generator.contexts import contexts, standard_head
from dpg_cli.engine.generator.rollout import Sampling, sample
from dpg_cli.engine.inner import head as head_module
from dpg_cli.engine.inner import target as target_module
from dpg_cli.engine.soft import SoftLabels, TableLabels
from dpg_cli.models.loading import load
from dpg_cli.tiny import world

ADAMW = OptimizerSpec("adamw", lr=0.05, beta1=0.8, beta2=0.99, eps=1e-2, eps_root=1e-5, weight_decay=0.1)
SGD = OptimizerSpec("sgd", lr=0.1, momentum=0.5, weight_decay=0.01)
METRIC = HeldOutLoss(make_examples(4, seed=9))


def soft_examples(n: int, seed: int = 0) -> Examples:
    """Ragged sequences with a distribution at each place."""
    examples = make_examples(n, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    logits = 1.5 * torch.randn(*examples.ids_N_S.shape, VOCAB, dtype=torch.float64, generator=rng)
    return replace(examples, soft=TableLabels(torch.softmax(logits, -1)))


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@dataclass
class Kept:
    """A sink that keeps everything; the places of a `TableLabels` are found by its storage."""

    examples: Examples
    credit: Tensor = field(init=False)
    drawn: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.credit = torch.zeros(*self.examples.ids_N_S.shape, VOCAB, dtype=torch.float64)
        self.drawn = torch.zeros(self.examples.ids_N_S.shape, dtype=torch.float64)

    def add(self, labels: SoftLabels, places_M: Tensor, drawn_M: Tensor, q_M_V: Tensor, credit_M_V: Tensor) -> None:
        assert isinstance(labels, TableLabels)
        assert torch.allclose(q_M_V.sum(1), torch.ones_like(q_M_V[:, 0]))
        first = labels.q_N_S_V.storage_offset() // (self.credit.shape[1] * VOCAB)
        width = labels.q_N_S_V.shape[1]
        rows, columns = first + places_M // width, places_M % width
        assert torch.equal(self.examples.ids_N_S[rows, columns], drawn_M)
        self.credit[rows, columns] += credit_M_V
        self.drawn[rows, columns] += credit_M_V.gather(-1, drawn_M[:, None])[:, 0]
        q_M_V.zero_()  # both may be written to
        credit_M_V.zero_()


@pytest.mark.parametrize("closed", [True, False], ids=["closed-head", "logits"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("spec", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_equals_finite_differences_with_q_and_w_as_variables(
    architecture: str, spec: OptimizerSpec, steps: int, closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not closed:
        monkeypatch.setattr(target_module, "find_head", lambda model: None)
    monkeypatch.setattr(head_module, "CHUNK", 7 * VOCAB)  # a few tokens at a time
    monkeypatch.setattr(head_module, "CHUNK_TOKENS", 7)
    model, examples = make_target(architecture, tied=False), soft_examples(7)
    batch = -(-len(examples) // steps)
    weights = 1 + 0.3 * torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def phi(soft: TableLabels, w: Tensor) -> float:
        changed = replace(examples, soft=soft)
        return metagradient(model, changed, spec, METRIC, batch_size=batch, weights_N=w, micro_batch=2).value

    def slope(direction_q: Tensor, direction_w: Tensor, h: float = 1e-4) -> float:
        a, b, c, d = (
            phi(TableLabels(table + k * h * direction_q), weights + k * h * direction_w) for k in (-2, -1, 1, 2)
        )
        return (a - 8 * b + 8 * c - d) / (12 * h)

    assert isinstance(examples.soft, TableLabels)
    table, kept = examples.soft.q_N_S_V, Kept(examples)
    result = metagradient(
        model, examples, spec, METRIC, batch_size=batch, weights_N=weights, micro_batch=2, sink=kept, labels=True
    )
    assert result.label_N_S_V is not None
    assert relative(kept.credit, result.label_N_S_V) < 1e-12
    assert relative((table * kept.credit).sum(-1), result.token_N_S) < 1e-11
    assert relative(result.token_N_S, kept.drawn) > 0.1  # another thing than the credit of the drawn token
    rng = torch.Generator().manual_seed(2)
    for _ in range(2):
        way = torch.randn(table.shape, dtype=torch.float64, generator=rng) * table
        way -= table * way.sum(-1, keepdim=True)  # distributions stay distributions
        expected = float((way * kept.credit * weights[:, None, None]).sum())
        assert abs(slope(way, torch.zeros(7)) / expected - 1) < 1e-6
    way_w = torch.randn(7, dtype=torch.float64, generator=rng)
    assert abs(slope(torch.zeros_like(table), way_w) / float(way_w @ result.example_N) - 1) < 1e-6


@dataclass
class Linear:
    """Φ = <C, θ>, so that a mean over runs has no curvature in it."""

    seed: int = 0

    def __call__(self, parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed)
        return sum(
            (torch.randn(value.shape, dtype=value.dtype, generator=rng) * value).sum() for value in parameters.values()
        )  # type: ignore[return-value]

    def measures(self, parameters: Mapping[str, Tensor], model: nn.Module) -> dict[str, float]:
        return {}


def test_soft_is_the_mean_over_every_drawn_run() -> None:
    """Two examples whose last token alone is trained: 29² runs, each with its probability. T = 1, SGD."""
    ids = make_examples(2, longest=6, seed=3).ids_N_S
    attention = torch.ones_like(ids, dtype=torch.bool)
    label = torch.zeros_like(attention)
    label[:, -1] = True
    soft = soft_examples(2, seed=5).soft
    assert isinstance(soft, TableLabels)
    table = soft.q_N_S_V[:, : ids.shape[1]]
    model, sgd = make_target("gpt2", tied=True), OptimizerSpec("sgd", lr=0.1)
    value, credits = 0.0, torch.zeros(2, dtype=torch.float64)
    for labels in itertools.product(range(VOCAB), repeat=2):
        drawn = ids.clone()
        drawn[:, -1] = torch.tensor(labels)
        probability = float(table[0, -1, labels[0]] * table[1, -1, labels[1]])
        run = metagradient(model, Examples(drawn, attention, label), sgd, Linear())
        value += probability * run.value
        credits += probability * run.example_N
    mean = metagradient(model, Examples(ids, attention, label, TableLabels(table)), sgd, Linear())
    start = float(Linear()(dict(model.named_parameters()), model).detach())
    assert abs(mean.value - value) < 1e-10 * abs(value - start)
    assert relative(mean.example_N, credits) < 1e-10
    assert float(mean.example_N.abs().min()) > 1e-3


def test_drawn_examples_keep_their_loss_and_give_label_credits() -> None:
    """`drawn`: distributions that only serve the sink change no number."""
    examples = soft_examples(6)
    plain = replace(examples, soft=None)
    model, kept = make_target("gpt2", tied=True), Kept(examples)
    result = metagradient(model, replace(examples, drawn=True), ADAMW, METRIC, batch_size=3, sink=kept)
    reference = metagradient(model, plain, ADAMW, METRIC, batch_size=3, labels=True)
    assert torch.equal(result.token_N_S, reference.token_N_S)
    assert reference.label_N_S_V is not None
    assert relative(kept.credit, reference.label_N_S_V) < 1e-12
    assert relative(kept.drawn, result.token_N_S) < 1e-12


@pytest.mark.parametrize(("temperature", "min_tokens"), [(1.0, 1), (1.3, 12)])
def test_distributions_of_a_rollout_are_what_it_was_drawn_from(temperature: float, min_tokens: int) -> None:
    generator = load("tiny", device=torch.device("cpu"), dtype="float64")
    sampling = Sampling(3, 14, min_tokens, temperature, generator.eos_id, generator.pad_id)
    prompts = [*world.prompts("eval", 5, seed=1), "", "x"]  # ragged
    rollout = sample(generator.model, generator.tokenizer, prompts, sampling, torch.Generator().manual_seed(0))
    labels = contexts(generator.model, standard_head(generator.model), rollout, sampling, micro_batch=4)
    places = rollout.mask_N_K.flatten().nonzero()[:, 0]
    logq = labels.at(places).log().gather(-1, rollout.ids_N_K.flatten()[places, None])[:, 0]
    assert float((logq - rollout.logprobs_N_K.flatten()[places]).abs().max()) < 1e-9
    q = labels.at(places)
    barred = places % 14 < min_tokens - 1
    assert bool((q[barred][:, generator.eos_id] == 0).all())
    assert bool((q[~barred][:, generator.eos_id] > 0).all())
    # the same through rows, an index and another width
    some = replace(labels, offset=1).resized(16).rows(3, 9, 15).take(torch.tensor([4, 0]))
    assert some.number_N.tolist() == [7, 3]
    assert torch.allclose(some.at(torch.tensor([1 + 2, 15 + 1])), labels.at(torch.tensor([7 * 14 + 2, 3 * 14])))
