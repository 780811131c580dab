"""Load generators, targets and tokenisers: the embedded model, a local folder, or a hub name.

Nothing is unpickled and no remote code runs: weights come from safetensors, classes from transformers. What is loaded is
whole: `folder.py` looks at the files, `strict.py` at transformers' loading report, `sound.py` at what the model does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpg_cli.errors import UsageError
from dpg_cli.models.adapters import merge
from dpg_cli.models.embedded import EMBEDDED
from dpg_cli.models.folder import TOKENIZERS, ModelError, ModelFolder, examine, find
from dpg_cli.models.hub import first_line, offline_note, unreachable
from dpg_cli.models.sound import known_ids, require_causal, require_vocabulary
from dpg_cli.models.strict import blank, cannot_load, load_strictly
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
        unsaid: tokens that it may not draw as a generator (`rollout.alphabet`).
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    eos_id: int
    pad_id: int
    end_ids: tuple[int, ...] = ()
    unsaid: tuple[int, ...] = ()

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

    @cached_property
    def silent_ids(self) -> tuple[int, ...]:
        """Ids below V that are never sampled: those without a token in the tokeniser, which only pad the vocabulary and have
        no text, and `unsaid`."""
        known = known_ids(self.tokenizer).difference(self.unsaid)
        return tuple(number for number in range(self.head.shape[0]) if number not in known)

    @property
    def parameter_count(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def trained_count(self) -> int:
        """Number of those that are trained: adapters' alone, where it has some."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


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
        name: `tiny`, `prose`, `prose-reader`, a folder in the format of `save_pretrained`, or a hub name. An adapter (PEFT)
            is merged.
        device: where it lives.
        dtype: "float32" or "float64": what the weights are converted to, whatever their own type.
        init: "pretrained", or "random" for the same architecture with fresh weights.
        seed: of the fresh weights.

    Raises:
        ModelError: if there is no such model, if its weights are not whole, in safetensors and in floating point, if it has
            no tokeniser or another model's, or if it is no causal LM.
        UsageError: if it has an adapter, and peft is not installed.
    """
    with quiet_transformers():
        folder = _folder(name, weights=init != "random")
        tokenizer = _tokenizer(folder)
        if init == "random":
            model = blank(folder, getattr(torch, dtype), seed)
        else:
            model = load_strictly(folder, getattr(torch, dtype))
            model = model if folder.adapter is None else merge(model, folder)
    require_vocabulary(name, model, known_ids(tokenizer))
    model = model.to(device=device, dtype=getattr(torch, dtype)).eval()
    if dtype == "float64" and any(hasattr(module, "_apply_gate") for module in model.modules()):
        model.set_experts_implementation("eager")  # grouped products have no float64
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ends = end_tokens(
        tokenizer, getattr(model, "generation_config", None), model.get_output_embeddings().weight.shape[0]
    )
    loaded = LanguageModel(model, tokenizer, name, eos, eos if pad is None else pad, ends)
    require_causal(name, model, loaded.context)
    return loaded


def module_names(name: str) -> list[str]:
    """Names of a model's modules, from its configuration alone: no weight is read or made.

    Raises:
        ModelError: if there is no such model, or it is no causal LM.
    """
    with quiet_transformers(), torch.device("meta"):
        model = blank(_folder(name, weights=False), torch.float32, 0)
    return [part for part, _ in model.named_modules()]


def _folder(name: str, weights: bool) -> ModelFolder:
    """The folder of a model, looked at.

    Raises:
        ModelError: if there is none, or it cannot be loaded.
    """
    place = location(name)
    try:
        path = find(name, None if place == name else place)
    except ModelError:
        raise
    except Exception as error:  # of the hub library
        raise _refusal(name, error) from error
    return examine(name, path, weights=weights)


def _tokenizer(folder: ModelFolder) -> Any:
    """The tokeniser of a model.

    Raises:
        ModelError: if there is none, or it does not say how a text ends.
    """
    if not any((folder.tokenizer / file).is_file() for file in TOKENIZERS) and not list(
        folder.tokenizer.glob("*vocab*")
    ):
        raise ModelError(
            f"{folder.name} has no tokeniser: there is no tokenizer.json.",
            "Save it into the folder too: tokenizer.save_pretrained(FOLDER).",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer, trust_remote_code=False)
    except Exception as error:  # whatever a library raises on a file of the user's
        raise cannot_load(folder.name, error) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"The tokeniser of {folder.name!r} has no end-of-sequence token.",
            "Set eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def _refusal(name: str, error: Exception) -> ModelError:
    """What a model is refused with that cannot be fetched from the hub."""
    if unreachable(error):
        return ModelError(
            f"The model {name!r} cannot be loaded: it is not on this machine, and the hub cannot be reached{offline_note()}.",
            "Name `tiny`, `prose`, a folder that save_pretrained wrote, or run where the hub can be reached.",
        )
    if "GatedRepoError" in (type(error).__name__, type(error.__cause__).__name__):
        return ModelError(
            f"The model {name!r} cannot be loaded: its owner asks for consent first.",
            f"Accept the terms at https://huggingface.co/{name}, then `hf auth login`.",
        )
    return cannot_load(name, error)


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
