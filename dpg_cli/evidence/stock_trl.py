"""The stock training by TRL's SFTTrainer: what most people fine-tune with. Same tokens, same masks, its own everything else.

A recipe that SFTConfig can say is said there, optimiser and groups included; groups of one's own, Adam and momentum come as a
torch.optim optimiser, which the Trainer takes as well. The rows are tokens already. Dropout is off, as in the inner run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from dpg_cli.evidence.stock_plan import Row, StockPlan
from dpg_cli.evidence.stock_recipe import SCHEDULES, Average, schedule_options, stock_optimizers
from dpg_cli.models.hub import first_line, require
from dpg_cli.settings.config import Config
from dpg_cli.settings.inner import InnerConfig

OLDEST = (1, 16)  # release of TRL whose settings are spoken here
NEVER = 10**9  # steps between two lines of a log that nobody reads


def named() -> str:
    """The trainer with its release."""
    return f"TRL {require('trl', 'trl', 'Verification').__version__}'s SFTTrainer"


def unusable() -> str:
    """Why the installed TRL cannot be used; nothing where it can."""
    found = version("trl")
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"TRL {found} is older than {'.'.join(map(str, OLDEST))}"
    try:
        importlib.import_module("trl.trainer.sft_trainer")
    except Exception as error:  # of any library that it takes
        return f"TRL {found} cannot be imported: {first_line(error)}"
    return ""


def unfit(config: Config, device: torch.device) -> str:
    """Why SFTTrainer cannot follow a run's recipe; nothing where it can."""
    inner = config.inner
    if inner.optimizer == "muon":
        return "it takes one optimiser, and Muon leaves what is no matrix to another"
    if inner.normalization != "token":
        return "its loss is averaged over tokens, and inner.normalization is 'example'"
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        return "it would take all accelerators; CUDA_VISIBLE_DEVICES leaves it one"
    return ""


def train_by_trl(
    model: nn.Module,
    tokenizer: Any,
    plan: StockPlan,
    inner: InnerConfig,
    seed: int,
    at_once: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Fine-tune a model by SFTTrainer.

    Args:
        model: changed in place; with its adapters, if it has some.
        tokenizer: the Trainer wants one, though the rows are tokens.
        plan: the rows, and how many make a step.
        inner: the recipe.
        seed: of the order.
        at_once: most rows of a micro-batch; as many as divide a step are taken.
        progress: called with the rows done and all of them, after each step.

    Returns:
        The model, in eval mode.
    """
    trl, datasets = require("trl", "trl", "Verification"), require("datasets", "trl", "Verification")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rows, size = plan.in_order() if plan.replays else (plan.rows, plan.size)
    micro = next(count for count in range(min(at_once, size), 0, -1) if size % count == 0)
    double = next(model.parameters()).dtype == torch.float64
    average = Average(model, inner)
    watch = _watcher(plan, average, progress)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        datasets.disable_progress_bars()
        trainer = trl.SFTTrainer(
            model,
            trl.SFTConfig(folder, **arguments(plan, inner, seed, size, micro, _device_of(model))),
            train_dataset=datasets.Dataset.from_list([_record(row) for row in rows]),
            processing_class=tokenizer,
            compute_loss_func=mean_loss if double else None,
            callbacks=[watch],
            optimizers=(None if plainly(inner) else stock_optimizers(model, inner)[0], None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    average.finish()
    steps = trainer.state.global_step
    assert steps == len(plan.steps), f"{steps} steps in place of {len(plan.steps)}"
    return trainer.model.eval()


def plainly(inner: InnerConfig) -> bool:
    """Whether SFTConfig alone says the optimiser and its groups."""
    decays = set(inner.no_decay) == {"biases", "norms"} or (not inner.no_decay and not inner.weight_decay)
    plain = inner.optimizer == "adamw" or (inner.optimizer == "sgd" and not inner.momentum)
    return plain and decays and not inner.groups


def arguments(
    plan: StockPlan, inner: InnerConfig, seed: int, size: int, micro: int, device: torch.device
) -> dict[str, Any]:
    """The recipe in the words of SFTConfig.

    Args:
        plan: with replay its steps are given in their order, as one epoch.
        inner: the recipe.
        seed: of the order.
        size, micro: rows of a step and of a micro-batch.
        device: where it trains.
    """
    packs = bool(inner.packed_rows)
    return {
        "optim": "sgd" if inner.optimizer == "sgd" else "adamw_torch",
        "learning_rate": inner.lr,
        "adam_beta1": inner.beta1,
        "adam_beta2": inner.beta2,
        "adam_epsilon": inner.eps,
        "weight_decay": inner.weight_decay,
        "lr_scheduler_type": SCHEDULES[inner.schedule],
        "lr_scheduler_kwargs": {key: value for key, value in schedule_options(inner).items() if value is not None},
        "warmup_steps": inner.warmup if inner.warmup < 1 else int(inner.warmup),
        "max_grad_norm": inner.max_grad_norm,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": size // micro,
        "num_train_epochs": 1.0 if plan.replays else plan.epochs,
        "max_steps": inner.max_steps or -1,
        "train_sampling_strategy": "random" if inner.order == "shuffled" and not plan.replays else "sequential",
        "seed": seed,
        "data_seed": seed,
        "packing": packs,
        "max_length": inner.packed_rows or None,
        "dataset_kwargs": {"skip_prepare_dataset": not packs},
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": NEVER,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The Trainer's loss in the precision of the logits, for float64: its own rounds them to float32."""
    losses = nn.functional.cross_entropy(outputs.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    return losses / num_items_in_batch


def _record(row: Row) -> dict[str, list[int]]:
    """A row as SFTTrainer takes it: the first token has nothing before it that could predict it."""
    ids = [int(number) for number in row.ids]
    trained = [place > 0 for place in range(len(ids))] if row.trained is None else [False, *row.trained[1:]]
    return {"input_ids": ids, "labels": [number if kept else -100 for number, kept in zip(ids, trained, strict=True)]}


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _watcher(plan: StockPlan, average: Average, progress: Callable[[int, int], None]) -> transformers.TrainerCallback:
    """A callback that follows the weights and tells how far the training is."""
    done = [0]
    whole = sum(map(len, plan.steps))

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            average.stepped()
            done[0] += len(plan.steps[state.global_step - 1])
            progress(done[0], whole)

    return Watch()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' warnings and lines: what matters of them is ours to say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
