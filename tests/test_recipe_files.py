"""`--recipe`: what is understood of other trainers' files, what changes nothing, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.recipes import Understood, read_recipe
from dpg_cli.settings.config import Config, validate


def read(folder: Path, data: dict[str, Any] | str, name: str = "recipe.yaml") -> Understood:
    path = folder / name
    text = data if isinstance(data, str) else json.dumps(data) if name.endswith("json") else yaml.safe_dump(data)
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def settings(understood: Understood) -> Config:
    return validate(understood.settings)


def test_an_sft_config_saved_as_json(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    config = trl.SFTConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        num_train_epochs=2, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 2e-6},
        learning_rate=2e-5, warmup_steps=0.1, weight_decay=0.1, max_length=512, packing=True, seed=7,
    )  # fmt: skip
    found = read(tmp_path, config.to_json_string(), "recipe.json")
    inner = settings(found).inner
    assert (inner.optimizer, inner.lr, inner.beta2, inner.eps, inner.eps_root) == ("adamw", 2e-5, 0.999, 1e-8, 0.0)
    assert (inner.schedule, inner.warmup, inner.lr_floor) == ("cosine", 0.1, pytest.approx(0.1))
    assert (inner.batch_size, inner.accumulation, inner.epochs, inner.drop_last) == (4, 2, 2.0, False)
    assert (inner.max_grad_norm, inner.no_decay, inner.weight_decay) == (1.0, ("biases", "norms"), 0.1)
    assert (inner.order, settings(found).seed, inner.max_length, inner.packed_rows) == ("shuffled", 7, 512, 512)
    assert inner.precision == "float32" and settings(found).lora.rank == 0
    assert {"logging_steps", "save_strategy", "report_to"} <= set(found.ignored)
    text = found.text()
    assert "TRL's SFTTrainer" in text and "inner.lr = 2e-05" in text and "Changing nothing" in text
    assert len(text.splitlines()) < 45  # one screen


def test_training_arguments_and_their_defaults(tmp_path: Path) -> None:
    import transformers

    plain = transformers.TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    found = settings(read(tmp_path, plain.to_json_string(), "recipe.json"))
    inner = found.inner
    assert (inner.lr, inner.schedule, inner.epochs, inner.batch_size, found.seed) == (5e-5, "linear", 3.0, 8, 42)
    assert inner.precision == "float32" and inner.max_length == 0
    few = settings(read(tmp_path, {"learning_rate": "2e-5", "num_train_epochs": 1, "max_steps": 30}))
    assert few.inner.lr == 2e-5 and few.inner.max_steps == 30 and few.inner.batch_size == 8
    old = settings(read(tmp_path, {"learning_rate": 1e-3, "warmup_ratio": 0.05, "optim": "sgd"}))
    assert (old.inner.optimizer, old.inner.warmup) == ("sgd", 0.05)


def test_lora_as_trl_sft_has_it(tmp_path: Path) -> None:
    data = {
        "model_name_or_path": "x", "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0,
        "lora_target_modules": ["q_proj", "v_proj"], "use_rslora": True, "learning_rate": 2e-4, "max_length": 128,
    }  # fmt: skip
    found = read(tmp_path, data)
    lora = settings(found).lora
    assert (lora.rank, lora.alpha, lora.modules, lora.rslora) == (8, 16.0, ("q_proj", "v_proj"), True)
    assert settings(found).inner.precision == "bf16"  # TRL's default
    assert any("bf16" in sentence for sentence in found.differs)
    with pytest.raises(ConfigError, match="lora_dropout"):
        read(tmp_path, {**data, "lora_dropout": 0.05})
    with pytest.raises(ConfigError, match="lora_target_modules"):
        read(tmp_path, {**data, "lora_target_modules": None})


AXOLOTL = """
base_model: NousResearch/Llama-3.2-1B
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
val_set_size: 0.1
output_dir: ./outputs/lora-out
adapter: lora
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
lora_r: 16
lora_alpha: 32
lora_target_linear: true
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
gradient_checkpointing: true
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""

TORCHTUNE = """
output_dir: /tmp/torchtune/llama3_2_1B/full
tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, path: x, max_seq_len: 1024}
dataset: {_component_: torchtune.datasets.alpaca_dataset, packed: False}
seed: null
shuffle: True
model: {_component_: torchtune.models.llama3_2.llama3_2_1b}
checkpointer: {_component_: torchtune.training.FullModelHFCheckpointer}
resume_from_checkpoint: False
batch_size: 4
epochs: 1
optimizer: {_component_: torch.optim.AdamW, fused: True, lr: 2e-5}
loss: {_component_: torchtune.modules.loss.LinearCrossEntropyLoss}
max_steps_per_epoch: null
clip_grad_norm: 1.0
gradient_accumulation_steps: 8
optimizer_in_bwd: False
compile: False
device: cuda
enable_activation_checkpointing: False
dtype: bf16
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger}
log_every_n_steps: 1
log_peak_memory_stats: True
profiler: {_component_: torchtune.training.setup_torch_profiler, enabled: False}
lr_scheduler: {_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, num_warmup_steps: 100}
"""


def test_axolotl(tmp_path: Path) -> None:
    found = read(tmp_path, AXOLOTL)
    config = settings(found)
    inner = config.inner
    assert found.kind == "axolotl"
    assert (inner.lr, inner.schedule, inner.warmup, inner.epochs) == (2e-4, "cosine", 0.1, 1.0)
    assert (inner.batch_size, inner.accumulation, inner.packed_rows, inner.max_grad_norm) == (2, 2, 2048, 1.0)
    assert (config.lora.rank, config.lora.alpha, config.lora.modules) == (16, 32.0, ("all-linear",))
    assert {"flash_attention", "gradient_checkpointing", "datasets"} <= set(found.ignored)
    assert any("shuffles" in sentence for sentence in found.differs)
    assert any("val_set_size" in sentence for sentence in found.differs)
    for old, new, words in (
        ("adapter: lora", "adapter: qlora", "qlora"),
        ("optimizer: adamw_torch", "optimizer: adamw_bnb_8bit", "adamw_bnb_8bit"),
        ("warmup_ratio: 0.1", "", "warmup_steps"),
        ("weight_decay: 0.0", "neftune_noise_alpha: 5", "neftune_noise_alpha"),
        ("lora_r: 16", "lora_r: 16\nlora_dropout: 0.05", "dropout"),
        ("lora_r: 16", "lora_r: 16\nmagic_option: 2", "magic_option"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(tmp_path, AXOLOTL.replace(old, new))


def test_torchtune(tmp_path: Path) -> None:
    found = read(tmp_path, TORCHTUNE)
    inner = settings(found).inner
    assert found.kind == "torchtune"
    assert (inner.optimizer, inner.lr, inner.weight_decay, inner.beta2) == ("adamw", 2e-5, 0.01, 0.999)
    assert (inner.schedule, inner.warmup, inner.batch_size, inner.accumulation) == ("cosine", 100.0, 4, 8)
    assert (inner.drop_last, inner.max_grad_norm, inner.max_length, inner.precision) == (True, 1.0, 1024, "bf16")
    assert any("order" in sentence for sentence in found.differs)
    lora = TORCHTUNE.replace(
        "{_component_: torchtune.models.llama3_2.llama3_2_1b}",
        "{_component_: torchtune.models.llama3_2.lora_llama3_2_1b, lora_attn_modules: ['q_proj', 'output_proj'], "
        "apply_lora_to_mlp: True, lora_rank: 64, lora_alpha: 128, lora_dropout: 0.0}",
    )
    config = settings(read(tmp_path, lora))
    assert (config.lora.rank, config.lora.modules) == (64, ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    for old, new, words in (
        ("packed: False", "packed: True", "packed"),
        ("torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW8bit", "PagedAdamW8bit"),
        ("max_steps_per_epoch: null", "max_steps_per_epoch: 20", "max_steps_per_epoch"),
    ):
        with pytest.raises(ConfigError, match=words):
            read(tmp_path, TORCHTUNE.replace(old, new))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"optim": "adafactor"}, "adafactor"),
        ({"optim": "paged_adamw_8bit"}, "paged_adamw_8bit"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau"),
        ({"lr_scheduler_kwargs": {"magic": 1}}, "magic"),
        ({"fp16": True}, "fp16"),
        ({"group_by_length": True}, "sampling"),
        ({"deepspeed": "ds.json"}, "deepspeed"),
        ({"loss_type": "dft", "max_length": 3}, "dft"),
        ({"packing": True, "packing_strategy": "wrapped"}, "wrapped"),
        ({"max_length": 3, "load_in_4bit": True}, "quantised"),
        ({"learning_rate": "fast"}, "no number"),
        ({"num_train_epochs": 1, "my_own_option": 3}, "my_own_option"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler"),
        ({"per_device_train_batch_size": 2.5}, "whole"),
    ],
)
def test_what_would_change_the_numbers_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, {"learning_rate": 1e-4, **change})


def test_all_faults_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, {"learning_rate": 1e-4, "optim": "lion", "fp16": True, "label_smoothing_factor": 0.1})
    assert len(caught.value.faults) == 3 and caught.value.exit_code == 2


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("training_args.bin", "recipe.yaml"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps(Trap(), protocol=4))
        with pytest.raises(UsageError, match="pickle"):
            read_recipe(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "neither YAML nor JSON"),
        ("- 1\n- 2\n", "no table"),
        ("colour: red\n", "none of their keys"),
        ("", "no table"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read(tmp_path, text)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")
