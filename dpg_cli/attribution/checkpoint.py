"""A warm start: weights, optimiser state and step of a run that was stopped, mapped to the parameters of ours or refused.

    FOLDER             a checkpoint of the transformers Trainer (and of TRL's): model.safetensors or adapter_model.safetensors,
                       optimizer.pt, trainer_state.json, and scheduler.pt where it is there
    FILE.safetensors   `weights/NAME`, `m/NAME`, `v/NAME` by parameter name, and the metadata `step`: of a loop of one's own

optimizer.pt and scheduler.pt are read by `torch.load(weights_only=True)`, which builds tensors and plain values and runs
nothing. The Trainer counts parameters, group after group: first those that decay, then biases and norms. What the
checkpoint says of its recipe must be what the recipe here says.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpg_cli.engine.inner.recipe import Recipe
from dpg_cli.engine.inner.recipe.groups import TRAINER, undecayed
from dpg_cli.engine.inner.start import Start
from dpg_cli.errors import UsageError
from dpg_cli.models.hub import require
from dpg_cli.runs.files import os_reason, reading
from dpg_cli.settings.config import LoraConfig, shown

WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer", None)}
CLOSE = 1e-9  # relative difference of two learning rates that are one


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and fits.

    Attributes:
        start: step and optimiser state, by parameter name.
        note: what was found, in a sentence.
    """

    start: Start
    note: str


def read_checkpoint(path: Path, model: nn.Module, recipe: Recipe, steps: int, lora: LoraConfig) -> Checkpoint:
    """Read a checkpoint, and give the model its weights.

    Args:
        path: of the folder or file.
        model: as it will be trained, adapters included; its weights are replaced in place.
        recipe: of the whole run.
        steps: T of the whole run.
        lora: the adapters' settings.

    Raises:
        UsageError: for whatever is missing, damaged, or does not map to this model and recipe, naming it.
    """
    if path.is_dir():
        return _of_trainer(path, model, recipe, steps, lora)
    if path.suffix == ".safetensors" and path.is_file():
        return _of_file(path, model, steps)
    raise UsageError(
        f"{path} is no checkpoint.",
        "Name a checkpoint folder of the transformers Trainer, or a .safetensors file (docs/recipes.md).",
    )


def _of_file(path: Path, model: nn.Module, steps: int) -> Checkpoint:
    tensors, about = _tensors(path)
    try:
        step = int(about["step"])
    except (KeyError, ValueError):
        raise UsageError(f"{path} does not say its step.", "Save it with metadata={'step': '120'}.") from None
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "m": {}, "v": {}}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        if part not in parts:
            raise UsageError(f"{path} has a tensor {name!r}.", "Names are weights/NAME, m/NAME and v/NAME.")
        parts[part][own] = tensor
    _require_left(step, steps, path)
    _load(model, parts["weights"], path)
    return Checkpoint(Start(step, parts["m"], parts["v"]), _said(path, step, steps))


def _of_trainer(folder: Path, model: nn.Module, recipe: Recipe, steps: int, lora: LoraConfig) -> Checkpoint:
    state = _json(folder / "trainer_state.json")
    try:
        step, total = int(state["global_step"]), int(state["max_steps"])
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{folder / 'trainer_state.json'} does not say its steps.", "Name another checkpoint."
        ) from None
    _require_left(step, steps, folder)
    faults = [] if total == steps else [f"its run has {total} steps in all, this recipe has {steps}"]
    saved = _plain(folder / "optimizer.pt")
    names, groups = _groups(saved, model, folder)
    faults += _against_recipe(groups, names, model, recipe)
    if (folder / "scheduler.pt").exists():
        faults += _against_schedule(_plain(folder / "scheduler.pt"), recipe, step, steps)
    if lora.rank:
        faults += _against_adapters(_json(folder / "adapter_config.json"), lora)
    if faults:
        raise UsageError(
            f"{folder} was trained by another recipe: {'; '.join(faults)}.", "Give its recipe by --recipe or by flags."
        )
    m, v = _moments(saved, [name for group in names for name in group], model, recipe.optimizer.name, step, folder)
    if lora.rank:
        _load_adapters(model, folder)
    else:
        _load(model, _weights(folder), folder)
    return Checkpoint(Start(step, m, v), _said(folder, step, steps))


def _said(path: Path, step: int, steps: int) -> str:
    return f"{path}: {step:,} of {steps:,} steps are made; the others are attributed, from its weights and optimiser state."


def _require_left(step: int, steps: int, path: Path) -> None:
    if not 0 <= step < steps:
        raise UsageError(
            f"{path} is of step {step:,}, and the recipe has {steps:,} steps in all: none is left to attribute.",
            "Give the recipe of the whole run, or an earlier checkpoint.",
        )


def _groups(saved: Any, model: nn.Module, folder: Path) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The parameters' names, group by group in the Trainer's order, and what the groups say.

    Raises:
        UsageError: if there are other groups, or of other sizes.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    bare = undecayed(model, TRAINER)
    names = [[name for name in trained if name not in bare], [name for name in trained if name in bare]]
    try:
        groups = [dict(group) for group in saved["param_groups"]]
        counted = [len(group["params"]) for group in groups]
        numbers = [number for group in groups for number in group["params"]]
    except (KeyError, TypeError, ValueError):
        raise UsageError(
            f"{folder / 'optimizer.pt'} holds no state of an optimiser.", "Name another checkpoint."
        ) from None
    if counted != [len(group) for group in names] or numbers != list(range(len(trained))):
        raise UsageError(
            f"{folder / 'optimizer.pt'} has groups of {', '.join(map(str, counted))} parameters; the Trainer's for this model "
            f"would have {len(names[0])} (decaying) and {len(names[1])} (biases and norms).",
            "Train the same parameters (--lora, inner.groups); a run by an optimiser of one's own is saved as .safetensors "
            "(docs/recipes.md).",
        )
    return names, groups


def _against_recipe(
    groups: list[dict[str, Any]], names: list[list[str]], model: nn.Module, recipe: Recipe
) -> list[str]:
    """What the groups say that the recipe does not."""
    spec, faults = recipe.optimizer, []
    if spec.name == "muon":
        return ["muon's state is not read from a Trainer's checkpoint"]
    given = recipe.settings(model) or {}
    wanted = {
        "eps": ("eps", spec.eps),
        "momentum": ("momentum", spec.momentum),
        "nesterov": ("nesterov", spec.nesterov),
    }
    for group, own in zip(groups, names, strict=True):
        for key, (name, value) in wanted.items():
            if own and key in group and group[key] != value:
                faults.append(f"inner.{name} is {shown(group[key])} there and {shown(value)} here")
        if own and "betas" in group and tuple(group["betas"]) != (spec.beta1, spec.beta2):
            faults.append(f"betas are {shown(tuple(group['betas']))} there and {(spec.beta1, spec.beta2)} here")
        peak, decay = group.get("initial_lr", group.get("lr")), group.get("weight_decay", 0.0)
        for parameter in own:
            lr, own_decay = given.get(parameter, (spec.lr, spec.weight_decay))
            if peak is not None and not math.isclose(lr, peak, rel_tol=CLOSE):
                faults.append(f"the learning rate of {parameter} is {shown(peak)} there and {shown(lr)} here")
                break
            if decay != own_decay:
                faults.append(f"the weight decay of {parameter} is {shown(decay)} there and {shown(own_decay)} here")
                break
        faults += [f"{key} is on" for key in ("amsgrad", "maximize") if own and group.get(key)]
        if own and group.get("dampening"):
            faults.append(f"dampening is {shown(group['dampening'])}")
    return list(dict.fromkeys(faults))


def _against_schedule(saved: Any, recipe: Recipe, step: int, steps: int) -> list[str]:
    """What the scheduler's state says that the schedule does not."""
    try:
        last, rates = int(saved["last_epoch"]), [float(rate) for rate in saved["_last_lr"]]
    except (KeyError, TypeError, ValueError):
        return []
    faults = [] if last == step else [f"its schedule is at step {last}, its run at {step}"]
    if recipe.groups.own:
        return faults
    ours = recipe.schedule.rates(steps, recipe.optimizer.lr)[step]
    if any(not math.isclose(ours, rate, rel_tol=CLOSE, abs_tol=1e-15) for rate in rates):
        faults.append(f"the learning rate of step {step} is {rates[0]:.6g} there and {ours:.6g} here")
    return faults


def _against_adapters(saved: dict[str, Any], lora: LoraConfig) -> list[str]:
    """What the adapters' settings say that ours do not."""
    pairs = (("r", "rank", lora.rank), ("lora_alpha", "alpha", lora.alpha), ("use_rslora", "rslora", lora.rslora))
    return [
        f"lora.{name} is {shown(saved.get(key))} there and {shown(value)} here"
        for key, name, value in pairs
        if saved.get(key) != value
    ]


def _moments(
    saved: Any, names: list[str], model: nn.Module, optimizer: str, step: int, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """m and v by parameter name.

    Raises:
        UsageError: for another optimiser's state, other shapes, or another count of updates.
    """
    parameters, file = dict(model.named_parameters()), folder / "optimizer.pt"
    first, second = MOMENTS[optimizer]
    m: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    for number, entry in saved["state"].items():
        name = names[number]
        for key, to in ((first, m), (second, v)):
            if key is None:
                continue
            value = entry.get(key)
            if value is None and optimizer == "sgd":  # without momentum there is none
                continue
            if not isinstance(value, Tensor) or value.shape != parameters[name].shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else "nothing"
                raise UsageError(
                    f"{file}: {key} of {name} is {shape}; the parameter has the shape {tuple(parameters[name].shape)}.",
                    "Name the target, optimiser and adapters that the checkpoint's run had.",
                )
            to[name] = value
        if second is not None and int(entry.get("step", -1)) != step:
            raise UsageError(
                f"{file}: {name} was updated {int(entry.get('step', -1))} times by step {step}.",
                "Steps that were left out cannot be followed; name another checkpoint.",
            )
    missing = [name for number, name in enumerate(names) if number not in saved["state"]]
    if missing and saved["state"]:
        raise UsageError(f"{file} has no state of {missing[0]}.", "It had no gradient there: freeze it (inner.groups).")
    return m, v


def _weights(folder: Path) -> dict[str, Tensor]:
    """The model's weights, of one file or of several."""
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        files = sorted({str(name) for name in _json(index).get("weight_map", {}).values()})
        if any(Path(name).name != name for name in files):
            raise UsageError(f"{index} names files outside its folder.", "Name another checkpoint.")
        found: dict[str, Tensor] = {}
        for name in files:
            found |= _tensors(folder / name)[0]
        return found
    return _tensors(folder / WEIGHTS)[0]


@torch.no_grad()
def _load(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give a model these weights; tied ones may be named once.

    Raises:
        UsageError: for a parameter without weights, or weights without a parameter.
    """
    state = model.state_dict(keep_vars=True)
    odd = next((name for name in weights if name not in state), None)
    if odd is not None:
        raise UsageError(f"{path} has weights {odd!r}, which the target has not.", "Name the target of its run.")
    given = {id(state[name]) for name in weights}
    for name, parameter in model.named_parameters():
        if id(parameter) not in given:
            raise UsageError(f"{path} lacks the weights {name!r}.", "Name the target of its run.")
    for name, value in weights.items():
        if value.shape != state[name].shape:
            raise UsageError(
                f"{path}: {name} has the shape {tuple(value.shape)}, in the target {tuple(state[name].shape)}.",
                "Name the target of its run.",
            )
        state[name].copy_(value)


def _load_adapters(model: nn.Module, folder: Path) -> None:
    """Give the model the adapters of a checkpoint.

    Raises:
        UsageError: if they are not those that it has.
    """
    peft = require("peft", "peft", "A checkpoint of adapters")
    tensors, _ = _tensors(folder / ADAPTER_WEIGHTS)
    try:
        result = peft.set_peft_model_state_dict(model, tensors)
    except RuntimeError as error:
        raise UsageError(
            f"The adapters of {folder} do not fit: {str(error).splitlines()[-1].strip()}",
            "Give its --lora and lora.modules.",
        ) from None
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    odd = [*result.unexpected_keys, *(name for name in result.missing_keys if name in trained)]
    if odd:
        raise UsageError(f"The adapters of {folder} do not fit: {odd[0]}.", "Give its --lora and lora.modules.")


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, and its metadata."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except SafetensorError:
        raise UsageError(f"{path} is no safetensors file.", "Name another checkpoint.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {os_reason(error)}.", "Name a whole checkpoint.") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        with reading(path):
            found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no JSON object.", "Name another checkpoint.")
    return found


def _plain(path: Path) -> Any:
    """Tensors and plain values of a file of torch."""
    try:
        with reading(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise UsageError(
            f"{path} holds more than tensors and plain values, or is damaged: it is not read.",
            "Save the state as .safetensors (docs/recipes.md).",
        ) from None
