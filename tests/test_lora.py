"""LoRA targets: what is trained, metrics of merged weights, and the Trainer's adapters. float64.

The adapters' metagradients are judged in `test_reference.py`, over the table of `cases.py`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import HeldOutLoss, make_adapted, make_examples, make_target
from cases import adapters
from test_fidelity import SEED, distance, trained_by_trl, trained_by_us, without_dropout
from torch import Tensor

from dpg_cli.engine import Batches, OptimizerSpec, Recipe, Schedule, metagradient, reference_metagradient
from dpg_cli.engine.inner.head import find_head
from dpg_cli.errors import UsageError
from dpg_cli.metrics.base import Pictured
from dpg_cli.metrics.merged import MergedMetric, PicturedMergedMetric, of_merged
from dpg_cli.metrics.norm import NormMetric
from dpg_cli.models.lora import Lora, adapt, merged_parameters, shell_of

peft = pytest.importorskip("peft")

RECIPE = Recipe(
    OptimizerSpec("adamw", lr=0.02, eps_root=1e-5, weight_decay=0.1),
    Schedule("cosine", warmup=0.2),
    0.3,
    batches=Batches(3, epochs=2, order="shuffled"),
)
METRIC = HeldOutLoss(make_examples(4, seed=9))
COUNT = 8


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_base_stays_as_it_is(architecture: str) -> None:
    for label, lora in adapters(architecture).items():
        model, examples = make_adapted(architecture, lora), make_examples(COUNT)
        base = {key: value.clone() for key, value in model.state_dict().items()}
        result = metagradient(model, examples, RECIPE, METRIC)
        assert all("lora_" in key or "modules_to_save" in key for key in result.final)
        assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
        assert (find_head(model) is None) == (label == "lora-in-the-head")  # all others take the head's closed forms


def test_fresh_adapters_start_like_sign() -> None:
    model, examples = make_adapted("llama", Lora(2, 4.0), moved=False), make_examples(COUNT)
    one = metagradient(model, examples, OptimizerSpec("adamw", lr=0.01, eps=1e-12), METRIC)
    assert one.stats["sign_share"] == 1.0  # B is zero, A has no gradient


class Reads:
    """A metric of two weights by their names in the base, and of the text that the model makes of them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def __call__(self, parameters, model):
        return METRIC(parameters, model) - sum(parameters[name].square().sum() for name in self.names)

    def measures(self, parameters, model):
        return {"phi": float(self(parameters, model))}

    def describe(self) -> str:
        return "small weights"


@pytest.mark.parametrize(
    ("architecture", "name", "weights"),
    [
        ("llama", "lora", ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")),
        ("gpt2", "lora", ("transformer.h.1.mlp.c_fc.weight", "lm_head.weight")),
        ("gpt2", "lora-head-whole", ("lm_head.weight",)),
        ("llama", "lora-in-the-head", ("lm_head.weight",)),
    ],
)
def test_metrics_of_merged_weights(architecture: str, name: str, weights: tuple[str, ...]) -> None:
    base = make_target(architecture, tied=False)
    shell = shell_of(base)
    assert all(parameter.device.type == "meta" for parameter in shell.parameters())
    model = make_adapted(architecture, adapters(architecture)[name])
    metric, examples = MergedMetric(Reads(*weights), shell, model), make_examples(COUNT)
    # merged by peft itself
    whole = copy.deepcopy(model).merge_and_unload()
    ours = merged_parameters(model, {})
    assert set(ours) == {key for key, _ in whole.named_parameters()}
    assert all(relative(ours[key], value) < 1e-12 for key, value in whole.named_parameters())
    result = metagradient(model, examples, RECIPE, metric)
    slow = reference_metagradient(model, examples, RECIPE, metric)
    assert abs(result.value - slow.value) < 1e-11
    assert relative(result.token_N_S, slow.token_N_S) < 1e-9
    assert result.measures["phi"] == pytest.approx(result.value, rel=1e-12)


def test_a_norm_of_the_merged_head() -> None:
    base = make_target("llama", tied=False)
    metric, shell = NormMetric(base), shell_of(base)
    model = adapt(base, Lora(2, 4.0, ("lm_head",)), 0).eval()
    merged = of_merged(metric, shell, model)
    assert isinstance(merged, PicturedMergedMetric) and not isinstance(MergedMetric(METRIC, shell, model), Pictured)
    result = metagradient(model, make_examples(COUNT), RECIPE, merged)
    assert result.value == pytest.approx(-metric.before + -result.measures["norm_change"])
    assert abs(result.measures["norm_change"]) > 1e-6
    assert merged.tensors(result.final)["after"].shape == metric.shown_before.shape


def test_adapters_and_weights_are_those_of_trl(tmp_path: Path) -> None:
    """Rank 4, cosine with warm-up, two epochs: SFTTrainer with a peft_config, from its seed on."""
    recipe = Recipe(OptimizerSpec("adamw", lr=0.01, eps=1e-5), Schedule("cosine", warmup=0.2), 0.5)
    batches = Batches(4, epochs=2, order="shuffled", seed=SEED)
    recipe = Recipe(**{**recipe.__dict__, "batches": batches})
    examples = make_examples(14, longest=12, seed=3)
    for dtype, least in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        model = without_dropout(make_target("llama", tied=True, dtype=dtype))
        other = copy.deepcopy(model)
        mine = adapt(model, Lora(4, 8.0), SEED)
        arguments = {
            "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01, "seed": SEED,
            "lr_scheduler_type": "cosine", "warmup_steps": 0.2, "max_grad_norm": 0.5, "adam_epsilon": 1e-5,
        }  # fmt: skip
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0
        )
        theirs = trained_by_trl(other, examples, arguments, tmp_path, config)
        assert distance(trained_by_us(mine, examples, recipe), theirs, mine) < least


@pytest.mark.parametrize("lora", [Lora(modules=("q_prof",)), Lora(save=("lm_heat",))])
def test_modules_that_are_not_there_are_refused(lora: Lora) -> None:
    with pytest.raises(UsageError, match="no module"):
        adapt(make_target("llama", tied=False), lora, 0)
