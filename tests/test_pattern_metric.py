"""Φ of a pattern, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from builders import make_target

from dpg_cli.errors import UsageError
from dpg_cli.metrics.pattern import PatternMetric, head_name
from dpg_cli.patterns.pattern import Pattern, pattern_from_text

SIGNS = np.array([[1, -1], [1, 1], [-1, 1]], dtype=np.int8)


def pattern() -> Pattern:
    return Pattern(SIGNS, "bitmap", None, "three rows")


def test_value_measures_and_gradient_by_hand() -> None:
    model = make_target("gpt2", tied=False)
    metric = PatternMetric(model, pattern(), sharpness=4.0, origin=(5, 2))
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert float(metric(parameters, model)) == pytest.approx(-math.log(2))
    head = parameters["lm_head.weight"]
    head[5:8, 2:4] += 0.25 * torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], dtype=head.dtype)
    head.requires_grad_()
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    value = metric(parameters, model)
    assert value.item() == pytest.approx(-(4 * right + 2 * wrong) / 6)
    (gradient,) = torch.autograd.grad(value, head)
    assert int((gradient != 0).sum()) == 6
    sigmoid = 1 / (1 + math.exp(1))
    assert float(gradient[5, 2]) == pytest.approx(4 * sigmoid / 6)
    assert float(gradient[5, 3]) == pytest.approx(-4 * (1 - sigmoid) / 6)
    measures = metric.measures(parameters, model)
    assert measures["pixel_accuracy"] == pytest.approx(4 / 6)
    assert measures["mean_change"] == pytest.approx(0.25)
    assert measures["sharpness_times_change"] == pytest.approx(1.0)


def test_tied_heads_are_found_under_the_embeddings_name() -> None:
    assert head_name(make_target("gpt2", tied=True)) == "transformer.wte.weight"
    assert head_name(make_target("llama", tied=False)) == "lm_head.weight"


def test_a_pattern_that_leaves_the_head_is_refused() -> None:
    with pytest.raises(UsageError, match="21"):
        PatternMetric(make_target("gpt2", tied=False), pattern_from_text("X"))
    PatternMetric(make_target("gpt2", tied=False), pattern(), origin=(26, 14))
    with pytest.raises(UsageError):
        PatternMetric(make_target("gpt2", tied=False), pattern(), origin=(27, 14))
