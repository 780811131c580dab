"""torchtune's YAML, where its elements map: `full_finetune_*` and `lora_finetune_*`.

Its order of examples comes from a generator whose state the file does not tell, and weights are bf16 where `dtype` says so:
that is said, not followed. Source: torchtune's `recipes/full_finetune_single_device.py`.
"""

from __future__ import annotations

from typing import Any

from dpg_cli.recipes import trl
from dpg_cli.recipes.reader import Reader, Understood
from dpg_cli.settings.optimizers import why_not

NOTHING = (
    *(
        "output_dir",
        "tokenizer",
        "checkpointer",
        "resume_from_checkpoint",
        "compile",
        "metric_logger",
        "log_*",
        "profiler",
    ),
    *(
        "device",
        "enable_activation_checkpointing",
        "enable_activation_offloading",
        "save_*",
        "optimizer_in_bwd",
        "epochs_run",
    ),
    *(
        "cudnn_deterministic_mode",
        "fsdp_*",
        "custom_sharded_layers",
        "collate_fn",
        "use_grad_scaler",
        "dataset_val",
        "run_val_*",
    ),
    *(
        "batch_size_val",
        "model_type",
        "keep_last_*",
        "memory_efficient_fsdp_wrap",
        "ac_mode",
        "ac_option",
        "clip_grad_norm_type",
    ),
)
ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}


def fits(data: dict[str, Any]) -> bool:
    """Whether its parts are named as torchtune names them."""
    parts = (data.get(key) for key in ("model", "optimizer", "tokenizer", "loss"))
    return any(isinstance(part, dict) and "_component_" in part for part in parts)


def read(data: dict[str, Any]) -> Understood:
    """Its settings in ours.

    Raises:
        ConfigError: with a line for everything that cannot be followed.
    """
    reader = Reader(data, "torchtune")
    optimizer(reader)
    schedule(reader)
    size, accumulation = reader.whole("batch_size", 1), reader.whole("gradient_accumulation_steps", 1)
    reader.put("inner.batch_size", size, f"batch_size: {size}")
    reader.put("inner.accumulation", accumulation, f"gradient_accumulation_steps: {accumulation}")
    if accumulation > 1:
        reader.differs.append("what is left of an epoch makes a step here; torchtune adds it to the next epoch's first")
    epochs = reader.number("epochs", 1)
    reader.put("inner.epochs", epochs, f"epochs: {epochs:g}")
    reader.refuse("max_steps_per_epoch", (-1,), "set inner.max_steps instead: epochs that end early are not followed")
    reader.put("inner.drop_last", True, "torchtune drops the last smaller batch")
    norm = reader.number("clip_grad_norm", 0.0)
    reader.put("inner.max_grad_norm", norm, f"clip_grad_norm: {norm:g}")
    shuffle = reader.flag("shuffle", True)
    reader.put("inner.order", "shuffled" if shuffle else "given", f"shuffle: {str(shuffle).lower()}")
    seed = reader.whole("seed", 0)
    if shuffle:
        reader.put("seed", seed, f"seed: {seed}")
        reader.differs.append(
            "which examples meet in a step: the state that torchtune draws its order from is not in the file"
        )
    kind = str(reader.take("dtype", "fp32"))
    reader.put("inner.precision", "float32" if kind == "fp32" else "bf16", f"dtype: {kind}")
    if kind == "bf16":
        reader.differs.append(
            "torchtune's weights are bf16; here they are float32, and the operands of linear maps bf16"
        )
    elif kind != "fp32":
        reader.faults.append(f"dtype = {kind}: only fp32 and bf16 are followed")
    reader.put("inner.normalization", "token", "loss averaged over the tokens of a step")
    loss = reader.take("loss", {})
    name = str(loss.get("_component_", "") if isinstance(loss, dict) else loss)
    if name and not any(known in name for known in ("CrossEntropy", "CEWithChunkedOutputLoss")):
        reader.faults.append(f"loss = {name}: only cross-entropy is followed")
    model(reader)
    rows(reader)
    reader.refuse("quantizer", (), "quantisation-aware training is not supported")
    reader.ignore(NOTHING)
    return reader.done("not a setting of torchtune that is known here; whether it changes the numbers cannot be told")


def optimizer(reader: Reader) -> None:
    """Its optimiser, with torch's defaults for what is not given."""
    part = reader.take("optimizer", {})
    part = dict(part) if isinstance(part, dict) else {}
    name = str(part.pop("_component_", "torch.optim.AdamW"))
    part.pop("fused", None)
    part.pop("foreach", None)
    inner = Reader(part, reader.kind)
    kind = {"torch.optim.AdamW": "adamw", "torch.optim.Adam": "adam", "torch.optim.SGD": "sgd"}.get(name)
    if kind is None:
        why = why_not(name) or "only torch.optim's AdamW, Adam and SGD are followed"
        reader.faults.append(f"optimizer = {name}: {why}")
        return
    reader.put("inner.optimizer", kind, f"optimizer: {name}")
    lr = inner.number("lr", 1e-3)
    reader.put("inner.lr", lr, f"optimizer.lr: {lr:g}")
    decay = inner.number("weight_decay", 0.01 if kind == "adamw" else 0.0)
    reader.put("inner.weight_decay", decay, f"optimizer.weight_decay: {decay:g}")
    if kind == "sgd":
        momentum = inner.number("momentum", 0.0)
        reader.put("inner.momentum", momentum, f"optimizer.momentum: {momentum:g}")
        reader.put("inner.nesterov", inner.flag("nesterov"), "optimizer.nesterov")
    else:
        betas = inner.take("betas", [0.9, 0.999])
        reader.put("inner.beta1", float(betas[0]), f"optimizer.betas: {betas}")
        reader.put("inner.beta2", float(betas[1]), f"optimizer.betas: {betas}")
        eps = inner.number("eps", 1e-8)
        reader.put("inner.eps", eps, f"optimizer.eps: {eps:g}")
        reader.put("inner.eps_root", 0.0, "as torch has it")
    reader.faults += [f"optimizer.{fault}" for fault in inner.faults]
    reader.faults += [f"optimizer.{key}: not known here" for key in inner.left]


def schedule(reader: Reader) -> None:
    """A cosine with warm-up, or none."""
    part = reader.take("lr_scheduler")
    if not isinstance(part, dict):
        reader.put("inner.schedule", "constant", "no lr_scheduler")
        return
    name = str(part.get("_component_", ""))
    if not name.endswith("get_cosine_schedule_with_warmup"):
        reader.faults.append(f"lr_scheduler = {name}: only its cosine with warm-up is followed")
        return
    steps = int(part.get("num_warmup_steps", 0))
    reader.put("inner.schedule", "cosine", "lr_scheduler: cosine")
    reader.put("inner.warmup", float(steps), f"lr_scheduler.num_warmup_steps: {steps}")
    if part.get("num_cycles") not in (None, 0.5):
        reader.put("inner.cycles", float(part["num_cycles"]), f"lr_scheduler.num_cycles: {part['num_cycles']}")


def model(reader: Reader) -> None:
    """Whether it trains adapters."""
    part = reader.take("model", {})
    part = dict(part) if isinstance(part, dict) else {}
    name = str(part.get("_component_", ""))
    if "lora" not in name.rpartition(".")[2]:
        return
    if "qlora" in name or part.get("quantize_base"):
        reader.faults.append(f"model = {name}: a quantised base is not supported")
    if part.get("use_dora"):
        reader.faults.append("model.use_dora: DoRA is not supported")
    dropout = float(part.get("lora_dropout") or 0.0)
    if dropout:
        reader.faults.append(f"model.lora_dropout = {dropout:g}: {trl.NO_DROPOUT}")
    names = [ATTENTION.get(str(module), str(module)) for module in part.get("lora_attn_modules", [])]
    names += ["gate_proj", "up_proj", "down_proj"] if part.get("apply_lora_to_mlp") else []
    names += ["lm_head"] if part.get("apply_lora_to_output") else []
    trl.put_lora(reader, int(part.get("lora_rank", 8)), float(part.get("lora_alpha", 16)), names, [], False)


def rows(reader: Reader) -> None:
    """What it says of rows."""
    part = reader.take("dataset", {})
    for one in part if isinstance(part, list) else [part]:
        if isinstance(one, dict) and one.get("packed"):
            reader.faults.append("dataset.packed: its packing cuts examples, which is not followed")
        if isinstance(one, dict) and one.get("train_on_input"):
            reader.differs.append("dataset.train_on_input: give prompt and answer as one text, without --prompts")
    length = reader.left.get("tokenizer", {})
    limit = length.get("max_seq_len") if isinstance(length, dict) else None
    if limit:
        reader.put("inner.max_length", int(limit), f"tokenizer.max_seq_len: {limit}")
