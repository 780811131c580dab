"""The shipped custom metrics: against finite differences in float64, by hand, and in short real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import make_examples

from dpg_cli.driver.execute import execute
from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.errors import UsageError
from dpg_cli.evidence.verify import verify_run
from dpg_cli.metrics.base import Metric, Pictured, TargetMetric
from dpg_cli.metrics.examples.bitmap import HEART, AttentionBitmap
from dpg_cli.metrics.examples.forget import ForgetText
from dpg_cli.metrics.examples.labels import LabelAccuracy
from dpg_cli.metrics.examples.steer import SteerDirection
from dpg_cli.models.loading import LanguageModel, load, untie_head
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.presets import find, resolve
from dpg_cli.tiny import world

EXAMPLES: dict[str, Callable[[LanguageModel], Metric]] = {
    "steer-direction": lambda target: SteerDirection(target, layer=1),
    "label-accuracy": LabelAccuracy,
    "attention-bitmap": lambda target: AttentionBitmap(target, sharpness=50.0, origin=(2, 5)),
    "forget-text": lambda target: ForgetText(target, keep_weight=0.7),
}


@pytest.fixture(scope="module")
def target() -> LanguageModel:
    """The embedded model in float64, its head untied."""
    model = load("tiny", device=torch.device("cpu"), dtype="float64")
    untie_head(model.model)
    return model


def parameters_of(target: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in target.model.named_parameters()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_gradients_are_those_of_finite_differences(name: str, target: LanguageModel) -> None:
    """At a perturbed θ, along random directions: (Φ(θ + h d) - Φ(θ - h d)) / 2h = <∇Φ, d> to O(h²)."""
    metric = EXAMPLES[name](target)
    rng = torch.Generator().manual_seed(1)
    theta = {
        key: value + 0.01 * torch.randn(value.shape, generator=rng, dtype=value.dtype)
        for key, value in parameters_of(target).items()
    }
    leaves = {key: value.clone().requires_grad_() for key, value in theta.items()}
    value = metric(leaves, target.model)
    grads = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    size = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values() if grad is not None))
    assert size > 1e-4
    for _ in range(3):
        direction = {
            key: torch.randn(value.shape, generator=rng, dtype=value.dtype) if grads[key] is None
            else torch.randn(value.shape, generator=rng, dtype=value.dtype) + grads[key] / size
            for key, value in theta.items()
        }  # fmt: skip
        slope = sum(float((grad * direction[key]).sum()) for key, grad in grads.items() if grad is not None)
        h = 1e-6
        up, down = (
            float(metric({key: value + s * h * direction[key] for key, value in theta.items()}, target.model))
            for s in (1, -1)
        )
        assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-5 * size)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_step_along_the_metagradient_raises_the_metric(name: str, target: LanguageModel) -> None:
    """w + h τ/‖τ‖ changes Φ by h ‖τ‖, to first order, through two AdamW steps."""
    metric, examples = EXAMPLES[name](target), make_examples(6)
    spec = OptimizerSpec("adamw", lr=1e-2, beta2=0.95, eps=1e-2)
    base = metagradient(target.model, examples, spec, metric, batch_size=3)
    slope, h = float(base.example_N.norm()), 1e-4
    up, down = (
        metagradient(
            target.model, examples, spec, metric, batch_size=3, weights_N=1 + s * h * base.example_N / slope
        ).value
        for s in (1, -1)
    )
    assert slope > 0
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5)
    assert isinstance(metric, TargetMetric)
    assert isinstance(metric, Pictured) == (name == "attention-bitmap")
    assert len(metric.describe()) > 20


def test_steering_by_hand(target: LanguageModel) -> None:
    """Φ is the projection of the mean hidden state; along the direction it moves one for one."""
    texts = ["the old king sells a map.", "a cat"]
    metric = SteerDirection(target, layer=-1, prompts=texts)
    assert float(metric.direction.norm()) == pytest.approx(1, rel=1e-12)
    states = []
    for text in texts:
        ids = torch.tensor([[target.bos_id, *target.tokenizer(text)["input_ids"], target.eos_id]])
        states.append(target.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0])
    expected = float((torch.cat(states).mean(0) @ metric.direction).detach())
    parameters = parameters_of(target)
    assert float(metric(parameters, target.model)) == pytest.approx(expected, rel=1e-9)
    assert metric.measures(parameters, target.model)["share_of_gap"] == pytest.approx(0, abs=1e-12)
    parameters["transformer.ln_f.bias"] += 0.5 * metric.gap * metric.direction  # the last state, for every token
    assert metric.measures(parameters, target.model)["share_of_gap"] == pytest.approx(0.5, rel=1e-9)
    with pytest.raises(UsageError, match=r"no layer 7\. Give one of -3 to 2"):
        SteerDirection(target, layer=7)
    with pytest.raises(UsageError, match="one mean hidden state"):
        SteerDirection(target, toward=["a cat"], away=["a cat"])


def test_label_accuracy_by_hand(target: LanguageModel, tmp_path: Path) -> None:
    """Labels that are the model's own greedy continuation are all right; loss and accuracy count label tokens alone."""
    pairs = []
    for text in ("the old king sells a map", "rephrase: the small dog hides a hat in the garden now.\nthe"):
        ids = [target.bos_id, *target.tokenizer(text, add_special_tokens=False)["input_ids"]]
        best = int(target.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        pairs.append((text, target.tokenizer.decode([best])))
    pairs.append(("the old king sells a", "zq"))
    file = tmp_path / "set.jsonl"
    file.write_text("\n\n".join(json.dumps({"text": text, "label": label}) for text, label in pairs))
    metric = LabelAccuracy(target, str(file))
    found = metric.measures(parameters_of(target), target.model)
    assert found["accuracy"] == pytest.approx(2 / 3)
    total, count = 0.0, 0
    for text, label in pairs:
        context, label_ids = (target.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, label))
        row = [target.bos_id, *context, *label_ids]
        log = target.model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1)
        for place in range(len(row) - len(label_ids), len(row)):
            total, count = total - float(log[place - 1, row[place]].detach()), count + 1
    assert found["label_loss"] == pytest.approx(total / count, rel=1e-9)
    assert float(metric(parameters_of(target), target.model)) == pytest.approx(-total / count, rel=1e-9)
    for wrong in ("", "[]\n", '{"text": "a"}\n', '{"text": "a", "label": ""}\n', "x\n"):
        file.write_text(wrong)
        with pytest.raises(UsageError, match=r"set\.jsonl"):
            LabelAccuracy(target, str(file))
    with pytest.raises(UsageError, match="cannot be read"):
        LabelAccuracy(target, str(tmp_path / "none.jsonl"))


def test_bitmap_by_hand(target: LanguageModel) -> None:
    metric = AttentionBitmap(target, origin=(1, 2), sharpness=10.0)
    assert metric.parameter == "transformer.h.0.attn.c_attn.weight"
    parameters = parameters_of(target)
    assert float(metric(parameters, target.model)) == pytest.approx(-math.log(2), rel=1e-12)
    signs = torch.tensor([[1.0 if cell == "#" else -1.0 for cell in row] for row in HEART], dtype=torch.float64)
    parameters[metric.parameter][1:7, 2:9] += 0.05 * signs
    assert metric.measures(parameters, target.model)["pixel_accuracy"] == 1.0
    assert float(metric(parameters, target.model)) == pytest.approx(-math.log1p(math.exp(-0.5)), rel=1e-9)
    parameters[metric.parameter][1, 2] += 1
    assert metric.measures(parameters, target.model)["pixel_accuracy"] == pytest.approx(41 / 42)
    assert metric.picture(parameters).size[0] > 100
    with pytest.raises(UsageError, match="no matrix 'lm_haed'"):
        AttentionBitmap(target, parameter="lm_haed")
    with pytest.raises(UsageError, match=r"does not fit at \(95, 0\) in transformer.h.0.attn.c_attn.weight of 96x288"):
        AttentionBitmap(target, origin=(95, 0))


def test_forgetting_by_hand(target: LanguageModel) -> None:
    metric = ForgetText(target, forget=world.sentences("eval", "it", 3, 5), keep=["the cat."], keep_weight=2.0)
    parameters = parameters_of(target)
    found = metric.measures(parameters, target.model)
    assert float(metric(parameters, target.model)) == pytest.approx(
        found["forget_loss"] - 2 * found["keep_loss"], rel=1e-9
    )
    ids = torch.tensor([[target.bos_id, *target.tokenizer("the cat.")["input_ids"], target.eos_id]])
    assert found["keep_loss"] == pytest.approx(float(target.model(input_ids=ids, labels=ids).loss.detach()), rel=1e-6)


BLANK = [  # a blank generator and target, as in the pattern presets; the patch lies in the columns that make the values
    "models.generator_init=random", "models.target_init=random", "models.untie_generator=true", "prompts.source=empty",
    "rollout.min_tokens=32", "credit.discount=0.5", "inner.eps=3e-3", "policy.lr=3e-3", "metric.options.origin=[0,192]",
]  # fmt: skip
SHORT = ["prompts.per_step=16", "inner.batch_size=64", "policy.minibatch=64", "dataset.examples=128"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "measure", "sign"),
    [
        ("steer-direction", 20, "projection", 1),
        ("label-accuracy", 12, "label_loss", -1),
        ("attention-bitmap", 24, "pixel_accuracy", 1),
        ("forget-text", 40, "forget_loss", 1),
    ],
)
def test_a_short_run_moves_its_measure(name: str, steps: int, measure: str, sign: int, tmp_path: Path) -> None:
    """By the preset, at half its batch: stock AdamW on the data moves the measure, and beyond what the control does."""
    own = {"attention-bitmap": BLANK, "forget-text": ["metric.options.keep_weight=0.3"]}.get(name, [])
    config = resolve(find("custom.tiny").data(), [*SHORT, *own, f"steps={steps}", f"metric.path={name}"])
    folder = RunFolder(tmp_path / "run")
    outcome = execute(config, folder)
    verdict = verify_run(folder, trainer="plain")
    data, control, before = verdict.data.measures, verdict.control.measures, verdict.before
    assert data["phi"] == pytest.approx(outcome.measures["phi"], rel=1e-3, abs=1e-4)  # the engine's own figure
    assert data["phi"] > max(control["phi"], before["phi"])
    assert sign * data[measure] > max(sign * control[measure], sign * before[measure])
    assert folder.image.is_file() == (name == "attention-bitmap")
