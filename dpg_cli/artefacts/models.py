"""The models of a finished run on disk: generator and target whole, the adapter of a LoRA target beside it, patch and picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dpg_cli.metrics.base import Pictured, TargetMetric
from dpg_cli.models.loading import LanguageModel, load_target, location, quiet_transformers
from dpg_cli.models.lora import is_adapted, merged_parameters
from dpg_cli.runs.files import replacing
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import ModelsConfig


def write_target(
    folder: RunFolder,
    target: LanguageModel,
    metric: TargetMetric,
    final: Mapping[str, torch.Tensor],
    models: ModelsConfig,
) -> None:
    """Save the fine-tuned target whole, the patch before and after, and its picture.

    A LoRA target is saved merged; its adapter goes beside it where the base alone, as it was named, would take it.

    Args:
        folder: of the run.
        target: θ_0, with its adapters if it has some; left as it is.
        metric: of the run.
        final: θ_T of what was trained, by parameter name.
        models: which models the run has.
    """
    patch = {}
    if isinstance(metric, Pictured):
        patch = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in metric.tensors(final).items()}
    adapted = is_adapted(target.model)
    whole = load_target(models, target.head.device) if adapted else target
    own = {name: parameter.detach().clone() for name, parameter in target.model.named_parameters() if name in final}
    try:
        with torch.no_grad():
            assign_parameters(whole.model, merged_parameters(target.model, final) if adapted else final)
        write_model(folder.target, whole, patch)
        if adapted and fits_base(target, final, models):
            assign_parameters(target.model, final)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a base that is no hub name
                target.model.peft_config["default"].base_model_name_or_path = location(models.target)
                write_model(folder.adapter, target)
    finally:
        assign_parameters(target.model, own)
    if isinstance(metric, Pictured):
        write_png(folder.image, metric.picture(final))


def fits_base(target: LanguageModel, final: Mapping[str, torch.Tensor], models: ModelsConfig) -> bool:
    """Whether the base, loaded by its name, takes the adapter: not a blank one, nor one whose head was untied here and is
    among what was trained."""
    head = target.model.get_output_embeddings().weight
    name = next(name for name, parameter in target.model.named_parameters() if parameter is head)
    module = name.partition(".base_layer.")[0].partition(".modules_to_save.")[0].removesuffix(".weight")
    touched = any(key.startswith(f"{module}.") for key in final)
    return models.target_init == "pretrained" and not (models.untie_target and touched)


def write_model(path: Path, language_model: LanguageModel, patch: Mapping[str, torch.Tensor] | None = None) -> None:
    """Save model and tokeniser so that AutoModelForCausalLM and AutoTokenizer load them, and a patch beside them."""
    with quiet_transformers(), replacing(path) as temporary:
        language_model.model.save_pretrained(temporary)
        language_model.tokenizer.save_pretrained(temporary)
        if patch:
            save_file(dict(patch), temporary / "patch.safetensors")


def write_png(path: Path, picture: Image.Image) -> None:
    """Write a picture."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


@torch.no_grad()
def assign_parameters(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Copy values into a model's parameters by name."""
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        parameters[name].copy_(value)
