"""LoRA targets: adapters beside a frozen base, as PEFT makes them. The base needs no state, no tangent and no adjoint.

    W' = W + s B A,   A (r, in) random, B (out, r) zero,   s = α / r, or α / √r (rsLoRA)

B = 0 at first, so that A has no gradient in the first step and B's first update is nearly sign(g) where ε is small.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpg_cli.errors import UsageError, suggestion
from dpg_cli.models.hub import first_line, require

ADAPTER = "default"


@dataclass(frozen=True)
class Lora:
    """What is trained in place of the weights.

    Attributes:
        rank: r.
        alpha: α.
        modules: names (or ends of names) of the linear maps that get adapters; "all-linear" for all but the LM head.
        rslora: scale by α / √r.
        save: modules that are trained whole beside the adapters, such as the LM head.
    """

    rank: int = 8
    alpha: float = 16.0
    modules: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    save: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Any) -> Lora:
        """Of settings with the same names, such as `[lora]` of a run."""
        return cls(*(getattr(settings, field.name) for field in fields(cls)))


def require_modules(names: Iterable[str], wanted: Iterable[str], role: str) -> None:
    """Refuse modules that a model does not have.

    Args:
        names: of the model's modules.
        wanted: names or ends of names; "all-linear" is always there.
        role: of the model, generator or target.

    Raises:
        UsageError: naming the first that is missing, and what there is.
    """
    known = [name for name in names if name]
    for part in wanted:
        if part != "all-linear" and not any(name == part or name.endswith(f".{part}") for name in known):
            ends = sorted({name.rpartition(".")[2] for name in known if not name.rpartition(".")[2].isdigit()})
            raise UsageError(f"The {role} has no module {part!r}.", suggestion(part, ends, "It has"))


def adapt(model: PreTrainedModel, lora: Lora, seed: int, role: str = "target") -> nn.Module:
    """The model with fresh adapters, the only parameters that are trained.

    Args:
        model: changed in place: its maps are wrapped.
        lora: the adapters.
        seed: of A; what TRL's SFTTrainer makes of its own seed.
        role: of the model, for people.

    Raises:
        UsageError: if peft is not installed, or a module is not there.
    """
    peft = require("peft", "peft", f"A LoRA {role}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=lora.modules[0] if lora.modules == ("all-linear",) else list(lora.modules),
        use_rslora=lora.rslora,
        modules_to_save=list(lora.save) or None,
        lora_dropout=0.0,
    )
    require_modules([name for name, _ in model.named_modules()], (*lora.modules, *lora.save), role)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D's transposed weights, which it then treats rightly
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)
        except ValueError as error:
            raise UsageError(
                f"The {role} cannot have these adapters: {first_line(error)}.", "Name linear maps."
            ) from None


def is_adapted(model: nn.Module) -> bool:
    """Whether this is what `adapt` gave."""
    return hasattr(model, "peft_config")


def without_adapters(model: nn.Module) -> nn.Module:
    """A model without adapters: itself where it has none, else a copy with them merged into its weights."""
    if not is_adapted(model):
        return model
    copied: Any = copy.deepcopy(model)
    merged = copied.merge_and_unload(safe_merge=True)
    return merged.requires_grad_(True)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without those of its adapters, by their names in the base."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    if not is_adapted(model):
        return state
    prefix = next(f"{name}." for name, module in model.named_modules() if module is _base(model))
    return {
        name.removeprefix(prefix).replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def shell_of(model: nn.Module) -> nn.Module:
    """The model's modules without its weights, to be lent merged ones; to be made before `adapt`."""
    places = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, dict(places))


def merged_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the merged model by the names that they have in the base, differentiable by the adapters.

    Args:
        model: what `adapt` gave.
        parameters: adapters (and modules trained whole) by name; the model's own for those that are not given.

    Raises:
        UsageError: for adapters that are no plain LoRA of linear maps.
    """
    own = dict(model.named_parameters())
    prefix = next(f"{name}." for name, module in model.named_modules() if module is _base(model))
    merged: dict[str, Tensor] = {}
    for name, value in own.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.removeprefix(prefix).replace(".base_layer.", ".").replace(f".modules_to_save.{ADAPTER}.", ".")
        merged[plain] = parameters.get(name, value)
    for path, module in model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        layer: Any = module
        first, second = f"{path}.lora_A.{ADAPTER}.weight", f"{path}.lora_B.{ADAPTER}.weight"
        if first not in own or second not in own or getattr(layer, "use_dora", {}).get(ADAPTER):
            raise UsageError(f"The adapter of {path} is no plain LoRA of a linear map.", "Merge it first.")
        change = parameters.get(second, own[second]) @ parameters.get(first, own[first])
        change = change.mT if layer.fan_in_fan_out else change
        plain = f"{path.removeprefix(prefix)}.weight"
        merged[plain] = merged[plain] + layer.scaling[ADAPTER] * change
    return merged


def _base(model: Any) -> nn.Module:
    return model.get_base_model()


@contextmanager
def holding(shell: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within this context the shell's weights are these tensors, graphs included."""
    named = {id(parameter): name for name, parameter in shell.named_parameters()}
    places = [
        (module._parameters, key, parameter)
        for module in shell.modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for slots, key, parameter in places:
            slots[key] = weights[named[id(parameter)]]  # type: ignore[assignment]
        yield
    finally:
        for slots, key, parameter in places:
            slots[key] = parameter
