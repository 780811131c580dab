"""Load generators, targets and tokenisers: the embedded model, a local folder, or a hub name.

Nothing is unpickled and no remote code runs: weights come from safetensors, classes from transformers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpg_cli.errors import UsageError
from dpg_cli.models.embedded import EMBEDDED
from dpg_cli.models.hub import first_line, offline_note, unreachable
from dpg_cli.models.template import end_tokens
from dpg_cli.settings.config import ModelsConfig

DEVICES = ("cpu", "cuda", "mps", "xpu")
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with its tokeniser.

    Attributes:
        model: the causal LM, in eval mode, on its device.
        tokenizer: its tokeniser.
        name: how the user named it.
        eos_id: end-of-sequence token.
        pad_id: padding token; the end-of-sequence token where the tokeniser has none.
        end_ids: all tokens that end a completion, `eos_id` first: an instruct model also has an end of turn.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    eos_id: int
    pad_id: int
    end_ids: tuple[int, ...] = ()

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence token, if the tokeniser has one."""
        return self.tokenizer.bos_token_id

    @property
    def head(self) -> torch.Tensor:
        """The LM head's weight, (V, width)."""
        return self.model.get_output_embeddings().weight

    @property
    def context(self) -> int | None:
        """Longest sequence that the model reads, in tokens; None where its architecture sets no limit.

        A sliding attention window is no limit: tokens beyond it are read, only not looked back at.
        """
        config = self.model.config.get_text_config()
        found = (getattr(config, name, None) for name in CONTEXT_NAMES)
        return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)

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
    remedy = "Use --device cpu, or leave it at auto."
    if name.partition(":")[0] not in DEVICES:
        raise UsageError(
            f"Device {name!r} cannot be used: there is no such kind.", f"Kinds: auto, {', '.join(DEVICES)}."
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error).partition(". ")[0]
        reason = reason if len(reason) < 100 else "this machine has none, or torch is built without it"
        raise UsageError(f"Device {name!r} cannot be used: {reason}.", remedy) from None
    return device


def location(name: str) -> str:
    """What transformers is given for a model's name: the folder of an embedded model, else the name itself."""
    return str(EMBEDDED.get(name, name))


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
        name: `tiny`, `prose`, `prose-reader`, a folder in the format of `save_pretrained`, or a hub name.
        device: where it lives.
        dtype: "float32" or "float64".
        init: "pretrained", or "random" for the same architecture with fresh weights.
        seed: of the fresh weights.

    Raises:
        UsageError: if there is no such model, or it has no tokeniser, no safetensors weights, or no end-of-sequence token.
    """
    place = location(name)
    if name not in EMBEDDED and (name.startswith((".", "/", "~")) or Path(name).exists()):
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
        raise _refusal(name, error) from None
    eos = tokenizer.eos_token_id
    if eos is None:
        raise UsageError(
            f"The tokeniser of {name!r} has no end-of-sequence token.", "Set eos_token in its tokenizer_config.json."
        )
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    pad = tokenizer.pad_token_id
    ends = end_tokens(
        tokenizer, getattr(model, "generation_config", None), model.get_output_embeddings().weight.shape[0]
    )
    return LanguageModel(model, tokenizer, name, eos, eos if pad is None else pad, ends)


def _refusal(name: str, error: Exception) -> UsageError:
    """What a model that cannot be loaded is refused with."""
    if unreachable(error) and not Path(name).expanduser().exists():
        return UsageError(
            f"The model {name!r} cannot be loaded: it is not on this machine, and the hub cannot be reached{offline_note()}.",
            "Name `tiny`, `prose`, a folder that save_pretrained wrote, or run where the hub can be reached.",
        )
    if type(error.__cause__ or error).__name__ == "GatedRepoError":
        return UsageError(
            f"The model {name!r} cannot be loaded: its owner asks for consent first.",
            f"Accept the terms at https://huggingface.co/{name}, then `hf auth login`.",
        )
    return UsageError(
        f"The model {name!r} cannot be loaded: {first_line(error)}.",
        "Name `tiny`, `prose`, a folder that save_pretrained wrote, or a hub model that this machine can reach.",
    )


def untie_head(model: PreTrainedModel) -> None:
    """Give a tied LM head weights of its own, with the same values; nothing happens to an untied one.

    Loading a tied checkpoint with `tie_word_embeddings=False` would draw the head at random instead.
    """
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def same_tokenizer(first: LanguageModel, second: LanguageModel) -> bool:
    """Whether two models give every token the same id, and have as many ids."""
    if first.head.shape[0] != second.head.shape[0]:
        return False
    return first.tokenizer is second.tokenizer or first.tokenizer.get_vocab() == second.tokenizer.get_vocab()


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


@torch.no_grad()
def redraw_target(target: LanguageModel, models: ModelsConfig, step: int) -> None:
    """Give a blank target the fresh weights of an outer step, in place: those of seed `init_seed` + step."""
    seed = (models.init_seed + step) % 2**32
    fresh = load_target(models.model_copy(update={"init_seed": seed}), target.head.device)
    for parameter, value in zip(target.model.parameters(), fresh.model.parameters(), strict=True):
        parameter.copy_(value)
