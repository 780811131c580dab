"""Rows that share prefixes give the numbers of plain rows, and fewer tokens go through the model. float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import VOCAB, HeldOutLoss, exact_norms, make_adapted, make_examples
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from dpg_cli.engine import (
    Batches,
    Examples,
    Metagradient,
    OptimizerSpec,
    Plan,
    Recipe,
    Schedule,
    metagradient,
    metagradients,
)
from dpg_cli.engine.inner import prefixes
from dpg_cli.engine.inner.attention import served
from dpg_cli.engine.inner.prefixes import LEAST, Shape, neighbours, share
from dpg_cli.engine.inner.target import TargetRun, can_share, loss_gradient, shareable, shares_prefixes
from dpg_cli.engine.params import ParameterSpace
from dpg_cli.engine.reverse.dual_pass import dual_pass
from dpg_cli.engine.reverse.forms import attention as form
from dpg_cli.engine.soft import TableLabels
from dpg_cli.models.lora import Lora

RECIPE = Recipe(
    OptimizerSpec("adamw", lr=0.02, eps_root=1e-5, weight_decay=0.1),
    Schedule("cosine", warmup=1),
    0.5,
    batches=Batches(7, epochs=2, order="shuffled"),
)
METRIC = HeldOutLoss(make_examples(4, seed=9))
PROMPTS = (20, 33, 18)  # tokens of three prompts
ANSWERS = ((5, 1, 8, 3), (4, 9, 2), (6, 7))
LARGE = Shape(10**6, 16, 1)  # whose tokens cost, and whose attention does not
CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def make_model(name: str) -> nn.Module:
    """Small causal LMs; Mistral's window is shorter than a prompt."""
    torch.manual_seed(0)
    if name == "gpt2":
        model: PreTrainedModel = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
            )
        )  # fmt: skip
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(**CONFIG, tie_word_embeddings=False))
    elif name == "mistral":
        model = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=9))
    else:
        model = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return exact_norms(model.double()).eval()


def make_rows(*, nested: bool = True) -> Examples:
    """Three prompts with several answers each, shuffled, and three rows without a partner; a system prompt before two."""
    rng = torch.Generator().manual_seed(3)

    def drawn(count: int) -> list[int]:
        return torch.randint(1, VOCAB, (count,), generator=rng).tolist()

    system = drawn(LEAST + 1) if nested else []
    rows, leads = [], []
    for number, (length, answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        prompt = [*(system if number else []), *drawn(length)]
        for answer in answers:
            rows.append(prompt + drawn(answer))
            leads.append(len(prompt))
    for length in (1, 12, 30):
        rows.append(drawn(length))
        leads.append(1)
    order = torch.randperm(len(rows), generator=rng).tolist()
    return Examples.from_sequences([rows[place] for place in order], prefix=[leads[place] for place in order])


def relative(value: Tensor, reference: Tensor) -> float:
    assert reference.norm() > 0
    return float((value - reference).norm() / reference.norm())


def agree(shared: Metagradient, plain: Metagradient, limit: float = 1e-9) -> None:
    assert shared.notes == plain.notes == ()
    assert relative(shared.token_N_S, plain.token_N_S) < limit
    assert relative(shared.example_N, plain.example_N) < limit
    for name, value in plain.final.items():
        assert relative(shared.final[name], value) < limit
    if plain.label_N_S_V is not None:
        assert shared.label_N_S_V is not None
        assert relative(shared.label_N_S_V, plain.label_N_S_V) < limit
    if plain.visits is not None:
        assert shared.visits is not None
        assert relative(shared.visits.credit_M, plain.visits.credit_M) < limit


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Examples]:
    """The batches that were laid out with shared prefixes."""
    made: list[Examples] = []
    arranged = TargetRun.arranged

    def spied(run: TargetRun, batch: Examples) -> Examples:
        found = arranged(run, batch)
        made.extend([found] if run.share_prefixes and shares_prefixes(found) else [])
        return found

    monkeypatch.setattr(TargetRun, "arranged", spied)
    return made


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"packing": True}, {"memory": "sqrt"}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_shared_prefixes_change_nothing(name: str, options: dict[str, Any], seen: list[Examples]) -> None:
    """Ragged answers, several prompts in a batch, rows without a partner, four steps of clipped AdamW, data weights."""
    examples, model = make_rows(), make_model(name)
    weights = 0.5 + torch.rand(len(examples), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"labels": True, "visits": True, "weights_N": weights, **options}
    plain = metagradient(model, examples, RECIPE, METRIC, share_prefixes=False, **options)
    assert seen == []
    shared = metagradient(model, examples, RECIPE, METRIC, **options)
    assert len(seen) >= 8  # four steps, forwards and backwards
    agree(shared, plain)
    assert plain.stats["clipped_share"] == 1.0


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral"])
def test_in_slabs_and_by_windows(name: str, seen: list[Examples], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows have no matrix of what they see; a window counts positions, not columns."""
    examples, model = make_rows(), make_model(name)
    plain = metagradient(model, examples, RECIPE, METRIC, share_prefixes=False)
    agree(metagradient(model, examples, RECIPE, METRIC), plain)
    monkeypatch.setattr(served, "LONG", 1)
    monkeypatch.setattr(form, "LONG", 1)
    agree(metagradient(model, examples, RECIPE, METRIC), plain)
    assert len(seen) >= 16


def test_several_queries_and_factors(seen: list[Examples]) -> None:
    examples, model = make_rows(), make_model("llama")
    metrics = [METRIC, HeldOutLoss(make_examples(3, seed=4)), HeldOutLoss(make_examples(5, seed=5))]
    plain = metagradients(model, examples, RECIPE, metrics, share_prefixes=False)
    shared = metagradients(model, examples, RECIPE, metrics)
    assert relative(shared.token_Q_N_S, plain.token_Q_N_S) < 1e-9
    places = examples.label_N_S.flatten().nonzero()[:, 0]
    table = metagradient(model, examples, RECIPE, METRIC, labels=True, share_prefixes=False).label_N_S_V
    factors = metagradient(model, examples, RECIPE, METRIC, labels="factors").factors
    assert table is not None and factors is not None
    assert relative(factors.at(places), table.flatten(0, 1)[places]) < 1e-9
    assert seen


def test_adapters(seen: list[Examples]) -> None:
    pytest.importorskip("peft")
    rows = make_rows(nested=False).ids_N_S[:, :32]
    ids = rows.sort(0).values  # two prompts, with nothing but the limit of 32 positions in common
    ids[: len(ids) // 2, :20], ids[len(ids) // 2 :, :20] = ids[0, :20].clone(), ids[-1, :20].clone()
    examples = Examples.from_sequences(ids.tolist(), prefix=20)
    model = make_adapted("llama", Lora(2, 4.0))
    plain = metagradient(model, examples, RECIPE, METRIC, share_prefixes=False)
    agree(metagradient(model, examples, RECIPE, METRIC), plain)
    assert seen


def test_a_trained_prompt_is_shared_up_to_its_first_label(seen: list[Examples]) -> None:
    """Losses of the same token in several rows have weights of their own."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, VOCAB, (40,), generator=rng).tolist()
    rows = [prompt + torch.randint(1, VOCAB, (n,), generator=rng).tolist() for n in (3, 5, 2, 6)]
    model, step = make_model("gpt2"), OptimizerSpec("sgd", lr=0.1)
    everything = Examples.from_sequences(rows)
    metagradient(model, everything, step, METRIC)
    assert seen == []
    weights = torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=torch.float64)
    options: dict[str, Any] = {"weights_N": weights, "plan": Plan.of([[0, 1, 2, 3], [3, 2, 1, 0]], 4)}
    for prefix, tokens in ((30, 30 + 4 * 10 + 16), ([30, 36, 40, 33], 30 + 6 + 3 + 10 + 4 + 8 + 16 - 3)):
        examples = Examples.from_sequences(rows, prefix=prefix)
        seen.clear()
        shared = metagradient(model, examples, step, METRIC, **options)
        if prefix == 30:
            assert {int(batch.attention_N_S.sum()) for batch in seen} == {tokens}
        agree(shared, metagradient(model, examples, step, METRIC, share_prefixes=False, **options))
        assert seen


def test_prefix_and_answers_are_all_that_the_model_sees() -> None:
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, VOCAB, (40,), generator=rng).tolist()
    rows = [
        prompt + [number] + torch.randint(1, VOCAB, (n,), generator=rng).tolist() for number, n in enumerate((2, 5, 4))
    ]
    examples, model = Examples.from_sequences(rows, prefix=40), make_model("llama")
    read, counted = list[int](), list[int]()
    handle = model.model.register_forward_pre_hook(
        lambda module, inputs, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    for shares in (False, True):
        run = TargetRun(model, ParameterSpace(model), share_prefixes=shares)
        theta, weights = run.space.read(model), torch.ones(3, dtype=torch.float64)
        read.clear()
        direction, _ = loss_gradient(run, theta, examples, weights)
        dual_pass(run, theta, direction, examples, weights, need_hvp=True, need_labels=False)
        counted.append(sum(read))
    handle.remove()
    assert counted == [2 * 3 * 46, 2 * (40 + 3 + 6 + 5)]


def test_a_row_is_a_tree() -> None:
    """Places see what is before them in their own examples, and nothing else."""
    examples = make_rows()
    made = share(examples, LARGE, 10**6)
    assert made is not None and made.layout is not None
    layout = made.layout
    assert layout.until_N_S is not None and layout.before_N_S is not None
    lengths, system = examples.attention_N_S.sum(1), LEAST + 1
    assert int(made.attention_N_S.sum()) == sum(PROMPTS) + system + sum(map(sum, ANSWERS)) + 1 + 12 + 30
    assert int(made.label_N_S.sum()) == int(examples.label_N_S.sum())
    for row, real in enumerate(made.attention_N_S):
        for place in real.nonzero()[:, 0].tolist():
            own = examples.ids_N_S[layout.owner_N_S[row, place], : layout.column_N_S[row, place] + 1]
            column = torch.arange(len(real))
            visible = (column <= place) & (layout.until_N_S[row] > place)
            assert torch.equal(made.ids_N_S[row, visible], own)
            assert torch.equal(layout.column_N_S[row, visible], torch.arange(len(own)))
            if len(own) > 1:
                assert int(layout.before_N_S[row, place]) == int(visible.nonzero()[-2])
    assert int(lengths.max()) <= made.ids_N_S.shape[1]


def test_how_far_rows_begin_alike() -> None:
    ids = torch.tensor([[3, 1, 4, 1], [3, 1, 5, 9], [2, 6, 5, 3], [3, 1, 4, 2]])
    order, known = neighbours(ids, torch.tensor([4, 3, 2, 3]))
    assert [ids[number].tolist() for number in order] == [[2, 6, 5, 3], [3, 1, 4, 2], [3, 1, 4, 1], [3, 1, 5, 9]]
    assert known == [0, 0, 3, 2]


def test_shared_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)

    def rows(prompt: int, answer: int, count: int) -> Examples:
        ids = torch.randint(1, VOCAB, (count, prompt + answer), generator=rng)
        ids[:, :prompt] = ids[0, :prompt].clone()
        return Examples.from_sequences(ids.tolist(), prefix=prompt)

    assert share(rows(LEAST - 1, 4, 4), LARGE, 10**6) is None  # a short one
    assert share(rows(20, 400, 4), LARGE, 10**6) is None  # saves 4 %
    assert share(rows(40, 4, 4), LARGE, 47) is None  # no two have room
    split = share(rows(40, 4, 6), LARGE, 52)
    assert split is not None and split.ids_N_S.shape == (2, 52)
    small = Shape(100, 16, 1)  # attention is what costs: 32 a pair
    assert share(rows(40, 30, 64), small, 10**6) is None
    halves = share(rows(100, 10, 64), Shape(32 * 2000, 16, 1), 10**6)
    assert halves is not None and 1 < len(halves) < 32  # attention grows with the square of a row
    soft = Examples(*(getattr(rows(40, 4, 3), part) for part in ("ids_N_S", "attention_N_S", "label_N_S")),
                    soft=TableLabels(torch.full((3, 44, VOCAB), 1 / VOCAB)))  # fmt: skip
    assert share(soft, LARGE, 10**6) is None


def test_no_more_tokens_at_once_than_a_micro_batch_has() -> None:
    examples, model = make_rows(), make_model("gpt2")
    run = TargetRun(model, ParameterSpace(model), micro_batch=2, share_prefixes=True)
    most = 2 * examples.ids_N_S.shape[1]
    batch = run.arranged(examples)
    assert shares_prefixes(batch)
    assert {piece.ids_N_S.numel() <= most for _, piece in run.pieces(batch)} == {True}
    alone = TargetRun(model, ParameterSpace(model), micro_batch=1, share_prefixes=True)
    assert int(alone.arranged(examples).ids_N_S.shape[1]) <= examples.ids_N_S.shape[1]


def test_models_that_cannot_keep_plain_rows(seen: list[Examples]) -> None:
    """State along a row; a mask of their own; differences, which leave attention as it is."""
    examples, step = make_rows(nested=False), OptimizerSpec("sgd", lr=0.01)
    recurrent = make_model("mamba").float()
    shared = metagradient(recurrent, examples, step, METRIC)
    assert torch.equal(
        shared.token_N_S, metagradient(recurrent, examples, step, METRIC, share_prefixes=False).token_N_S
    )
    assert "not shared" in " ".join(shared.notes)
    seen.clear()  # of what was tried
    model = make_model("gpt2")
    metagradient(model, examples, step, METRIC, second_order="difference")
    assert seen == []


def test_a_model_that_looks_over_the_edge_is_found() -> None:
    """A convolution over neighbours, which knows of no positions."""

    class Leaky(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.5 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]

    model = make_model("gpt2")
    examples, run = make_rows(), TargetRun(model, ParameterSpace(model))
    batch = shareable(run, [make_examples(4), examples])
    assert batch is examples
    assert can_share(run, batch)
    leaky = make_model("gpt2")
    leaky.transformer.ln_f = nn.Sequential(Leaky(), leaky.transformer.ln_f)
    assert not can_share(TargetRun(leaky, ParameterSpace(leaky)), batch)


def test_without_the_mask_the_numbers_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above would see a completion that reads another one."""
    examples, model = make_rows(), make_model("gpt2")
    made = share(examples, LARGE, 10**6)
    assert made is not None and made.layout is not None and made.layout.until_N_S is not None
    plain = metagradient(model, examples, OptimizerSpec("sgd", lr=0.1), METRIC, share_prefixes=False)
    blind = prefixes.laid_out

    def open_to_all(batch: Examples, rows: Any) -> Examples:
        found = blind(batch, rows)
        assert found.layout is not None and found.layout.until_N_S is not None
        found.layout.until_N_S.fill_(10**6)
        return found

    monkeypatch.setattr(prefixes, "laid_out", open_to_all)
    shared = metagradient(model, examples, OptimizerSpec("sgd", lr=0.1), METRIC)
    assert relative(shared.token_N_S, plain.token_N_S) > 1e-3
