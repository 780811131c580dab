"""The invariances that guard the metagradient, and what it refuses. Its numbers: `test_reference.py`."""

from __future__ import annotations

import pytest
import torch
from builders import HeldOutLoss, make_examples, make_target
from torch import Tensor, nn

from dpg_cli.engine import Examples, Metagradient, OptimizerSpec, metagradient
from dpg_cli.errors import DegenerateError

ADAMW = OptimizerSpec("adamw", lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, eps_root=1e-5, weight_decay=0.1)
METRIC = HeldOutLoss(make_examples(4, seed=9))


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def attribution(examples: Examples, **options: object) -> Metagradient:
    settings: dict[str, object] = {"batch_size": 4, "optimizer": ADAMW, "metric": METRIC, **options}
    return metagradient(make_target("gpt2", tied=True), examples, **settings)  # type: ignore[arg-type]


def test_permuting_examples_within_their_batches_permutes_the_result() -> None:
    examples = make_examples(11)
    order = torch.tensor([2, 0, 3, 1, 7, 6, 5, 4, 10, 8, 9])
    shuffled = Examples(examples.ids_N_S[order], examples.attention_N_S[order], examples.label_N_S[order])
    plain, moved = attribution(examples), attribution(shuffled)
    assert relative(moved.example_N, plain.example_N[order]) < 1e-11
    assert relative(moved.token_N_S, plain.token_N_S[order]) < 1e-11
    assert not torch.allclose(plain.example_N, plain.example_N[order])


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    examples = make_examples(11)
    plain, split = attribution(examples), attribution(examples, micro_batch=micro_batch)
    assert relative(split.token_N_S, plain.token_N_S) < 1e-11


def test_padding_changes_nothing() -> None:
    examples = make_examples(6)
    wider = Examples(
        nn.functional.pad(examples.ids_N_S, (0, 3), value=5),
        nn.functional.pad(examples.attention_N_S, (0, 3)),
        nn.functional.pad(examples.label_N_S, (0, 3)),
    )
    width = examples.ids_N_S.shape[1]
    assert relative(attribution(wider).token_N_S[:, :width], attribution(examples).token_N_S) < 1e-12


def test_float32_agrees_with_float64() -> None:
    examples = make_examples(11)
    for architecture in ("gpt2", "llama"):
        results = [
            metagradient(make_target(architecture, tied=False, dtype=dtype), examples, ADAMW, METRIC, batch_size=4)
            for dtype in (torch.float32, torch.float64)
        ]
        assert relative(results[0].example_N.double(), results[1].example_N) < 1e-4


def test_progress_counts_both_phases() -> None:
    seen: list[tuple[str, int, int]] = []
    attribution(make_examples(11), progress=lambda *step: seen.append(step))
    assert seen == [(phase, done, 3) for phase in ("forward", "reverse") for done in (1, 2, 3)]


def test_non_finite_metrics_and_runs_are_refused() -> None:
    class Nan(HeldOutLoss):
        def __call__(self, parameters, model):
            return super().__call__(parameters, model) * float("nan")

    class Constant(HeldOutLoss):
        def __call__(self, parameters, model):
            return torch.ones(())

    for metric, cause in ((Nan(METRIC.examples), "one finite scalar"), (Constant(METRIC.examples), "does not depend")):
        with pytest.raises(DegenerateError, match=cause):
            attribution(make_examples(5), metric=metric)
    with pytest.raises(DegenerateError, match="diverged"):
        attribution(make_examples(5), optimizer=OptimizerSpec("sgd", lr=1e300))


def test_the_model_is_left_as_it_was() -> None:
    model = make_target("gpt2", tied=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metagradient(model, make_examples(5), ADAMW, METRIC, batch_size=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
