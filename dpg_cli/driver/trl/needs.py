"""What `dpg run --trainer trl` needs, asked before anything is loaded; imports nothing of TRL."""

from __future__ import annotations

import importlib.util

from dpg_cli.engine.ranks import Ranks
from dpg_cli.errors import UsageError
from dpg_cli.settings.config import Config


def require_trl(config: Config, ranks: Ranks) -> None:
    """Refuse what TRL cannot do.

    Raises:
        UsageError: if TRL or vLLM is missing, or mini-batches cannot be even ones on all processes.
    """
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
    if config.policy.kl and config.policy.kl_decay:
        raise UsageError("TRL's KL coefficient stays as it is: policy.kl_decay cannot be kept.", "Set it to 0.")
    if config.attribution.method not in ("metagradient", "sgd"):
        raise UsageError(
            f"attribution.method = {config.attribution.method!r} has no reward that TRL could compare within a group.",
            "Leave --trainer trl out.",
        )
