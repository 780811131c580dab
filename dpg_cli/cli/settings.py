"""From the options of `dpg run` to the settings of a run; `dpg check` takes the same options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpg_cli.cli.metric_flags import FLAGS, check_flags, custom_settings, metric_name, note_change, origin
from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.escape import pasted

if TYPE_CHECKING:
    from dpg_cli.settings.config import Config

METRIC_OPTIONS = {  # option -> key of the metric's section
    "text": "text",
    "qr_version": "version",
    "error_correction": "error_correction",
    "language": "language",
    "uuid": "uuid",
    "parameter": "parameter",
}
SETTING_FLAGS = {"seed": "--seed", "device": "--device"}
OPTIONS = (  # every option that makes settings
    *("task", "scale", "config", "overrides", "total_examples", "seed", "device", "trainer"),
    *("image", "patch_origin", "eval_text", "generator", "target", "prompts", "metric"),
    *METRIC_OPTIONS,
)


def settings_of(options: Mapping[str, Any]) -> Config:
    """The settings of preset, file, flags and overrides.

    Args:
        options: those of `dpg run` by name, at least those in `OPTIONS`.

    Raises:
        UsageError: for whatever does not fit; `ConfigError` names all faults of the settings together.
    """
    total = options["total_examples"]
    settings = _resolved(
        options["task"], options["scale"], options["config"], _flags(options), options["overrides"] or []
    )
    return settings if total is None else _at_total(settings, total)


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """The nested settings that dedicated flags make; those not given are left out."""
    from dpg_cli.data.sources import absolute
    from dpg_cli.runs.folder import OWN_PROMPTS, OWN_TEXTS

    image, corner, eval_text, prompts = (options[name] for name in ("image", "patch_origin", "eval_text", "prompts"))
    metric = {
        **{key: options[name] for name, key in METRIC_OPTIONS.items()},
        "image": None if image is None else str(image.resolve()),
        "origin": None if corner is None else origin(corner),
        "file": eval_text if eval_text is None or eval_text in OWN_TEXTS else absolute(eval_text),
        **custom_settings(options["metric"]),
    }
    flags: dict[str, Any] = {
        "seed": options["seed"],
        "device": options["device"],
        "trainer": options["trainer"],
        "models": {**_model("generator", options["generator"]), **_model("target", options["target"])},
        "prompts": {} if prompts is None else {"source": prompts if prompts in OWN_PROMPTS else absolute(prompts)},
        "metric": {key: value for key, value in metric.items() if value is not None},
    }
    return {key: value for key, value in flags.items() if value not in (None, {})}


def _model(role: str, name: str | None) -> dict[str, str]:
    """Settings of a model that a flag names: its own weights, whatever the preset begins with."""
    if name is None:
        return {}
    return {role: model_place(name), f"{role}_init": "pretrained"}


def model_place(name: str) -> str:
    """A model's name as settings keep it: a folder by its full path, whatever folder a command is given in."""
    from dpg_cli.models.embedded import EMBEDDED

    path = Path(name).expanduser()
    return str(path.resolve()) if name not in EMBEDDED and path.exists() else name


def _resolved(task: str | None, scale: str, file: Path | None, flags: dict[str, Any], overrides: list[str]) -> Config:
    """Preset, then file, then flags, then overrides."""
    from dpg_cli.runs.folder import resolve_paths
    from dpg_cli.settings.config import load_toml
    from dpg_cli.settings.presets import find_task, merge, resolve

    data: dict[str, Any] = {}
    if task is None and file is None:
        raise UsageError("Nothing to run: neither a task nor --config is given.", "For example: dpg run qr-embed")
    if task is not None:
        data = find_task(task, scale).data()
    if file is not None:
        loaded = resolve_paths(load_toml(file), file.resolve().parent)
        if task is not None and loaded.get("task", task) != task:
            raise UsageError(f"{file} is for the task {loaded['task']!r}, not {task!r}.", "Leave the task out.")
        if task is None and "task" not in loaded:
            raise UsageError(f"{file} names no task.", f"Name it: dpg run TASK --config {pasted(file)}")
        note_change(loaded.get("metric", {}), flags.get("metric", {}))
        data = merge(data, loaded)
    check_flags(flags.get("metric", {}), metric_name(data, overrides), task or str(data["task"]))
    try:
        return resolve(data, overrides, flags)
    except ConfigError as error:
        raise named_as_typed(error, flags, overrides) from None


def named_as_typed(error: ConfigError, flags: dict[str, Any], overrides: list[str]) -> ConfigError:
    """The same faults, with the flag in front where a flag gave the value (and no `--set` came after it)."""
    typed = {key: flag for key, flag in SETTING_FLAGS.items() if key in flags}
    typed |= {f"models.{role}": f"--{role}" for role in ("generator", "target") if role in flags.get("models", {})}
    typed |= {"prompts.source": "--prompts"} if "prompts" in flags else {}
    typed |= {f"metric.{key}": FLAGS[key][0] for key in flags.get("metric", {}) if key in FLAGS}
    typed = {key: flag for key, flag in typed.items() if not any(text.startswith(f"{key}=") for text in overrides)}

    def named(fault: str) -> str:
        key = fault.partition(":")[0]
        flag = next((flag for known, flag in typed.items() if key == known or key.startswith(f"{known}.")), None)
        return fault if flag is None else f"{flag} ({key}){fault.removeprefix(key)}"

    faults = [named(fault) for fault in error.faults]
    remedy = "See `dpg run --help`." if all(fault.startswith("--") for fault in faults) else error.remedy
    return ConfigError(faults, remedy)


def _at_total(settings: Config, total: int) -> Config:
    """The same settings with as many outer steps as use that many completions in all."""
    if total < settings.examples_per_step:
        raise UsageError(
            f"--total-examples {total} is less than the {settings.examples_per_step} completions of one outer step.",
            "Lower prompts.per_step, or give more.",
        )
    return settings.model_copy(update={"steps": round(total / settings.examples_per_step)})
