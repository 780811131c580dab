"""Load generators, targets and tokenisers: the embedded model, a local folder, or a hub name.

Nothing is unpickled and no remote code runs: weights come from safetensors, classes from transformers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpg_cli.config import ModelsConfig
from dpg_cli.errors import UsageError
from dpg_cli.tiny import MODEL_DIR


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with its tokeniser.

    Attributes:
        model: the causal LM, in eval mode, on its device.
        tokenizer: its tokeniser.
        name: how the user named it.
        eos_id: end-of-sequence token.
        pad_id: padding token; the end-of-sequence token where the tokeniser has none.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    eos_id: int
    pad_id: int

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence token, if the tokeniser has one."""
        return self.tokenizer.bos_token_id

    @property
    def head(self) -> torch.Tensor:
        """The LM head's weight, (V, width)."""
        return self.model.get_output_embeddings().weight

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def pick_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda`, `cuda:1`, `mps` … names.

    Raises:
        UsageError: for an unknown name or a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"Device {name!r} cannot be used: {reason}.", "Use --device cpu, or leave it at auto."
        ) from None
    return device


def location(name: str) -> str:
    """What transformers is given for a model's name: the embedded folder for `tiny`, else the name itself."""
    return str(MODEL_DIR) if name == "tiny" else name


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own warnings and progress bars: progress and errors are ours to show."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        hub_logging.set_verbosity(hub_before)
        transformers_logging.enable_progress_bar()


def load(
    name: str, *, device: torch.device, dtype: str = "float32", init: str = "pretrained", seed: int = 0
) -> LanguageModel:
    """Load a causal LM and its tokeniser.

    Args:
        name: `tiny`, a folder in the format of `save_pretrained`, or a hub name.
        device: where it lives.
        dtype: "float32" or "float64".
        init: "pretrained", or "random" for the same architecture with fresh weights.
        seed: of the fresh weights.

    Raises:
        UsageError: if there is no such model, or it has no tokeniser, no safetensors weights, or no end-of-sequence token.
    """
    place = location(name)
    if name != "tiny" and (name.startswith((".", "/", "~")) or Path(name).exists()):
        place = str(Path(name).expanduser())
        if not (Path(place) / "config.json").is_file():
            raise UsageError(
                f"{name} is no model folder: it has no config.json.", "Name a folder that save_pretrained wrote."
            )
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(place)
            if init == "random":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(place))
            else:
                model = AutoModelForCausalLM.from_pretrained(place, use_safetensors=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UsageError(
            f"The model {name!r} cannot be loaded{offline}: {reason.strip().rstrip('.')[:300]}.",
            "Name `tiny`, a folder that save_pretrained wrote, or a hub model that this machine can reach.",
        ) from None
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UsageError(
            f"The tokeniser of {name!r} has no end-of-sequence token.", "Set eos_token in its tokenizer_config.json."
        )
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    pad = tokenizer.pad_token_id
    return LanguageModel(model, tokenizer, name, eos, eos if pad is None else pad)


def untie_head(model: PreTrainedModel) -> None:
    """Give a tied LM head weights of its own, with the same values; nothing happens to an untied one.

    Loading a tied checkpoint with `tie_word_embeddings=False` would draw the head at random instead.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def same_tokenizer(first: LanguageModel, second: LanguageModel) -> bool:
    """Whether two models give every token the same id."""
    return first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


def load_generator(models: ModelsConfig, device: torch.device) -> LanguageModel:
    """The untrained generator that the settings name."""
    generator = load(
        models.generator, device=device, dtype=models.dtype, init=models.generator_init, seed=models.init_seed
    )
    if models.untie_generator:
        untie_head(generator.model)
    return generator


def load_target(models: ModelsConfig, device: torch.device) -> LanguageModel:
    """The target θ_0 that the settings name."""
    target = load(models.target, device=device, dtype=models.dtype, init=models.target_init, seed=models.init_seed)
    if models.untie_target:
        untie_head(target.model)
    return target
