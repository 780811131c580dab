"""The policy step in chunks, with shared prompts, checkpoints and adapters, against plain autograd through all logits, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import VOCAB, make_target
from policies import KL, SPEC, Largest, credit_of, gradients, moved, rollout_of, twin_gradients
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.engine.attribution import AttributionSpec, InnerSettings, attribute_examples
from dpg_cli.engine.generator.align import Reading, target_examples
from dpg_cli.engine.generator.credit import assign, form_of_labels
from dpg_cli.engine.generator.policy import order_of
from dpg_cli.engine.generator.step import rows as layout
from dpg_cli.engine.generator.step.rows import by_length, layouts, members
from dpg_cli.engine.generator.step.sharing import obstacle, window_of
from dpg_cli.engine.inner import head as chunked
from dpg_cli.engine.inner.head import find_head
from dpg_cli.engine.inner.prefixes import Shape
from dpg_cli.engine.inner.recipe import Plan
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import as_metric


def cubes(parameters: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """Φ: the sum of all weights' cubes."""
    return torch.stack([p.pow(3).sum() for p in parameters.values()]).sum()


def close(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9) -> None:
    """Gradients of every parameter agree, and are not all zero."""
    assert found.keys() == expected.keys()
    size = max(float(value.abs().max()) for value in expected.values())
    assert size > 1e-6
    assert max(float((found[name] - expected[name]).abs().max()) for name in found) < limit * size


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kl", [0.0, KL])
def test_chunks_are_the_plain_gradient(
    architecture: str, tied: bool, labels: bool, kl: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a chunk of three tokens, temperature, ragged prompts and completions, silent ids, ratios inside and outside the clip."""
    monkeypatch.setattr(chunked, "CHUNK", 3 * VOCAB)
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 1)
    model, rollout = moved(make_target(architecture, tied=tied)), rollout_of()
    spec = replace(SPEC, kl=kl)
    credit, reference = credit_of(rollout, labels), make_target(architecture, tied=tied) if kl else None
    expected, wanted = twin_gradients(model, rollout, credit, spec, reference)
    assert 0 < wanted["clipped"] < 1
    found, stats = gradients(model, rollout, credit, spec, reference)
    close(found, expected)
    assert stats == pytest.approx(wanted, rel=1e-9)
    found, stats = gradients(model, rollout, credit, replace(spec, micro_batch=2), reference)
    close(found, expected)
    assert stats == pytest.approx(wanted, rel=1e-9)
    for tokens in (1, 20, 1000):
        close(gradients(model, rollout, credit, replace(spec, micro_batch_tokens=tokens), reference)[0], expected)


@pytest.mark.parametrize(("architecture", "attention"), [("gpt2", "sdpa"), ("gpt2", "eager"), ("llama", "sdpa")])
def test_a_shared_prompt_is_the_plain_gradient(
    architecture: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rollout = moved(make_target(architecture, tied=True)), rollout_of()
    model.set_attn_implementation(attention)  # type: ignore[operator]
    head = find_head(model)
    assert head is not None
    assert obstacle(model, head) == ""
    credit, reference = credit_of(rollout, True), make_target(architecture, tied=True)
    spec = replace(SPEC, kl=KL)
    expected, wanted = twin_gradients(model, rollout, credit, spec, reference)
    own = torch.arange(len(rollout))
    whole = sum(len(piece.before_M) for piece in layouts(rollout, own, spec, head))
    assert whole == int(rollout.mask_N_K.sum())
    for count in (2, 3):  # of each group, whatever would be cheaper
        monkeypatch.setattr(layout, "members", lambda *a, count=count: count)
        pieces = list(layouts(rollout, own, replace(spec, share=True), head))
        assert sorted(torch.cat([piece.place_M for piece in pieces]).tolist()) == sorted(
            rollout.mask_N_K.flatten().nonzero()[:, 0].tolist()
        )
        assert sum(len(piece.ids_R_L) for piece in pieces) == {2: 4, 3: 2}[count]
        for options in ({}, {"micro_batch": 3}, {"micro_batch_tokens": 18}):
            found, stats = gradients(model, rollout, credit, replace(spec, share=True, **options), reference)  # type: ignore[arg-type]
            close(found, expected)
            assert stats == pytest.approx(wanted, rel=1e-9)


def test_mini_batches_of_shared_prompts_are_whole_groups() -> None:
    rollout = rollout_of()
    order = order_of(rollout, replace(SPEC, share=True, minibatch=3), torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(6))
    assert sorted(sorted(part.tolist()) for part in order.split(3)) == [[0, 1, 2], [3, 4, 5]]
    plainly = order_of(rollout, replace(SPEC, minibatch=3), torch.Generator().manual_seed(0))
    assert torch.equal(plainly, torch.randperm(6, generator=torch.Generator().manual_seed(0)))


def test_models_that_cannot_share_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALiBi goes by columns, Mamba's state along the row; a backbone that takes no positions is said to."""
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)).double().eval()
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    for model in (bloom, mamba):
        assert obstacle(model, find_head(model)) != ""
    assert "linear map" in obstacle(bloom, None)
    gpt2 = make_target("gpt2", tied=True).eval()
    head = find_head(gpt2)
    monkeypatch.setattr(GPT2Config, "_attn_implementation", "flash_attention_2")
    assert "flash_attention_2" in obstacle(gpt2, head)


def test_rows_stay_within_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=VOCAB, num_key_value_heads=2, sliding_window=14, **options)  # type: ignore[arg-type]
    model = moved(MistralForCausalLM(config).double())
    head = find_head(model)
    assert head is not None
    assert window_of(head) == 14
    assert window_of(find_head(make_target("gpt2", tied=True))) == 0  # type: ignore[arg-type]
    monkeypatch.setattr(layout, "members", lambda shape, prompt, completion, group: group)
    rollout, spec = rollout_of(), replace(SPEC, share=True)
    widths = [piece.ids_R_L.shape[1] for piece in layouts(rollout, torch.arange(6), spec, head, 14)]
    assert max(widths) <= 14
    expected, _ = twin_gradients(model, rollout, credit_of(rollout, True), spec)
    close(gradients(model, rollout, credit_of(rollout, True), spec)[0], expected, 1e-6)  # its RMSNorm rounds to float32
    widths = [piece.ids_R_L.shape[1] for piece in layouts(rollout, torch.arange(6), spec, head, 9)]
    assert max(widths) == 10  # plain rows: one completion after its prompt


def test_sharing_where_it_pays() -> None:
    gpt2 = Shape(weights=85_000_000, width=768, layers=12)
    assert members(gpt2, 960, 32, 4) == 4
    assert members(gpt2, 960, 128, 4) == 4
    assert members(gpt2, 12, 32, 8) == 8
    assert members(gpt2, 2, 32, 8) == 1
    tiny = Shape(weights=100_000, width=64, layers=2)
    assert members(tiny, 10, 32, 8) == 1
    assert members(gpt2, 200, 128, 64) < 64  # attention grows with the square of a row


def test_rows_by_length() -> None:
    assert by_length([3, 1, 2], 0, 0) == [[0, 1, 2]]
    assert by_length([3, 1, 2], 2, 0) == [[0, 1], [2]]
    assert by_length([3, 1, 2, 9], 0, 6) == [[1, 2], [0], [3]]
    assert by_length([3, 1, 2], 1, 100) == [[1], [2], [0]]


def test_nothing_has_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a step, of the backbone's chunks and of a metagradient with factored credits, counted in elements."""
    monkeypatch.setattr(chunked, "CHUNK", 4 * 3001)
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 4)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=3001, n_positions=32, n_embd=8, n_layer=1, n_head=2, tie_word_embeddings=False)
    model, start = moved(GPT2LMHeadModel(config).double()), GPT2LMHeadModel(config).double().eval()
    sizes = {p.numel() for p in model.parameters()} | {sum(p.numel() for p in model.parameters())}
    spec, largest = replace(SPEC, kl=KL), []
    for count in (8, 24):
        rollout = rollout_of(3001, (6, 4), (12,) * count)
        examples = Examples.from_sequences([[1, *row] for row in rollout.ids_N_K.tolist()])
        with Largest(sizes) as seen:
            made = metagradient(start, examples, OptimizerSpec(lr=1e-2, eps=1e-2), cubes, labels="factors")
        largest.append(seen.found)
        assert made.factors is not None and made.label_N_S_V is None
        credit = assign("expected", made.token_N_S[:, 1:], made.factors.placed(12, 1), rollout.mask_N_K, 4)
        with Largest(sizes) as seen:
            gradients(model, rollout, credit, spec, start)
        assert seen.found <= max(4 * 3001, count * 17 * 4 * 8)  # a chunk of logits, or what the backbone has
    assert (
        largest[0] == 6 * 24 * 3001
    )  # of the self-check, of whole logits, which is made once for a model and a fixed size
    assert largest[1] < 24 * 12 * 3001 / 10
    with Largest(sizes) as seen:
        twin_gradients(model, rollout, credit_of(rollout, True, 3001), spec, start)
    assert seen.found >= 24 * 12 * 3001


@pytest.mark.parametrize("second_order", ["exact", "difference"])
@pytest.mark.parametrize("kind", ["one", "several", "twice", "packed", "frozen"])
def test_factors_are_the_credits_of_labels(kind: str, second_order: str) -> None:
    """Against the whole table: one step and several, examples visited twice (also in one batch), packed rows, a frozen head."""
    model = make_target("gpt2", tied=kind != "frozen")
    if kind == "frozen":
        model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    rows = [[1, 5, 9, 3], [1, 2], [1, 8, 8, 4, 6, 2], [1, 20, 3]]
    examples = Examples.from_sequences(rows)
    plan = {
        "several": Plan.of([[0, 1], [2, 3]], 4), "twice": Plan.of([[0, 1, 0], [2, 3], [1, 0]], 4),
    }.get(kind)  # fmt: skip
    options: dict[str, Any] = {"plan": plan, "packing": kind == "packed", "second_order": second_order}
    optimizer = OptimizerSpec("adamw", lr=1e-2, eps=1e-2)
    whole = metagradient(model, examples, optimizer, cubes, labels=True, **options)
    found = metagradient(model, examples, optimizer, cubes, labels="factors", **options)
    assert whole.label_N_S_V is not None and found.factors is not None and found.label_N_S_V is None
    places = torch.arange(examples.ids_N_S.numel())
    table = whole.label_N_S_V.flatten(0, 1)
    assert float((found.factors.at(places) - table).abs().max()) < 1e-9 * float(table.abs().max())
    some = torch.tensor([3, 14, 7])
    scaled = found.factors.scaled(torch.tensor(2.0, dtype=torch.float64)).scaled(torch.tensor(3.0, dtype=torch.float64))
    torch.testing.assert_close(scaled.at(some), 6 * table[some], rtol=1e-9, atol=0.0)


def test_factored_credit_is_the_dense_step() -> None:
    """The gradient of a policy step, with credits in factors and with all of them, by one run and by several."""
    target, generator = make_target("gpt2", tied=True), moved(make_target("gpt2", tied=True))
    rollout = rollout_of()
    examples, offset = target_examples(rollout, 1)
    reading = Reading(examples, torch.zeros_like(examples.ids_N_S), rollout.ids_N_K.shape[1], True, offset)
    inner = InnerSettings(OptimizerSpec("adamw", lr=1e-2, eps=1e-2), 2)
    for spec in (AttributionSpec(), AttributionSpec(runs=2)):
        credits = []
        for labels in (True, "factors"):
            result = attribute_examples(target, examples, as_metric(cubes), spec, inner, group_size=3, labels=labels)  # type: ignore[arg-type]
            _, made = reading.to_completions(result)
            token = result.token_N_S[:, offset:]
            credits.append(assign("expected", token, made, rollout.mask_N_K, 3))
        dense, factored = credits
        assert factored.label_N_K_V is None and dense.factors is None
        close(gradients(generator, rollout, factored, SPEC)[0], gradients(generator, rollout, dense, SPEC)[0])
        expected, _ = twin_gradients(generator, rollout, dense, SPEC)
        close(gradients(generator, rollout, factored, SPEC)[0], expected)


def test_which_form_labels_take() -> None:
    assert form_of_labels(256 * 33, 512, 64, 1) is True
    assert form_of_labels(1024 * 129, 50257, 768, 1) == "factors"
    assert form_of_labels(64 * 33, 50257, 768, 64) is True  # as many heads would be more


def test_a_target_without_a_head_gives_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_target("gpt2", tied=True)
    toy.config.logit_scale = 0.5  # type: ignore[union-attr]
    examples = Examples.from_sequences([[1, 5, 9, 3], [1, 2]])
    found = metagradient(toy, examples, OptimizerSpec(lr=1e-2, eps=1e-2), cubes, labels="factors")
    assert found.factors is None and found.label_N_S_V is not None
    monkeypatch.setattr("dpg_cli.engine.metagrad.MOST_LABELS", 100)
    with pytest.raises(UsageError, match="no standard LM head"):
        metagradient(toy, examples, OptimizerSpec(lr=1e-2, eps=1e-2), cubes, labels="factors")
