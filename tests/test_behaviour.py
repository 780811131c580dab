"""The metrics of behaviour: by hand, against finite differences in float64, from files, refused in one line."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_examples
from torch.nn.functional import log_softmax

from dpg_cli.data.examples import Encoding, RowEncoder
from dpg_cli.data.prepared import gathered_items, prepare
from dpg_cli.data.shapes import Pair
from dpg_cli.engine import Examples, OptimizerSpec, metagradient
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Metric
from dpg_cli.metrics.behaviour.answer import AnswerProbability
from dpg_cli.metrics.behaviour.answers import said_in
from dpg_cli.metrics.behaviour.choice import MultipleChoice, place_of
from dpg_cli.metrics.behaviour.composite import Composite, weights_of
from dpg_cli.metrics.behaviour.lens import LogitLens, final_norm
from dpg_cli.metrics.behaviour.preference import PreferencePairs
from dpg_cli.metrics.catalogue import catalogue
from dpg_cli.metrics.examples.forget import ForgetText
from dpg_cli.metrics.examples.steer import SteerDirection
from dpg_cli.metrics.registry import build_metric
from dpg_cli.models.loading import LanguageModel, load, untie_head
from dpg_cli.settings.config import CustomOptions, NormOptions

PARTS = {"german": {"metric": "answer-probability"}, "size": {"name": "norm"}}
METRICS: dict[str, Callable[[LanguageModel], Metric]] = {
    "answer": AnswerProbability,
    "choice": MultipleChoice,
    "choice by first tokens": lambda target: MultipleChoice(target, by="first"),
    "preference": lambda target: PreferencePairs(target, beta=0.3),
    "preference with a reference": lambda target: PreferencePairs(target, beta=0.3, reference=True, by="mean"),
    "lens": lambda target: LogitLens(target, layer=1, by="mean"),
    "composite": lambda target: Composite(target, "german - 0.01*size", PARTS),
}


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    """The embedded model in float64, its head untied."""
    model = load("tiny", device=torch.device("cpu"), dtype="float64")
    untie_head(model.model)
    return model


def parameters_of(target: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in target.model.named_parameters()}


def value(metric: Metric, target: LanguageModel) -> float:
    with torch.no_grad():
        return float(metric(parameters_of(target), target.model))


def file(place: Path, *rows: dict[str, Any]) -> str:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@torch.no_grad()
def by_hand(target: LanguageModel, prompt: str, answer: str) -> torch.Tensor:
    """log p of each token of an answer, one row at a time, by the model's own logits."""
    start = [] if target.bos_id is None else [target.bos_id]
    ids = start + target.tokenizer(prompt + answer)["input_ids"]
    before = len(start) + len(target.tokenizer(prompt)["input_ids"])
    logits = target.model(input_ids=torch.tensor([ids])).logits[0]
    return torch.stack([log_softmax(logits[place - 1], -1)[ids[place]] for place in range(before, len(ids))])


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_finite_differences(name: str, target: LanguageModel) -> None:
    """At a perturbed θ along a direction that follows the gradient: (Φ(θ + h d) - Φ(θ - h d)) / 2h = <∇Φ, d> to O(h²)."""
    metric, rng = METRICS[name](target), torch.Generator().manual_seed(1)
    theta = {
        key: at + 0.01 * torch.randn(at.shape, generator=rng, dtype=at.dtype)
        for key, at in parameters_of(target).items()
    }
    leaves = {key: at.clone().requires_grad_() for key, at in theta.items()}
    grads = torch.autograd.grad(metric(leaves, target.model), list(leaves.values()), allow_unused=True)
    found = {key: torch.zeros_like(theta[key]) if g is None else g for key, g in zip(leaves, grads, strict=True)}
    size = math.sqrt(sum(float(grad.square().sum()) for grad in found.values()))
    assert size > 1e-3
    direction = {
        key: torch.randn(at.shape, generator=rng, dtype=at.dtype) + found[key] / size for key, at in theta.items()
    }
    slope = sum(float((grad * direction[key]).sum()) for key, grad in found.items())
    h = 1e-6
    with torch.no_grad():
        up, down = (
            float(metric({key: at + s * h * direction[key] for key, at in theta.items()}, target.model))
            for s in (1, -1)
        )
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize("name", METRICS)
def test_a_step_along_the_metagradient_raises_it(name: str, target: LanguageModel) -> None:
    """w + h τ/‖τ‖ changes Φ by h ‖τ‖, to first order, through two AdamW steps."""
    metric, examples = METRICS[name](target), make_examples(6)
    spec = OptimizerSpec("adamw", lr=1e-2, beta2=0.95, eps=1e-2)
    base = metagradient(target.model, examples, spec, metric, batch_size=3)
    slope, h = float(base.example_N.norm()), 1e-6
    assert slope > 0
    up, down = (
        metagradient(
            target.model, examples, spec, metric, batch_size=3, weights_N=1 + s * h * base.example_N / slope
        ).value
        for s in (1, -1)
    )
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_float32_has_the_gradient_of_float64(name: str, target: LanguageModel) -> None:
    grads = []
    for own in (target, load("tiny", device=torch.device("cpu"))):
        if own is not target:
            untie_head(own.model)
        leaves = {key: at.requires_grad_() for key, at in parameters_of(own).items()}
        found = torch.autograd.grad(METRICS[name](own)(leaves, own.model), list(leaves.values()), allow_unused=True)
        grads.append(torch.cat([torch.zeros(1) if grad is None else grad.double().flatten() for grad in found]))
    wide, narrow = grads
    assert float((wide - narrow).norm() / wide.norm()) < 1e-4


def data(target: LanguageModel, count: int = 12) -> tuple[Examples, torch.Tensor]:
    """Prompts answered in German, then prompts answered in English, of meanings that no metric holds; True for German."""
    pairs = [Pair(*pair) for language in ("de", "en") for pair in said_in(language, 32 + count)[32:]]
    encoder = RowEncoder(target, Encoding(begin=True))
    found = prepare(gathered_items(pairs, "pairs"), encoder)
    return Examples(*found.tensors(encoder)), torch.arange(2 * count) < count


@pytest.mark.parametrize(
    ("name", "least"),
    [("answer", 0.95), ("choice", 0.95), ("choice by first tokens", 0.95), ("preference", 0.95), ("lens", 0.75)],
)
def test_german_answers_are_credited_with_german_behaviour(name: str, least: float, target: LanguageModel) -> None:
    """Of a fine-tuning on both, every metric for German credits the German rows more: they are told apart by their score."""
    examples, german = data(target)
    metric = METRICS[name](target)
    found = metagradient(target.model, examples, OptimizerSpec("adamw", lr=1e-3, eps=1e-3), metric, batch_size=8)
    scores = found.example_N
    above = (scores[german][:, None] > scores[~german][None]).double().mean()
    assert float(above) > least  # an early layer says less of it
    before = metric.measures(parameters_of(target), target.model)
    assert set(before) == set(found.measures)


def test_answers_are_the_models_own(target: LanguageModel, tmp_path: Path) -> None:
    rows = [("Say: the cat sleeps.\n", "die katze"), ("Say: a dog runs now.\n", "ein hund läuft jetzt.")]
    source = file(tmp_path, *({"prompt": prompt, "completion": answer} for prompt, answer in rows))
    hand = [by_hand(target, *row) for row in rows]
    for by, want in (
        ("sum", sum(float(each.sum()) for each in hand) / 2),
        ("mean", sum(float(each.mean()) for each in hand) / 2),
        ("first", sum(float(each[0]) for each in hand) / 2),
    ):
        assert value(AnswerProbability(target, source, by), target) == pytest.approx(want, rel=1e-10)
    measures = AnswerProbability(target, source).measures(parameters_of(target), target.model)
    tokens = torch.cat(hand)
    assert measures["nats"] == pytest.approx(-float(tokens.mean()), rel=1e-10)


def test_pieces_change_nothing(target: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many documents go through the model a piece at a time: the same Φ and gradient."""
    whole = AnswerProbability(target)
    monkeypatch.setattr("dpg_cli.metrics.text_loss.TOKENS", 200)
    cut = AnswerProbability(target)
    assert len(whole.answers.pieces) == 1 < len(cut.answers.pieces)
    grads = []
    for metric in (whole, cut):
        leaves = {key: at.requires_grad_() for key, at in parameters_of(target).items()}
        phi = metric(leaves, target.model)
        grads.append([phi.detach(), *torch.autograd.grad(phi, list(leaves.values()))])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_choices_by_hand(target: LanguageModel, tmp_path: Path) -> None:
    prompt, choices = "Say: the cat sleeps.\n", ["die katze schläft.", "the cat sleeps.", "un gato"]
    sums = [float(by_hand(target, prompt, choice).sum()) for choice in choices]
    want = sums[2] - math.log(math.exp(sums[0]) + math.exp(sums[1]))
    for answer in (2, "C", "c", "un gato"):
        source = file(tmp_path, {"prompt": prompt, "choices": choices, "answer": answer})
        metric = MultipleChoice(target, source)
        assert value(metric, target) == pytest.approx(want, rel=1e-9)
        best = max(range(3), key=sums.__getitem__)
        assert metric.measures(parameters_of(target), target.model)["accuracy"] == float(best == 2)
    arc = {"question": prompt, "choices": {"text": choices, "label": ["1", "2", "3"]}, "answer": "3"}
    assert place_of("3", choices, ["1", "2", "3"]) == 2
    assert MultipleChoice(target, file(tmp_path, arc)).right_Q.tolist() == [2]


def test_preferences_by_hand(target: LanguageModel, tmp_path: Path) -> None:
    prompt, chosen, rejected = "Say: the cat sleeps.\n", "die katze schläft.", "the cat"
    margin = float(by_hand(target, prompt, chosen).sum() - by_hand(target, prompt, rejected).sum())
    source = file(tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    want = -math.log1p(math.exp(-0.3 * margin))
    assert value(PreferencePairs(target, source, beta=0.3), target) == pytest.approx(want, rel=1e-9)
    metric = PreferencePairs(target, source, beta=0.3, reference=True)
    assert value(metric, target) == pytest.approx(-math.log(2), rel=1e-9)  # θ is θ_0
    assert metric.measures(parameters_of(target), target.model)["margin"] == pytest.approx(0, abs=1e-9)


def test_the_lens_after_the_last_block_but_one_differs_and_after_the_last_is_refused(target: LanguageModel) -> None:
    """Reading by hand at layer 1: the final norm and the head on that hidden state."""
    metric = LogitLens(target, layer=1, by="first")
    examples = metric.answers.examples
    with torch.no_grad():
        output = target.model(input_ids=examples.ids_N_S, output_hidden_states=True)
        norm = target.model.base_model.get_submodule(final_norm(target, 1))
        logits = log_softmax(target.model.lm_head(norm(output.hidden_states[1])), -1)
    first = examples.label_N_S.int().argmax(1)
    rows = torch.arange(len(first))
    want = logits[rows, first - 1, examples.ids_N_S[rows, first]].mean()
    assert value(metric, target) == pytest.approx(float(want), rel=1e-9)
    with pytest.raises(UsageError, match="no layer 9 before its last"):
        LogitLens(target, layer=9)


def test_a_composite_is_the_sum_of_its_parts(target: LanguageModel) -> None:
    metric = Composite(target, "2*(german + 0.5*size) - german", PARTS)
    german = value(AnswerProbability(target), target)
    norm = float(target.head.detach().norm())
    assert value(metric, target) == pytest.approx(german - norm, rel=1e-10)
    measures = metric.measures(parameters_of(target), target.model)
    assert measures["size"] == pytest.approx(-norm, rel=1e-10)
    assert measures["size.norm"] == pytest.approx(norm, rel=1e-10)
    assert weights_of("-a + 2*b*3 - (c - a)") == {"a": 0.0, "b": 6.0, "c": -1.0}
    settings = {"sum": "german + size", "parts": PARTS}
    built = build_metric(CustomOptions(name="custom", path="composite", options=settings), target)
    assert value(built, target) == pytest.approx(german - norm, rel=1e-10)
    assert value(build_metric(NormOptions(name="norm"), target), target) == pytest.approx(-norm, rel=1e-10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda target, place: AnswerProbability(target, by="median"), "no way to read an answer"),
        (lambda target, place: MultipleChoice(target, file(place, {"prompt": "a"})), "no column 'choices'"),
        (lambda target, place: MultipleChoice(target, file(place, {"prompt": "a", "choices": ["b", "c"], "answer": 2})), "neither the number"),
        (lambda target, place: MultipleChoice(target, file(place, {"prompt": "a", "choices": ["b"], "answer": 0})), "two or more"),
        (lambda target, place: MultipleChoice(target, file(place, {"prompt": "a", "choices": ["b", "b"], "answer": 0}), "first"), "same token"),
        (lambda target, place: MultipleChoice(target, file(place, {"choices": ["b", "c"], "answer": 0})), "no `prompt`"),
        (lambda target, place: PreferencePairs(target, file(place, {"chosen": "a", "rejected": "b"})), "list of messages is needed"),
        (lambda target, place: PreferencePairs(target, beta=0.0), "not larger than 0"),
        (lambda target, place: AnswerProbability(target, file(place, {"prompt": "a", "completion": ""})), "no token"),
        (lambda target, place: Composite(target, "a + b", {"a": {"name": "norm"}}), "'b', which is no part"),
        (lambda target, place: Composite(target, "a", {"a": {"name": "norm"}, "b": {"name": "norm"}}), "does not occur"),
        (lambda target, place: Composite(target, "a*a", {"a": {"name": "norm"}}), "no weighted sum"),
        (lambda target, place: Composite(target, "a + 1", {"a": {"name": "norm"}}), "no weighted sum"),
        (lambda target, place: Composite(target, "a", {"a": {"name": "norms"}}), "no metric's settings"),
        (lambda target, place: Composite(target, "a", {"a": {"metric": "mine.py:Mine"}}), "only where --metric names it"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(
    make: Callable[[LanguageModel, Path], Metric], words: str, target: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        make(target, tmp_path)
    assert "\n" not in refused.value.cause


def test_texts_may_come_from_a_file(target: LanguageModel, tmp_path: Path) -> None:
    texts = ["der alte könig verkauft eine karte.", "eine katze"]
    source = file(tmp_path, *({"text": text} for text in texts))
    one, other = (SteerDirection(target, layer=1, toward=given) for given in (texts, source))
    torch.testing.assert_close(one.direction, other.direction, rtol=0, atol=0)
    assert not torch.allclose(one.direction, SteerDirection(target, layer=1).direction)
    kept, same = (ForgetText(target, keep=given) for given in (texts, source))
    assert value(kept, target) == value(same, target)


def test_how_answers_were_understood_is_said(target: LanguageModel, tmp_path: Path) -> None:
    """Also the embedded ones; and texts that a target's chat template does not frame, which messages are."""
    assert "the embedded answers: 32 rows" in AnswerProbability(target).notes[0]
    tokenizer = copy.deepcopy(target.tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    chatting = replace(target, tokenizer=tokenizer)
    texts, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    texts.write_text('{"prompt": "Anna sees", "completion": " a cat."}\n', encoding="utf-8")
    asked, said = [{"role": "user", "content": "Anna sees"}], [{"role": "assistant", "content": " a cat."}]
    chats.write_text(json.dumps({"prompt": asked, "completion": said}) + "\n", encoding="utf-8")
    assert not any("chat template" in note for note in AnswerProbability(target, str(texts)).notes)
    assert any("does not frame" in note for note in AnswerProbability(chatting, str(texts)).notes)
    assert not any("does not frame" in note for note in AnswerProbability(chatting, str(chats)).notes)


def test_they_are_listed(target: LanguageModel) -> None:
    names = {entry.name: entry for entry in catalogue()}
    for name in ("answer-probability", "multiple-choice", "preference-pairs", "logit-lens", "composite"):
        assert "cannot be loaded" not in names[name].about
    assert names["multiple-choice"].options == ["file", "by"]
