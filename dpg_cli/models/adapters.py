"""Adapters (PEFT) on top of a model: merged into its weights, or refused."""

from __future__ import annotations

import warnings

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from dpg_cli.models.folder import ADAPTER, ADAPTER_WEIGHTS, ModelError, ModelFolder
from dpg_cli.models.hub import first_line, require


@torch.no_grad()
def merge(model: PreTrainedModel, folder: ModelFolder) -> PreTrainedModel:
    """The model with a folder's adapter merged into its weights.

    Args:
        model: the base, in the type that the sum is to be made in; changed in place.
        folder: with an adapter.

    Raises:
        ModelError: if the adapter is not whole, belongs to another model, or is of a kind that cannot be merged.
        UsageError: if peft is not installed.
    """
    assert folder.adapter is not None
    peft = require("peft", "peft", f"The model {folder.name!r} has an adapter ({ADAPTER}). Merging it")
    remedy = (
        "Merge it where it was trained (merge_and_unload) and name what save_pretrained writes; or name its base alone."
    )
    with safe_open(folder.adapter / ADAPTER_WEIGHTS, "np") as tensors:
        names = list(tensors.keys())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what matters of them is an error here
        try:
            config = peft.PeftConfig.from_pretrained(str(folder.adapter))
            whole = [part for part in config.modules_to_save or [] if not any(f".{part}." in name for name in names)]
            if whole:
                raise ModelError(
                    f"The adapter of {folder.name} lacks the weights of {whole[0]}, which it says it has.", remedy
                )
            if config.is_prompt_learning:
                raise ModelError(
                    f"The adapter of {folder.name} is a prompt ({config.peft_type.value}), not a change of weights.",
                    remedy,
                )
            wrapped = peft.PeftModel(model, config)
            result = wrapped.load_adapter(str(folder.adapter), "default", torch_device="cpu")
            odd = [*result.missing_keys, *result.unexpected_keys]
            if odd:
                verb = "lacks" if result.missing_keys else "has, where the base knows none,"
                raise ModelError(f"The adapter of {folder.name} does not fit its base: it {verb} {odd[0]}.", remedy)
            merged = wrapped.merge_and_unload(safe_merge=True)  # refuses NaN
        except ModelError:
            raise
        except Exception as error:  # whatever a library raises on a file of the user's
            raise ModelError(
                f"The adapter of {folder.name} cannot be loaded and merged: {first_line(error)}.", remedy
            ) from error
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False
    return merged.requires_grad_(True)
