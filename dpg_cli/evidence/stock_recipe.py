"""A run's recipe as stock PyTorch and transformers have it: optimiser, parameter groups, schedule. No engine here."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.optim import swa_utils
from transformers import Trainer, get_scheduler

from dpg_cli.errors import UsageError
from dpg_cli.settings.inner import InnerConfig

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SCHEDULES = {  # ours: transformers'
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine_with_min_lr",
    "restarts": "cosine_with_restarts",
    "polynomial": "polynomial",
    "inverse-sqrt": "inverse_sqrt",
    "stable-decay": "warmup_stable_decay",
}


def require_stock_optimizer(inner: InnerConfig) -> None:
    """Refuse optimiser settings that stock PyTorch lacks.

    Raises:
        UsageError: for Adam, AdamW and Muon (whose rest goes by AdamW) with ε_root > 0.
    """
    if inner.optimizer != "sgd" and inner.eps_root > 0:
        name = ADAMS.get(inner.optimizer, torch.optim.AdamW).__name__
        raise UsageError(
            f"inner.eps_root = {inner.eps_root:g} is not a setting of torch.optim.{name}.",
            "Only runs with inner.eps_root = 0 can be verified by stock PyTorch.",
        )


def stock_optimizers(model: nn.Module, inner: InnerConfig) -> list[torch.optim.Optimizer]:
    """The optimiser of these settings as torch has it, with their parameter groups; frozen parameters are frozen.

    Muon is two: torch.optim.Muon for the matrices within the model, AdamW for embeddings, head, norms and biases.
    """
    shared: dict[str, Any] = {"lr": inner.lr, "weight_decay": inner.weight_decay}
    adam: dict[str, Any] = {"betas": (inner.beta1, inner.beta2), "eps": inner.eps}
    groups = stock_groups(model, inner)
    if inner.optimizer in ADAMS:
        return [ADAMS[inner.optimizer](groups, **adam, **shared)]
    if inner.optimizer == "sgd":
        return [torch.optim.SGD(groups, momentum=inner.momentum, nesterov=inner.nesterov, **shared)]
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outer |= {id(parameter) for parameter in cast(Any, model).get_output_embeddings().parameters()}
    hidden = [group for group in groups if group["params"][0].ndim == 2 and id(group["params"][0]) not in outer]
    rest = [group for group in groups if group["params"][0].ndim != 2 or id(group["params"][0]) in outer]
    muon: dict[str, Any] = {"momentum": inner.momentum, "nesterov": inner.nesterov, "adjust_lr_fn": inner.adjust_lr}
    made: list[torch.optim.Optimizer] = []
    if hidden:
        made.append(torch.optim.Muon(hidden, ns_steps=inner.ns_steps, **muon, **shared))
    if rest:
        made.append(torch.optim.AdamW(rest, **adam, **shared))
    return made


def stock_groups(model: nn.Module, inner: InnerConfig) -> list[dict[str, Any]]:
    """A parameter group for each parameter, with its learning rate and weight decay."""
    trainer = set(Trainer.get_decay_parameter_names(cast(Trainer, None), cast(Any, model)))
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # the base of adapters
            continue
        own = next((g for g in inner.groups if any(fnmatchcase(name, glob) for glob in g.names)), None)
        if own is not None and own.frozen:
            parameter.requires_grad_(False)
            continue
        bias = "bias" in name.lower()
        bare = (
            ("biases" in inner.no_decay and bias)
            or ("norms" in inner.no_decay and name not in trainer and not bias)
            or ("embeddings" in inner.no_decay and id(parameter) in tables)
            or any(fnmatchcase(name, glob) for glob in inner.no_decay)
        )
        decay = 0.0 if bare else inner.weight_decay
        if own is not None and own.weight_decay is not None:
            decay = own.weight_decay
        lr = inner.lr if own is None or own.lr is None else own.lr
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return groups


class Average:
    """The running average of the trained weights, by torch.optim.swa_utils, where the settings ask for one.

    Args:
        model: its trained parameters are followed.
        inner: the recipe.
    """

    def __init__(self, model: nn.Module, inner: InnerConfig) -> None:
        self.held = nn.ParameterList([parameter for parameter in model.parameters() if parameter.requires_grad])
        fn = swa_utils.get_ema_multi_avg_fn(inner.ema)
        self.kept = swa_utils.AveragedModel(self.held, multi_avg_fn=fn) if inner.ema else None

    def stepped(self) -> None:
        """Take in the weights after a step."""
        if self.kept is not None:
            self.kept.update_parameters(self.held)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the average in the place of the weights."""
        if self.kept is not None:
            for parameter, average in zip(self.held, self.kept.module.parameters(), strict=True):
                parameter.copy_(average)


def stock_schedule(optimizer: torch.optim.Optimizer, inner: InnerConfig, steps: int) -> Any:
    """The learning-rate schedule of these settings as transformers has it."""
    warmup = int(inner.warmup) if inner.warmup >= 1 else math.ceil(steps * inner.warmup)
    own = schedule_options(inner)
    return get_scheduler(SCHEDULES[inner.schedule], optimizer, warmup, steps, scheduler_specific_kwargs=own)


def schedule_options(inner: InnerConfig) -> dict[str, Any]:
    """What a schedule takes besides the steps, in transformers' words."""
    options: dict[str, dict[str, Any]] = {
        "cosine": {"num_cycles": inner.cycles or 0.5, "min_lr_rate": inner.lr_floor},
        "restarts": {"num_cycles": inner.cycles or 1},
        "polynomial": {"power": inner.power, "lr_end": inner.lr_end},
        "inverse-sqrt": {"timescale": inner.timescale or None},
        "stable-decay": {
            "num_decay_steps": inner.decay_steps,
            "decay_type": inner.decay,
            "min_lr_ratio": inner.lr_floor,
        },
    }
    return options.get(inner.schedule, {})
