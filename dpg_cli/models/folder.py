"""A model's folder, looked at before anything is loaded from it: what it is, and whether its files are whole.

Reads JSON and the headers of safetensors files. Nothing is unpickled and no code of a folder is run: pickles, code and
quantised weights are refused here, each with what to do about it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpg_cli.errors import UsageError
from dpg_cli.models.hub import first_line, snapshot

CONFIG, INDEX, WEIGHTS = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "consolidated*.pth", "*.ckpt", "model.bin")
FOREIGN = ("megatron_config", "corda_config", "lora_ga_config", "eva_config", "auto_mapping")  # of adapter_config.json
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
LARGEST_JSON = 200_000_000  # bytes: the tokenisers and indices of the largest models have a tenth of it
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
ROUNDED = ("F8", "F6", "F4")  # beginnings of types that hold quantised weights alone
WRONG = "Name a folder that save_pretrained wrote."


class ModelError(UsageError):
    """A model that cannot be loaded, or that is not what it should be."""


@dataclass(frozen=True)
class ModelFolder:
    """A folder that can be loaded, as far as its files tell.

    Attributes:
        name: how the user named it.
        path: of config.json and the weights.
        config: what config.json holds.
        adapter: a PEFT folder that belongs on top of it, or None.
        tokenizer: the folder with the tokeniser.
    """

    name: str
    path: Path
    config: dict[str, Any]
    adapter: Path | None
    tokenizer: Path


def find(name: str, place: str | None = None) -> Path:
    """The folder that a model's name stands for: a hub model's is fetched first.

    Args:
        name: how the user named it.
        place: where it lies, if that is known already.

    Raises:
        ModelError: if it is no folder, or cannot be fetched.
    """
    if place is not None:
        return Path(place)
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or path.exists():
        if path.is_file():
            raise ModelError(f"{name} is a file, and a model is a folder.", _of_file(path))
        return path
    return snapshot(name)


def _of_file(path: Path) -> str:
    """What to do instead of naming a file as the model."""
    if path.suffix.lower() == ".gguf":
        return gguf_command(path.parent, path.name)
    return f"Name its folder, {shlex.quote(str(path.parent))}, if it holds a config.json."


def examine(name: str, path: Path, *, weights: bool = True) -> ModelFolder:
    """Look at a model's folder.

    Args:
        name: how the user named it.
        path: the folder.
        weights: whether its weights will be read; a blank model needs none.

    Raises:
        ModelError: with the cause and the remedy, for whatever cannot be loaded.
    """
    adapter = path if (path / ADAPTER).is_file() else None
    base = path
    if adapter is not None and not (path / CONFIG).is_file():
        base = _base_of(name, path)
    if not (base / CONFIG).is_file():
        raise ModelError(f"{name} is no model folder: it has no config.json.", _instead_of(path))
    config = read_json(base / CONFIG)
    _refuse_code(name, config)
    if weights:
        _refuse_quantised(name, base, config)
        _require_weights(name, base)
        if adapter is not None:
            _require_adapter(name, adapter)
    _check_ends(base / "generation_config.json")
    own = adapter is not None and any((adapter / file).is_file() for file in TOKENIZERS)
    return ModelFolder(name, base, config, adapter if weights else None, adapter if own and adapter else base)


def _check_ends(path: Path) -> None:
    """Refuse generation settings that do not say which tokens end a text: transformers would pass over them in silence."""
    if not path.is_file():
        return
    ids = read_json(path).get("eos_token_id")
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in listed):
        raise ModelError(
            f"{path}: eos_token_id is {str(ids)[:60]}, which is no token id.", "Correct it, or remove the file."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        ModelError: if it cannot be read, or is no object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ModelError(f"{path} is larger than any such file.", "Take the folder from a copy.")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", "Check the file.") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is no JSON: {first_line(error)}.", "Take it from a copy of the folder.") from None
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds no JSON object.", "Take it from a copy of the folder.")
    return data


def shard_files(path: Path) -> list[Path]:
    """The safetensors files of a folder that transformers would read: the one file, or those that the index names."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        return []
    return [path / name for name in sorted(set(_weight_map(path).values()))]


def _weight_map(path: Path) -> dict[str, str]:
    """The index: tensor -> file beside it."""
    index = path / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no proper weight_map.", "Take the folder from a copy.")
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names {name!r}, which is no safetensors file beside it.", "Do not use it.")
    return names


def _base_of(name: str, path: Path) -> Path:
    """The folder of the model that an adapter was trained on."""
    base = read_json(path / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise ModelError(
            f"{name} is an adapter (PEFT), and its {ADAPTER} does not name the model that it belongs to.",
            f"Put that model's folder into it: base_model_name_or_path in {path / ADAPTER}.",
        )
    beside = path / base
    try:
        found = beside if (beside / CONFIG).is_file() else find(base)
    except Exception as error:  # also of the hub library
        raise _no_base(name, path, base) from error
    if not (found / CONFIG).is_file() or (found / ADAPTER).is_file():
        raise _no_base(name, path, base)
    return found


def _no_base(name: str, path: Path, base: str) -> ModelError:
    """What an adapter without its base is refused with."""
    return ModelError(
        f"{name} is an adapter (PEFT) to the model {base!r}, which is not on this machine as a plain model folder.",
        f"Fetch that model, and put its folder into base_model_name_or_path of {path / ADAPTER}; or merge the adapter "
        "where the model is (merge_and_unload) and name what save_pretrained writes.",
    )


def _instead_of(path: Path) -> str:
    """What to name instead of a folder without config.json."""
    if not path.is_dir():
        return "There is no such folder."
    if (path / "config.toml").is_file():
        own = next((path / role for role in ("target", "generator") if (path / role / CONFIG).is_file()), None)
        return "It is a run: " + ("it has no models yet." if own is None else f"name {own}.")
    inner = sorted((entry for entry in path.glob("*/config.json")), key=lambda entry: entry.stat().st_mtime)
    if inner:
        return f"A folder inside has one: name {inner[-1].parent}."
    gguf = sorted(path.glob("*.gguf"))
    return gguf_command(path, gguf[0].name) if gguf else WRONG


def _refuse_code(name: str, config: dict[str, Any]) -> None:
    """Refuse a model whose class only its own folder has."""
    from transformers import CONFIG_MAPPING, __version__

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise ModelError(f"The config.json of {name} does not say which model_type it is.", WRONG)
    if kind in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        raise ModelError(
            f"The model {name!r} is made by code of its own (auto_map, model_type {kind!r}), which dpg never runs.",
            "Take a version of it for a class of transformers, if there is one: its model_type is then a known one.",
        )
    raise ModelError(
        f"The config.json of {name} has the model_type {kind!r}, which transformers {__version__} does not know.",
        "Correct it, or take the transformers release that brought it.",
    )


def _refuse_quantised(name: str, path: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are rounded to a few bits: fine-tuning needs them in floating point."""
    settings = config.get("quantization_config") or config.get("compression_config")
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict):
        method = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else None
    raise ModelError(
        f"The model {name!r} is quantised ({str(method or 'quantization_config')[:40]}): "
        "what fine-tuning would move is not in its files.",
        "Name the model that it was made from; or, where its quantiser is installed, write it out in floating point: "
        + command(".dequantize()", path, f"{path}-float"),
    )


def _require_weights(name: str, path: Path) -> None:
    """Refuse a folder whose weights are missing, cut short, or in another form than safetensors."""
    files = shard_files(path)
    if not files:
        raise _without_safetensors(name, path)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"The folder {name} is not whole: {missing[0]}{more}, which {INDEX} names, is missing.",
            "Copy it again, or wait until it is written.",
        )
    seen: dict[str, str] = {}
    for file in files:
        for tensor, kind in _header(name, file).items():
            if tensor in seen and not _same(path / seen[tensor], file, tensor):
                raise ModelError(
                    f"The folder {name} is a mix: {seen[tensor]} and {file.name} hold different values of {tensor}.",
                    "Take the folder from a copy.",
                )
            seen[tensor] = file.name
            if kind not in FLOATS and (kind.startswith(ROUNDED) or tensor.endswith(("weight", "weight_packed"))):
                raise ModelError(
                    f"The model {name!r} is quantised: {tensor} is of type {kind}, and config.json does not say how.",
                    "Name the model that it was made from.",
                )
    if files[0].name != WEIGHTS:
        odd = next((tensor for tensor in _weight_map(path) if tensor not in seen), None)
        if odd is not None:
            raise ModelError(
                f"The folder {name} is a mix: {INDEX} says that {odd} is in {_weight_map(path)[odd]}, which it is not.",
                "Take the folder from a copy.",
            )


def _header(name: str, file: Path) -> dict[str, str]:
    """Types of the tensors of a safetensors file, by name."""
    try:
        with safe_open(file, "np") as tensors:
            return {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        reason = first_line(error).removeprefix("Error while deserializing header: ")
        raise ModelError(
            f"The folder {name} is not whole: {file.name} is cut short or damaged ({reason}).",
            "Copy it again, or wait until it is written.",
        ) from None
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {first_line(error)}.", "Check the file.") from None


def _same(first: Path, second: Path, tensor: str) -> bool:
    """Whether two files hold the same values under a name."""
    import torch

    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        return torch.equal(one.get_tensor(tensor), other.get_tensor(tensor))


def _without_safetensors(name: str, path: Path) -> ModelError:
    """What a folder without safetensors weights is refused with."""
    pickles = sorted({file.name for pattern in PICKLES for file in path.glob(pattern)})
    gguf = sorted(path.glob("*.gguf"))
    if pickles:
        return ModelError(
            f"{name} holds its weights as a pickle ({pickles[0]}), which is not opened: loading one can run any code.",
            pickle_remedy(path),
        )
    if gguf:
        return ModelError(f"{name} holds its weights as GGUF ({gguf[0].name}).", gguf_command(path, gguf[0].name))
    return ModelError(f"{name} has a config.json, but no weights: there is no {WEIGHTS} and no {INDEX}.", WRONG)


def _require_adapter(name: str, path: Path) -> None:
    """Refuse an adapter whose weights are not there, or that would have peft import a module or open a further file."""
    settings = read_json(path / ADAPTER)
    odd = next((key for key in FOREIGN if settings.get(key)), None)
    if odd is not None:
        raise ModelError(
            f"The adapter of {name} asks for more than its weights ({odd} in {ADAPTER}), which dpg does not open.",
            "Merge it where it was trained (merge_and_unload) and name what save_pretrained writes.",
        )
    if (path / ADAPTER_WEIGHTS).is_file():
        _header(name, path / ADAPTER_WEIGHTS)
        return
    if (path / "adapter_model.bin").is_file():
        raise ModelError(
            f"{name} holds an adapter (PEFT) as a pickle, which is not opened: loading one can run any code.",
            f"Save the adapter again with a present release of peft, which writes {ADAPTER_WEIGHTS}.",
        )
    remedy = f"Put it there; or, where it was merged already, remove {path / ADAPTER}."
    raise ModelError(f"{name} has an {ADAPTER}, but no {ADAPTER_WEIGHTS}.", remedy)


def command(then: str, source: Path, to: str, options: str = 'dtype="auto"') -> str:
    """A command that loads a model by transformers and saves it in floating point, as it can be pasted."""
    code = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({_literal(source)}, {options})"
    return f"python -c {shlex.quote(f'{code}{then}.save_pretrained({_literal(to)})')}"


def pickle_remedy(folder: Path) -> str:
    """What to do with a folder of pickled weights."""
    options = 'use_safetensors=False, dtype="auto"'
    return f"If you trust it, write safetensors beside it: {command('', folder, str(folder), options)}"


def gguf_command(folder: Path, file: str) -> str:
    """What to do with a GGUF file."""
    to = str(folder / file).removesuffix(".gguf") + "-float"
    loads = "; ".join(
        f"{kind}.from_pretrained({_literal(folder)}, gguf_file={_literal(file)}).save_pretrained({_literal(to)})"
        for kind in ("AutoModelForCausalLM", "AutoTokenizer")
    )
    code = f"from transformers import AutoModelForCausalLM, AutoTokenizer; {loads}"
    return f"Write it out in floating point (pip install gguf) and name the new folder: python -c {shlex.quote(code)}"


def _literal(value: object) -> str:
    """A text as Python code, in double quotes: the command around it has single ones."""
    return json.dumps(str(value), ensure_ascii=False)
