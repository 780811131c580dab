"""Loading a causal LM from a folder so that every weight comes from its files, or not at all.

transformers fills what a checkpoint lacks with random numbers, other ones each time, and passes over what it does not
know. Its loading report (`output_loading_info`) names both; here each is a refusal. Weights that are tied to others are
meant to be absent, and are not in the report.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpg_cli.models.folder import ADAPTER, ModelError, ModelFolder, command
from dpg_cli.models.hub import first_line

SHOWN = 2  # names of weights in a message
WRAPPERS = {  # part of a weight's name -> what puts it there, and how the model is saved without
    "_orig_mod": ("torch.compile", "Save it from the model inside: model._orig_mod.save_pretrained(FOLDER)"),
    "_fsdp_wrapped_module": ("FSDP", "Save it by accelerator.get_state_dict(model) and unwrap_model(model)"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "Save it before it is wrapped"),
    "base_layer": ("PEFT, not merged", "Save it by model.merge_and_unload().save_pretrained(FOLDER)"),
    "base_model": ("PEFT", "Save it by model.merge_and_unload().save_pretrained(FOLDER)"),
    "module": (
        "DataParallel or DistributedDataParallel",
        "Save it from the model inside: model.module.save_pretrained",
    ),
    "pretrained_model": ("TRL's value head", "Save it from the model inside: model.pretrained_model.save_pretrained"),
    "model.model": ("a wrapping module", "Save it from the model inside by save_pretrained"),
}


def load_strictly(folder: ModelFolder, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM with the weights of a folder, on the CPU.

    Args:
        folder: that `examine` found good. Its adapter is not looked at.
        dtype: that the weights are converted to.

    Raises:
        ModelError: if anything is missing, left over or of another shape, or the folder holds no causal LM.
    """
    config = causal_config(folder)
    with tempfile.TemporaryDirectory() as place:
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                _without_adapter(folder.path, Path(place)),
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # they are in the report, and refused below
                output_loading_info=True,
            )
        except Exception as error:  # whatever a library raises on a file of the user's
            raise cannot_load(folder.name, error) from error
    missing, unexpected = set(report["missing_keys"]), set(report["unexpected_keys"])
    mismatched = {name: (tuple(there), tuple(asked)) for name, there, asked in report["mismatched_keys"]}
    if missing or unexpected or mismatched or report["error_msgs"]:
        raise _incomplete(folder, missing - set(mismatched), unexpected, mismatched)
    return model


def blank(folder: ModelFolder, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A causal LM of a folder's architecture with random weights, drawn in float32 whatever `dtype` is.

    Raises:
        ModelError: if the folder is of no causal LM.
    """
    config = causal_config(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except Exception as error:  # whatever a library raises on a file of the user's
        raise cannot_load(folder.name, error) from error
    return model.to(dtype)


def causal_config(folder: ModelFolder) -> PreTrainedConfig:
    """The configuration of a causal LM.

    Raises:
        ModelError: if the folder is of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False)
    except Exception as error:  # whatever a library raises on a file of the user's
        raise cannot_load(folder.name, error) from error
    remedy = "Name a decoder with an LM head: a folder that a *ForCausalLM or *LMHeadModel class saved."
    if config.is_encoder_decoder:
        raise ModelError(f"The model {folder.name!r} is an encoder with a decoder ({config.model_type}).", remedy)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"The model {folder.name!r} ({config.model_type}) is no causal LM.", remedy)
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _listed(names)}
    saved = [name for name in _listed(folder.config.get("architectures") or []) if isinstance(name, str)]
    other = [n for n in saved if n not in known and not n.endswith("Model") and hasattr(transformers, n)]
    if saved and len(other) == len(saved):
        raise ModelError(f"The model {folder.name!r} was saved as {other[0]}, which has no LM head.", remedy)
    return config


def cannot_load(name: str, error: BaseException) -> ModelError:
    """What a model or tokeniser is refused with that a library cannot make sense of."""
    return ModelError(
        f"The model {name!r} cannot be loaded: {first_line(error)}.",
        "Name `tiny`, or a folder that save_pretrained wrote, with its tokeniser.",
    )


def _listed(names: Any) -> list[Any]:
    return list(names) if isinstance(names, list | tuple) else [names]


def _without_adapter(path: Path, place: Path) -> Path:
    """The folder, or where an adapter lies in it a view of the rest: transformers would put the adapter on by itself."""
    if not (path / ADAPTER).is_file():
        return path
    for file in path.iterdir():
        if file.is_file() and not file.name.startswith("adapter_"):
            (place / file.name).symlink_to(file.resolve())
    return place


def _incomplete(
    folder: ModelFolder,
    missing: set[str],
    unexpected: set[str],
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> ModelError:
    """What a checkpoint is refused with whose weights are not those of its config.json."""
    parts = []
    if missing:
        parts.append(f"{_counted(missing)} missing and would be random")
    if unexpected:
        parts.append(f"{_counted(unexpected)} not the model's")
    parts += [
        f"{name} is {_shape(there)} and should be {_shape(asked)}"
        for name, (there, asked) in sorted(mismatched.items())[:SHOWN]
    ]
    cause = f"The weights of {folder.name} do not fit its config.json: {'; '.join(parts)}."
    wrapper = next((item for part, item in WRAPPERS.items() if _wrapped(part, unexpected)), None)
    if wrapper is not None:
        return ModelError(f"{cause} The names come from {wrapper[0]}.", f"{wrapper[1]}.")
    if not missing and not mismatched:
        to = f"{folder.path}-plain"
        return ModelError(
            cause,
            "If the model is right without them, write it out, add the tokeniser's files and name the new folder: "
            + command("", folder.path, to),
        )
    if not mismatched and all("head" in name or "embed_out" in name for name in missing):
        return ModelError(cause, "It was saved without its LM head: save it from the *ForCausalLM class.")
    return ModelError(cause, "Take config.json and weights from one save_pretrained, written to its end.")


def _wrapped(part: str, names: Iterable[str]) -> bool:
    """Whether a wrapper's part begins or divides the names of some weights."""
    return any(name.startswith(f"{part}.") or f".{part}." in name for name in names)


def _counted(names: set[str]) -> str:
    """A few of some names, and how many there are."""
    shown = ", ".join(sorted(names)[:SHOWN])
    if len(names) <= SHOWN:
        return f"{shown} {'is' if len(names) == 1 else 'are'}"
    return f"{len(names)} weights ({shown}, ...) are"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "one value"
