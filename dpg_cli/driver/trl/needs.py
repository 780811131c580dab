"""What `dpg run --trainer trl` needs, asked before anything is loaded; imports nothing of TRL."""

from __future__ import annotations

import importlib.util
import os

from dpg_cli.engine.ranks import Ranks
from dpg_cli.errors import UsageError
from dpg_cli.settings.config import Config

FSDP, DEEPSPEED = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"  # accelerate's own switches


def require_trl(config: Config, ranks: Ranks) -> None:
    """Refuse what TRL cannot do.

    Raises:
        UsageError: if TRL or vLLM is missing, mini-batches cannot be even ones on all processes, or a setting asks for what only our
            own loop has.
    """
    tokens = config.credit.mode != "sequence"
    for name, wanted in (("trl", True), ("datasets", True), ("vllm", config.trl.vllm != "off")):
        if wanted and importlib.util.find_spec(name) is None:
            extra = "vllm" if name == "vllm" else "trl"
            raise UsageError(f"--trainer trl: {name} is not installed.", f"pip install 'dpg-cli[{extra}]'")
    batch, examples = config.policy.minibatch, config.examples_per_step
    if examples % batch or batch % ranks.world:
        raise UsageError(
            f"TRL takes even mini-batches: policy.minibatch ({batch}) must divide the {examples} completions of an outer "
            f"step, and {ranks.world} processes must divide it.",
            "Change policy.minibatch, prompts.per_step or the number of processes.",
        )
    if config.policy.kl and config.policy.kl_decay and not tokens:
        raise UsageError(
            "TRL's KL coefficient stays as it is: policy.kl_decay cannot be kept with 'sequence' credit.",
            "Set it to 0.",
        )
    if config.rollout.group_size < 2:
        raise UsageError(
            "TRL draws groups: rollout.group_size must be at least 2.", "Raise it, or leave --trainer trl out."
        )
    if getattr(config.metric, "margin", 0):
        raise UsageError(
            "metric.margin counts in standard errors, which only our own loop measures.",
            "Set metric.margin = 0, or leave --trainer trl out.",
        )
    if asked(FSDP) or (tokens and asked(DEEPSPEED)):
        what = "FSDP holds parts" if asked(FSDP) else f"With {config.credit.mode!r} credit DeepSpeed may hold parts"
        raise UsageError(
            f"{what} of the generator on each process; --trainer trl moves whole ones, by an optimiser of ours.",
            "Launch it with DDP (accelerate launch --multi_gpu), or leave --trainer trl out.",
        )
    if config.attribution.method not in ("metagradient", "sgd"):
        raise UsageError(
            f"attribution.method = {config.attribution.method!r} has no reward that TRL could compare within a group.",
            "Leave --trainer trl out.",
        )


def asked(switch: str) -> bool:
    """Whether a launcher set a switch in the environment."""
    return os.environ.get(switch, "").lower() in ("1", "true")
