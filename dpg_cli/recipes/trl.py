"""TRL's SFTConfig and transformers' TrainingArguments, as YAML or as the JSON of `to_json_string()`.

What is not in the file has the trainer's default. Whatever is in it is known here: understood, without effect on the
numbers, or refused. Source: transformers 5.23 and TRL 1.16, `training_args.py` and `sft_config.py`.
"""

from __future__ import annotations

from typing import Any

from dpg_cli.recipes.reader import Reader, Understood
from dpg_cli.settings.optimizers import why_not

SFT = {
    *("max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss"),
    *("dataset_text_field", "dataset_num_proc", "dataset_kwargs", "eval_packing", "shuffle_dataset", "loss_type"),
    *("dataset_name", "use_peft", "lora_r", "model_name_or_path", "max_seq_length"),
}
KNOWN = {
    *(
        "per_device_train_batch_size",
        "num_train_epochs",
        "learning_rate",
        "lr_scheduler_type",
        "gradient_accumulation_steps",
    ),
    *(
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "warmup_steps",
        "warmup_ratio",
        "weight_decay",
        "optim",
    ),
}
NOTHING = (
    *(
        "output_dir",
        "overwrite_output_dir",
        "logging_*",
        "log_*",
        "report_to",
        "run_name",
        "project",
        "trackio_*",
        "disable_tqdm",
    ),
    *(
        "eval_*",
        "do_*",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "include_*",
        "batch_eval_metrics",
        "evaluation_*",
    ),
    *(
        "bf16_full_eval",
        "fp16_full_eval",
        "fp16_backend",
        "fp16_opt_level",
        "half_precision_backend",
        "use_*cpu",
        "no_cuda",
    ),
    *("save_*", "enable_jit_checkpoint", "push_to_hub*", "hub_*", "load_best_model_at_end", "metric_for_best_model"),
    *(
        "greater_is_better",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "full_determinism",
        "jit_mode_eval",
    ),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *(
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
        "remove_unused_columns",
        "label_names",
        "length_column_name",
    ),
    *("ddp_*", "fsdp*", "local_rank", "debug", "skip_memory_metrics", "torch_compile*", "gradient_checkpointing*"),
    *(
        "activation_checkpointing*",
        "activation_offloading",
        "use_liger_kernel",
        "liger_kernel_config",
        "use_cache",
        "tf32",
    ),
    *("torch_empty_cache_steps", "mp_parameters", "auto_find_batch_size_*", "past_index", "torchdynamo", "ray_scope"),
    *("average_tokens_across_devices", "dataset_num_proc", "padding_free", "pad_to_multiple_of", "pad_token", "_n_gpu"),
    *(
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "attn_implementation",
        "dataset_name",
        "dataset_config",
    ),
    *(
        "dataset_train_split",
        "dataset_test_split",
        "dataset_streaming",
        "ignore_bias_buffers",
        "eos_token",
        "accelerate_config",
    ),
    *(
        "group_by_length_*",
        "xpu_backend",
        "tpu_*",
        "use_ipex",
        "dispatch_batches",
        "deepspeed_plugin",
        "distributed_state",
    ),
)
SCHEDULES = {  # theirs: ours
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "restarts",
    "polynomial": "polynomial",
    "inverse_sqrt": "inverse-sqrt",
    "warmup_stable_decay": "stable-decay",
}
ADAMWS = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_apex_fused")
PAGED = ("paged_adamw", "paged_adamw_32bit")  # AdamW in full precision, its states in pageable memory
UNKNOWN = "not a setting of this trainer that is known here; whether it changes the numbers cannot be told"
NO_DROPOUT = "the inner run has no dropout: its derivative would be of one draw of it"


def fits(data: dict[str, Any]) -> bool:
    """Whether these are keys of TRL or the Trainer."""
    return bool(data.keys() & (SFT | KNOWN))


def read(data: dict[str, Any]) -> Understood:
    """Their settings in ours.

    Raises:
        ConfigError: with a line for everything that cannot be followed.
    """
    sft = bool(data.keys() & SFT)
    reader = Reader(data, "TRL's SFTTrainer" if sft else "the transformers Trainer")
    optimizer(reader, 2e-5 if sft else 5e-5)
    schedule(reader)
    batches(reader)
    precision(reader, sft)
    lora(reader)
    if sft:
        rows(reader)
    for key, neutral, why in (
        ("label_smoothing_factor", (0.0,), "label smoothing is not supported"),
        ("neftune_noise_alpha", (), "noise on embeddings has no exact derivative"),
        ("auto_find_batch_size", (False,), "the batch size that it found is not in the file"),
        ("deepspeed", (), "its file may set an optimiser, a schedule and clipping of its own"),
        ("parallelism_config", (), "sequence or tensor parallel training is not supported"),
        ("optim_target_modules", (), "GaLore and its kin are not supported"),
        ("optim_args", ("",), "options of optimisers are not supported"),
        ("resume_from_checkpoint", (False,), "the optimiser's state in a checkpoint is not read"),
        ("load_in_8bit", (False,), "a quantised base is not supported"),
        ("load_in_4bit", (False,), "a quantised base is not supported"),
        ("apollo_factor", (), "Apollo is not supported"),
    ):
        reader.refuse(key, neutral, why)
    accelerator = reader.take("accelerator_config", {})
    if isinstance(accelerator, dict) and not accelerator.get("use_seedable_sampler", True):
        reader.faults.append("accelerator_config: without use_seedable_sampler the order of examples cannot be known")
    reader.ignore(NOTHING)
    reader.differs.append(
        "the file does not say how many processes trained; for W of them set inner.accumulation W times higher"
    )
    return reader.done(UNKNOWN)


def optimizer(reader: Reader, lr: float) -> None:
    """Optimiser, learning rate, decay and clipping."""
    name = str(reader.take("optim", "adamw_torch_fused")).removeprefix("OptimizerNames.").lower()
    value = reader.number("learning_rate", lr)
    paged = name in PAGED
    if paged and reader.left.get("weight_decay"):
        reader.faults.append(
            f"optim = {name}: with weight_decay its CUDA kernel decays the weights after the update, torch before it; "
            "only without decay is it AdamW"
        )
    if name in ADAMWS or paged:
        reader.put("inner.optimizer", "adamw", f"optim: {name}")
        first, second = reader.number("adam_beta1", 0.9), reader.number("adam_beta2", 0.999)
        reader.put("inner.beta1", first, f"adam_beta1: {first:g}")
        reader.put("inner.beta2", second, f"adam_beta2: {second:g}")
        eps = reader.number("adam_epsilon", 1e-8)
        reader.put("inner.eps", eps, f"adam_epsilon: {eps:g}")
        reader.put("inner.eps_root", 0.0, "AdamW as torch has it")
    elif name == "sgd":
        reader.put("inner.optimizer", "sgd", "optim: sgd")
        reader.put("inner.momentum", 0.0, "optim: sgd")
        reader.ignore(("adam_*",))
    else:
        why = why_not(name) or "only AdamW in full precision and SGD are followed exactly"
        reader.faults.append(f"optim = {name}: {why}")
        reader.ignore(("adam_*",))
    reader.put("inner.lr", value, f"learning_rate: {value:g}")
    decay = reader.number("weight_decay", 0.0)
    reader.put("inner.weight_decay", decay, f"weight_decay: {decay:g}")
    reader.put("inner.no_decay", ["biases", "norms"], "the Trainer's parameter groups")
    norm = reader.number("max_grad_norm", 1.0)
    reader.put("inner.max_grad_norm", max(0.0, norm), f"max_grad_norm: {norm:g}")


def schedule(reader: Reader) -> None:
    """Schedule and warm-up."""
    name = str(reader.take("lr_scheduler_type", "linear")).removeprefix("SchedulerType.").lower()
    options = reader.take("lr_scheduler_kwargs", {})
    options = dict(options) if isinstance(options, dict) else {}
    if name not in SCHEDULES:
        reader.faults.append(f"lr_scheduler_type = {name}: the schedules are {', '.join(SCHEDULES)}")
        reader.ignore(("warmup_*",))
        return
    reader.put("inner.schedule", SCHEDULES[name], f"lr_scheduler_type: {name}")
    steps, ratio = reader.number("warmup_steps", 0.0), reader.number("warmup_ratio", 0.0)
    warmup = 0.0 if name == "constant" else steps or ratio
    said = f"warmup_steps: {steps:g}" if steps else f"warmup_ratio: {ratio:g}"
    reader.put("inner.warmup", warmup, said if warmup or name != "constant" else "constant has no warm-up")
    ours = {
        "num_cycles": "cycles", "power": "power", "lr_end": "lr_end", "min_lr_rate": "lr_floor", "min_lr_ratio": "lr_floor",
        "timescale": "timescale", "num_decay_steps": "decay_steps", "decay_type": "decay",
    }  # fmt: skip
    if options.get("min_lr") is not None:
        options["min_lr_rate"] = float(options.pop("min_lr")) / max(reader.settings["inner"]["lr"], 1e-300)
    if options.pop("warmup_type", "linear") != "linear":
        reader.faults.append("lr_scheduler_kwargs.warmup_type: only linear warm-up is followed")
    for key, value in options.items():
        if value is None:
            continue
        if key not in ours:
            reader.faults.append(f"lr_scheduler_kwargs.{key}: not known here")
            continue
        kept = (
            value if isinstance(value, str) else int(value) if key in ("timescale", "num_decay_steps") else float(value)
        )
        reader.put(f"inner.{ours[key]}", kept, f"lr_scheduler_kwargs.{key}: {value}")


def batches(reader: Reader) -> None:
    """Batches, epochs and the order of examples."""
    size, accumulation = reader.whole("per_device_train_batch_size", 8), reader.whole("gradient_accumulation_steps", 1)
    reader.put("inner.batch_size", size, f"per_device_train_batch_size: {size}")
    reader.put("inner.accumulation", accumulation, f"gradient_accumulation_steps: {accumulation}")
    epochs, steps = reader.number("num_train_epochs", 3.0), reader.whole("max_steps", -1)
    if steps > 0:
        reader.put("inner.max_steps", steps, f"max_steps: {steps}")
    else:
        reader.put("inner.epochs", epochs, f"num_train_epochs: {epochs:g}")
    drop = reader.flag("dataloader_drop_last")
    reader.put("inner.drop_last", drop, f"dataloader_drop_last: {str(drop).lower()}")
    strategy = str(reader.take("train_sampling_strategy", "random"))
    if reader.flag("group_by_length") or strategy not in ("random", "sequential"):
        reader.faults.append(f"train_sampling_strategy = {strategy}: only random and sequential order are followed")
    order = "given" if strategy == "sequential" else "shuffled"
    reader.put("inner.order", order, f"train_sampling_strategy: {strategy}")
    seed = reader.whole("seed", 42)
    data_seed = reader.take("data_seed")
    reader.put("seed", seed if data_seed is None else int(data_seed), f"{'seed' if data_seed is None else 'data_seed'}")
    reader.put("inner.normalization", "token", "num_items_in_batch: tokens of the whole step")


def precision(reader: Reader, sft: bool) -> None:
    """float32, or bf16 compute."""
    fp16 = reader.flag("fp16")
    bf16 = reader.flag("bf16", sft and not fp16)
    if fp16:
        reader.faults.append("fp16: its loss scaling skips steps; only float32 and bf16 are followed")
    for key in ("dtype", "torch_dtype"):
        reader.refuse(key, ("auto", "float32"), "weights in half precision are trained with float32 masters here")
    options = reader.take("model_init_kwargs", {})
    kind = str((options if isinstance(options, dict) else {}).get("dtype", "float32"))
    if kind not in ("float32", "auto", "torch.float32"):
        reader.faults.append(f"model_init_kwargs.dtype = {kind}: weights are trained with float32 masters here")
    reader.put("inner.precision", "bf16" if bf16 else "float32", f"bf16: {str(bf16).lower()}")
    if bf16:
        reader.differs.append(
            "of bf16 autocast only the operands of linear maps are rounded; --precision float32 is exact"
        )


def lora(reader: Reader) -> None:
    """Adapters, as `trl sft` has them."""
    used = reader.flag("use_peft")
    rank, alpha = reader.whole("lora_r", 16), reader.number("lora_alpha", 32)
    modules, saved = reader.take("lora_target_modules"), reader.take("lora_modules_to_save")
    rslora = reader.flag("use_rslora")
    dropout = reader.number("lora_dropout", 0.05 if used else 0.0)
    reader.ignore(("lora_task_type",))
    if not used:
        reader.ignore(("use_dora", "lora_*"))
        return
    reader.refuse("use_dora", (False,), "DoRA is not supported")
    if dropout:
        reader.faults.append(f"lora_dropout = {dropout:g}: {NO_DROPOUT}")
    if modules is None:
        reader.faults.append("lora_target_modules: not given; name the modules that peft chose")
    put_lora(reader, rank, alpha, modules or "all-linear", saved or [], rslora)


def put_lora(reader: Reader, rank: int, alpha: float, modules: Any, saved: Any, rslora: bool) -> None:
    """The adapters in our settings."""
    names = [modules] if isinstance(modules, str) else [str(name) for name in modules]
    names = ["all-linear"] if names == ["all-linear"] else names
    reader.put("lora.rank", rank, f"rank: {rank}")
    reader.put("lora.alpha", alpha, f"alpha: {alpha:g}")
    reader.put("lora.modules", names, "adapted modules")
    if rslora:
        reader.put("lora.rslora", True, "use_rslora: true")
    if saved:
        reader.put("lora.save", [str(name) for name in saved], "modules trained whole")


def rows(reader: Reader) -> None:
    """What SFTTrainer does with rows."""
    length = reader.take("max_length", reader.take("max_seq_length", 1024))
    packing, strategy = reader.flag("packing"), str(reader.take("packing_strategy", "bfd"))
    if isinstance(length, int) and length > 0:
        reader.put("inner.max_length", length, f"max_length: {length}")
    if packing and (strategy != "bfd" or not isinstance(length, int)):
        reader.faults.append(f"packing_strategy = {strategy}: only bfd, which keeps examples whole, is followed")
    elif packing:
        reader.put("inner.packed_rows", length, "packing: true")
    reader.refuse("truncation_mode", ("keep_start",), "only cutting the end of examples is followed")
    reader.refuse("shuffle_dataset", (False,), "a dataset shuffled before the Trainer's own order is not followed")
    reader.refuse("loss_type", ("nll", "chunked_nll"), "another loss is not supported")
    reader.refuse("router_aux_loss_coef", (0.0,), "a router's loss is not supported")
    reader.refuse("chat_template_path", (), "give the target the template with its tokeniser")
    reader.refuse("assistant_only_loss", (False,), "the last answer of a conversation is trained on")
    whole = reader.take("completion_only_loss")
    if whole is not None and not whole:
        reader.differs.append(
            "completion_only_loss is false: give prompt and completion as one text, without --prompts"
        )
    elif whole:
        reader.said.append(("completion_only_loss: true", "what --prompts gives is not trained on"))
    field = reader.take("dataset_text_field", "text")
    reader.said.append((f"dataset_text_field: {field}", f"DATA as FILE:{field}"))
    options = reader.take("dataset_kwargs", {})
    if isinstance(options, dict) and options.get("skip_prepare_dataset"):
        reader.differs.append(
            "skip_prepare_dataset: DATA is tokenised here, which must give the rows that were trained on"
        )
