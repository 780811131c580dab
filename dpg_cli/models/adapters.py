"""Adapters (PEFT) on top of a model: merged into its weights, or refused."""

from __future__ import annotations

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
    try:
        config = peft.PeftConfig.from_pretrained(str(folder.adapter))
        wrapped = peft.PeftModel(model, config)
        result = wrapped.load_adapter(str(folder.adapter), "default", torch_device="cpu")
    except Exception as error:  # whatever a library raises on a file of the user's
        raise ModelError(f"The adapter of {folder.name} cannot be loaded: {first_line(error)}.", remedy) from error
    with safe_open(folder.adapter / ADAPTER_WEIGHTS, "np") as tensors:
        names = list(tensors.keys())
    whole = [part for part in config.modules_to_save or [] if not any(f".{part}." in name for name in names)]
    odd = [*result.missing_keys, *whole, *result.unexpected_keys]
    if odd:
        lacking = "lacks" if result.missing_keys or whole else "has, for a model that knows none,"
        raise ModelError(f"The adapter of {folder.name} does not fit its base: it {lacking} {odd[0]}.", remedy)
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise ModelError(
            f"The adapter of {folder.name} is of a kind that cannot be merged ({config.peft_type}).", remedy
        )
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:  # as above; NaN in the adapter is among it
        raise ModelError(f"The adapter of {folder.name} cannot be merged: {first_line(error)}.", remedy) from error
    if merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False
    return merged.requires_grad_(True)
