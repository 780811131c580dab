"""axolotl's YAML, where its elements map. It drives the transformers Trainer, whose groups and normaliser it has.

Which examples meet in a step is axolotl's own affair (it shuffles merged datasets, drops long rows, packs by a sampler of its
own): that is said, not followed. Source: axolotl's configuration reference and `core/builders/base.py`.
"""

from __future__ import annotations

from typing import Any

from dpg_cli.recipes import trl
from dpg_cli.recipes.reader import Reader, Understood

MARKS = {
    *(
        "micro_batch_size",
        "sequence_len",
        "base_model",
        "sample_packing",
        "train_on_inputs",
        "num_epochs",
        "lr_scheduler",
    ),
    *("val_set_size", "dataset_prepared_path", "adapter"),
}
NOTHING = (
    *(
        "base_model*",
        "model_type",
        "tokenizer_*",
        "trust_remote_code",
        "strict",
        "datasets",
        "test_datasets",
        "chat_template*",
    ),
    *(
        "dataset_*",
        "output_dir",
        "logging_*",
        "eval_*",
        "evals_*",
        "save_*",
        "wandb_*",
        "mlflow_*",
        "comet_*",
        "use_wandb",
    ),
    *(
        "hub_*",
        "push_*",
        "gradient_checkpointing*",
        "activation_offloading",
        "flash_attention",
        "flash_attn_*",
        "sdp_attention",
    ),
    *(
        "xformers_attention",
        "eager_attention",
        "attn_implementation",
        "liger_*",
        "plugins",
        "unsloth_*",
        "tf32",
        "torch_compile*",
    ),
    *(
        "dataloader_*",
        "fsdp*",
        "ddp*",
        "resume_from_checkpoint",
        "auto_resume_from_checkpoints",
        "early_stopping_patience",
    ),
    *(
        "special_tokens",
        "tokens",
        "pad_to_sequence_len",
        "sample_packing_*",
        "multipack_*",
        "debug",
        "local_rank",
        "profiler_*",
    ),
    *(
        "is_llama_derived_model",
        "is_mistral_derived_model",
        "is_falcon_derived_model",
        "is_qwen_derived_model",
        "peft_use_*",
    ),
    *("cut_cross_entropy", "bf16_full_eval", "low_cpu_mem_usage", "device_map", "max_memory", "load_best_model_at_end"),
    *(
        "do_bench_eval",
        "bench_dataset",
        "saves_per_epoch",
        "include_tokens_per_second",
        "shuffle_merged_datasets",
        "verbosity",
    ),
    *(
        "remove_unused_columns",
        "skip_prepare_dataset",
        "excess_length_strategy",
        "min_sample_len",
        "conversation",
        "strict_*",
    ),
)
LORA_ALWAYS = (
    "lora_model_dir",
    "lora_fan_in_fan_out",
    "lora_on_cpu",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
)


def fits(data: dict[str, Any]) -> bool:
    """Whether these are keys of axolotl."""
    return len(data.keys() & MARKS) >= 3 and "per_device_train_batch_size" not in data


def read(data: dict[str, Any]) -> Understood:
    """Its settings in ours.

    Raises:
        ConfigError: with a line for everything that cannot be followed.
    """
    reader = Reader(data, "axolotl")
    renamed = {
        "optim": reader.take("optimizer", "adamw_torch_fused"),
        "lr_scheduler_type": reader.take("lr_scheduler", "cosine"),
        "per_device_train_batch_size": reader.take("micro_batch_size", 1),
        "num_train_epochs": reader.take("num_epochs", 1.0),
        "adam_beta2": reader.take("adam_beta2", 0.999),
    }
    floor = reader.take("cosine_min_lr_ratio")
    if floor is not None:
        renamed |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": floor}}
    if "warmup_steps" not in reader.left and "warmup_ratio" not in reader.left:
        reader.faults.append(
            "warmup_steps: not given, and axolotl then takes 3 % of its own count of steps, at most 100"
        )
    elif "warmup_ratio" in reader.left:
        reader.differs.append("a warm-up ratio is rounded up here and down by axolotl: at most a step")
    reader.left |= renamed
    trl.optimizer(reader, 5e-5)
    trl.schedule(reader)
    trl.batches(reader)
    bf16, fp16 = reader.take("bf16", "auto"), reader.take("fp16", False)
    if fp16 is True and not bf16:
        reader.faults.append("fp16: its loss scaling skips steps; only float32 and bf16 are followed")
    half = bf16 not in (False, "false", None)
    reader.put("inner.precision", "bf16" if half else "float32", f"bf16: {bf16}")
    if half:
        reader.differs.append(
            "of bf16 autocast only the operands of linear maps are rounded; --precision float32 is exact"
        )
    length = reader.whole("sequence_len", 512)
    reader.put("inner.max_length", length, f"sequence_len: {length}")
    if reader.flag("sample_packing"):
        reader.put("inner.packed_rows", length, "sample_packing: true")
        reader.differs.append("rows are packed by best fit; axolotl's sampler fills its own with other examples")
    if reader.flag("train_on_inputs"):
        reader.differs.append("train_on_inputs: give prompt and answer as one text, without --prompts")
    if reader.take("val_set_size", 0):
        reader.differs.append("val_set_size: leave those rows out of DATA, for axolotl did not train on them")
    reader.differs.append(
        "which examples meet in a step: axolotl shuffles and filters its datasets before the Trainer's order"
    )
    adapters(reader)
    for key, neutral, why in (
        ("load_in_8bit", (False,), "a quantised base is not supported"),
        ("load_in_4bit", (False,), "a quantised base is not supported"),
        ("neftune_noise_alpha", (), "noise on embeddings has no exact derivative"),
        ("noisy_embedding_alpha", (), "noise on embeddings has no exact derivative"),
        ("label_smoothing_factor", (0.0,), "label smoothing is not supported"),
        ("deepspeed", (), "its file may set an optimiser, a schedule and clipping of its own"),
        ("relora", (False,), "ReLoRA is not supported"),
        ("relora_steps", (), "ReLoRA is not supported"),
        ("rl", (False,), "only supervised fine-tuning is attributed"),
        ("loraplus_lr_ratio", (), "give the rates of A and B as inner.groups"),
        ("embedding_lr", (), "give it as inner.groups"),
        ("lr_groups", (), "give them as inner.groups"),
        ("unfrozen_parameters", ([],), "give the rest as inner.groups, frozen"),
        ("sequence_parallel_degree", (1,), "sequence parallel training is not supported"),
        ("curriculum_sampling", (False,), "only random order is followed"),
        ("loss_watchdog_threshold", (), "it may have ended the training early"),
    ):
        reader.refuse(key, neutral, why)
    reader.ignore(NOTHING)
    return reader.done("not a setting of axolotl that is known here; whether it changes the numbers cannot be told")


def adapters(reader: Reader) -> None:
    """LoRA."""
    kind = reader.take("adapter")
    rank, alpha = reader.whole("lora_r", 8), reader.number("lora_alpha", 16)
    dropout, modules = reader.number("lora_dropout", 0.0), reader.take("lora_target_modules")
    linear, saved = reader.flag("lora_target_linear"), reader.take("lora_modules_to_save")
    rslora = reader.flag("peft_use_rslora")
    reader.ignore(LORA_ALWAYS)
    if kind is None:
        return
    if kind != "lora":
        reader.faults.append(f"adapter = {kind}: only lora on an unquantised base is followed")
        return
    if dropout:
        reader.faults.append(f"lora_dropout = {dropout:g}: {trl.NO_DROPOUT}")
    trl.put_lora(reader, rank, alpha, "all-linear" if linear or not modules else modules, saved or [], rslora)
