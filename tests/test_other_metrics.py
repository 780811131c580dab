"""Norm and text-loss metrics, by hand and against finite differences; their verification."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import make_examples, make_target

from dpg_cli.driver.execute import execute
from dpg_cli.engine import OptimizerSpec, metagradient
from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.evidence.effect import EffectVerdict, Reading
from dpg_cli.evidence.text import count
from dpg_cli.evidence.verify import saved_norm, verify_run
from dpg_cli.metrics.base import Pictured, TargetMetric
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.metrics.registry import build_metric, held_out
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.models.loading import load
from dpg_cli.patterns.pattern import pattern_from_rows
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import TextLossOptions, validate
from dpg_cli.settings.presets import find, resolve
from dpg_cli.tiny import world

CPU = torch.device("cpu")


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_norm_by_hand() -> None:
    model = make_target("gpt2", tied=False)
    metric = NormMetric(model)
    parameters = parameters_of(model)
    expected = math.sqrt(sum(x * x for x in parameters["lm_head.weight"].flatten().tolist()))
    assert float(metric(parameters, model)) == pytest.approx(-expected, rel=1e-12)
    parameters["lm_head.weight"] *= 0.5
    assert metric.measures(parameters, model)["norm"] == pytest.approx(expected / 2, rel=1e-9)
    assert metric.measures(parameters, model)["norm_change"] == pytest.approx(-expected / 2, rel=1e-9)
    assert NormMetric(model, "transformer.wpe.weight").parameter == "transformer.wpe.weight"
    with pytest.raises(UsageError, match="no parameter"):
        NormMetric(model, "nope")


def test_text_loss_is_transformers_own_loss() -> None:
    model = make_target("llama", tied=True)
    documents = make_examples(5, seed=2)
    metric = TextLossMetric(model, documents, "five documents")
    labels = documents.ids_N_S.masked_fill(~documents.label_N_S, -100)
    expected = float(model(input_ids=documents.ids_N_S, labels=labels).loss.detach())
    parameters = parameters_of(model)
    assert float(metric(parameters, model)) == pytest.approx(-expected, rel=1e-6)  # theirs is float32
    assert metric.measures(parameters, model)["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)


@pytest.mark.parametrize("make", [lambda m: NormMetric(m), lambda m: TextLossMetric(m, make_examples(5, seed=2), "x")])
def test_a_step_along_the_metagradient_raises_the_metric(make) -> None:
    """w + h τ/‖τ‖ changes Φ by h ‖τ‖, to first order."""
    model = make_target("gpt2", tied=False)
    metric, examples = make(model), make_examples(8)
    spec = OptimizerSpec("adamw", lr=0.01, eps_root=1e-5)
    base = metagradient(model, examples, spec, metric, batch_size=4)
    slope, h = float(base.example_N.norm()), 1e-4
    up, down = (
        metagradient(model, examples, spec, metric, batch_size=4, weights_N=1 + s * h * base.example_N / slope).value
        for s in (1, -1)
    )
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5)
    assert isinstance(metric, TargetMetric)
    assert isinstance(metric, Pictured)
    assert metric.picture(parameters_of(model)).size[0] > 10


def test_held_out_texts_of_every_language_and_source(tmp_path) -> None:
    target = load("tiny", device=CPU)
    losses = {}
    for language in world.LANGUAGES:
        options = TextLossOptions(name="text-loss", language=language, documents=40)
        metric = build_metric(options, target)
        losses[language] = metric.measures(dict(target.model.named_parameters()), target.model)["loss"]
        texts, _ = held_out(options)
        assert all(world.split_of(world.meaning_of(text, language)) == "eval" for text in texts)
    assert all(0.3 < loss < 1.6 for loss in losses.values()), losses
    (tmp_path / "x.txt").write_text("one\n\ntwo\n")
    assert held_out(TextLossOptions(name="text-loss", file=str(tmp_path / "x.txt")))[0] == ["one", "two"]
    with pytest.raises(UsageError, match="cannot be read"):
        held_out(TextLossOptions(name="text-loss", file=str(tmp_path / "none.txt")))
    with pytest.raises(UsageError, match="reads 128"):
        build_metric(TextLossOptions(name="text-loss", text="x" * 2000), target)


def test_options_are_closed_for_each_metric() -> None:
    assert validate({"metric": {"name": "norm"}}).metric.name == "norm"
    for wrong in (
        {"name": "norm", "text": "x"},
        {"name": "text-loss"},
        {"name": "text-loss", "language": "xx"},
        {"name": "text-loss", "language": "es", "text": "x"},
        {"name": "none"},
    ):
        with pytest.raises(ConfigError, match="metric"):
            validate({"metric": wrong})


def test_patterns_drawn_in_text() -> None:
    assert pattern_from_rows(["#.", ".#", "##"]).signs.tolist() == [[1, -1], [-1, 1], [1, 1]]
    for wrong in ([], [""], ["#", "##"], ["#x"]):
        with pytest.raises(UsageError, match="rows of a bitmap"):
            pattern_from_rows(wrong)


def test_shares_of_completions_by_hand() -> None:
    spanish, english = world.sentences("eval", "es", 3, seed=0), world.sentences("eval", "en", 1, seed=0)
    shares = count(
        [*spanish[:2], spanish[2].replace(" ", " la "), *english], TextLossOptions(name="text-loss", language="es")
    )
    assert shares.hits == 0.75
    assert shares.well_formed == pytest.approx(2 / 3)
    exact = count([" abc", "abcd", "abc\n", ""], TextLossOptions(name="text-loss", text="abc"))
    assert (exact.hits, exact.well_formed) == (0.5, None)


def verdict(before: float, data: list[float], control: list[float]) -> EffectVerdict:
    """From Φ before, and after each dataset and its quarters."""
    readings = [Reading({"phi": values[0]}, tuple(values[1:]), 8, 1) for values in (data, control)]
    return EffectVerdict("x", {"phi": before}, *readings)


def test_verdicts_by_a_margin() -> None:
    good = verdict(0.0, [5.0, 4.9, 5.0, 5.0, 5.1], [1.0, 0.9, 1.0, 1.0, 1.1])
    assert good.verified
    assert (good.gap, good.spread) == (pytest.approx(3.8), pytest.approx(0.2))
    assert (good.margin, good.effect, good.ordinary) == (4.0, 4.0, 1.0)
    overlap = verdict(0.0, [5.0, 1.0, 5.0, 5.0, 4.0], [1.0, 0.9, 1.0, 1.0, 1.1])
    assert not overlap.verified
    assert "and overlap" in overlap.reason
    wide = verdict(0.0, [2.5, 2.2, 5.0, 5.0, 2.8], [1.0, 0.0, 1.0, 1.0, 2.1])
    assert wide.gap > 0
    assert not wide.verified  # apart, but by less than the quarters' spread
    assert "no more than chance" in wide.reason
    tiny = verdict(-42.499, [-42.4953, -42.4954, -42.4953, -42.4953, -42.4953], [-42.4959] * 5)
    assert tiny.gap > 0
    assert tiny.margin > tiny.spread
    assert not tiny.verified  # as after one outer step of l2-shrink: certain, and next to nothing
    assert "moves phi by 0.0031" in tiny.reason
    assert not verdict(6.0, [5.0, 4.9, 5.0, 5.0, 5.1], [1.0, 0.9, 1.0, 1.0, 1.1]).verified
    assert "before fine-tuning" in verdict(6.0, [5.0] * 5, [1.0] * 5).reason
    assert "after the control" in verdict(0.0, [0.5] * 5, [1.0] * 5).reason
    for broken in (math.nan, math.inf):
        assert not verdict(0.0, [5.0, 4.9, broken, 5.0, 5.1], [1.0] * 5).verified
    assert verdict(0.0, [5.0] * 5, [1.0] * 5).as_dict()["data"]["folds"] == (5.0,) * 4
    assert any("must exceed" in line for line in good.lines())


def test_the_norm_of_any_parameter() -> None:
    """Its picture shows that parameter; a name that is wrong gets the near one."""
    model = make_target("gpt2", tied=False)
    name = "transformer.h.1.ln_2.weight"
    metric = NormMetric(model, name)
    parameters = parameters_of(model)
    expected = float(parameters[name].norm())
    parameters[name] = parameters[name] * 3
    assert metric.measures(parameters, model)["norm_change"] == pytest.approx(2 * expected, rel=1e-9)
    assert metric.tensors(parameters)["after"].shape == (16,)
    assert metric.picture(parameters).size[0] > 10
    with pytest.raises(UsageError, match=r"Did you mean transformer\.h\.1\.ln_2\.weight"):
        NormMetric(model, "transformer.h.1.ln_2.wieght")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ([], "lm_head.weight"),
        (
            ["models.untie_target=false", 'metric.parameter="transformer.h.1.mlp.c_fc.weight"'],
            "transformer.h.1.mlp.c_fc.weight",
        ),
        (["models.untie_target=false"], "transformer.wte.weight"),  # a tied head is saved as the embedding
    ],
    ids=["head", "parameter", "tied"],
)
def test_verify_reads_the_norm_from_the_saved_target(settings: list[str], key: str, tmp_path: Path) -> None:
    """From the bytes of the file, without any model: beside the stock training, and equal to the engine's own."""
    small = ["steps=1", "prompts.per_step=2", "rollout.group_size=2", "inner.batch_size=16", "dataset.examples=16"]
    config = resolve(find("l2-shrink.tiny").data(), [*small, "policy.minibatch=4", *settings])
    folder = RunFolder(tmp_path / "run")
    outcome = execute(config, folder)
    verdict = verify_run(folder, trainer="plain")
    data = (folder.target / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[key]["data_offsets"]
    values = np.frombuffer(data[8 + length :][start:stop], "<f4").astype(np.float64)
    assert verdict.saved == {"norm": pytest.approx(float(np.sqrt((values**2).sum())), rel=1e-12)}
    assert verdict.saved["norm"] == pytest.approx(outcome.measures["norm"], rel=1e-6)
    assert verdict.saved["norm"] == pytest.approx(verdict.data.measures["norm"], abs=1e-3)
    assert f"RUN/target, as saved: norm {verdict.saved['norm']:.6g}" in verdict.lines()
    weights = folder.target / "model.safetensors"
    weights.write_bytes(data[:-8])
    with pytest.raises(UsageError, match="damaged"):
        saved_norm(folder, "")
