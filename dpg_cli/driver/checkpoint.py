"""Checkpoints: `RUN/checkpoints/step-N/` holds what a bit-identical resume on the CPU needs after N outer steps.

    generator.safetensors   trainable parameters
    optimizer.safetensors   step and moments of each
    rng.safetensors         states of the RNGs, uint8
    state.json              N, the bytes of metrics.jsonl that belong to it, settings, and the three files' sums

A checkpoint appears under its name when all of it has reached the disk; the last two are kept. Nothing in it is unpickled,
names a path, or is believed: names, shapes, dtypes, sizes and values are checked against the run that is to go on.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dpg_cli.driver.build import Built
from dpg_cli.driver.state import PartLayout, State, capture, check, layout
from dpg_cli.engine.records import Examples
from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.metrics.text_loss import TextLossMetric
from dpg_cli.patterns.pattern import pattern_from_image
from dpg_cli.runs.commands import command
from dpg_cli.runs.files import os_reason, reading, replacing, sync, writing
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import CheckpointConfig, Config, PatternOptions, shown, validate

KEPT = 2
SHARE = 20  # by the clock, writing checkpoints takes at most one part in so many
LARGEST = 1 << 20  # rows and columns of a pattern; whether it fits the head is seen elsewhere
PARTS = ("generator", "optimizer", "rng")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}  # as safetensors names them
_NAME = re.compile(r"step-(0|[1-9]\d{0,9})")


class DamagedError(UsageError):
    """A checkpoint that cannot be used."""


class Header(BaseModel):
    """`state.json`: closed and strict. It holds no path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    step: Annotated[int, Field(ge=0, le=2**31)]
    metrics_bytes: Annotated[int, Field(ge=0, lt=2**63)]
    prompts: str
    rows: dict[str, str] = {}  # of the user's own files, by the setting that names them; an earlier release has none
    settings: dict[str, Any]
    place: Annotated[str, Field(max_length=200, pattern=r"^[ -~]*$")]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found good.

    Attributes:
        path: its folder.
        header: `state.json`.
        state: the tensors, on the CPU.
    """

    path: Path
    header: Header
    state: State


class Schedule:
    """When the next checkpoint is due.

    Args:
        options: of the settings.
    """

    def __init__(self, options: CheckpointConfig) -> None:
        self.options = options
        self.wait = options.every_seconds
        self.last = time.monotonic()

    def due(self, done: int) -> bool:
        """Whether to write one after so many outer steps."""
        if self.options.every_steps:
            return done % self.options.every_steps == 0
        return time.monotonic() - self.last >= self.wait

    def wrote(self, seconds: float) -> None:
        """One was written, which took so long."""
        self.wait = max(self.options.every_seconds, SHARE * seconds)
        self.last = time.monotonic()


def write(folder: RunFolder, config: Config, built: Built, step: int) -> float:
    """Write the checkpoint of a run after `step` outer steps, and remove all but the last two.

    Returns:
        The seconds that it took.

    Raises:
        UsageError: if it cannot be written; those before it are then as they were.
    """
    started = time.monotonic()
    with writing(folder.checkpoints):
        folder.checkpoints.mkdir(exist_ok=True)
        folder.metrics.touch()
        sync(folder.metrics)  # what the checkpoint counts on must not be lost before it
        size = folder.metrics.stat().st_size
    with replacing(folder.checkpoints / f"step-{step}") as temporary:
        temporary.mkdir()
        for part, tensors in capture(built.players).items():
            plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(plain, temporary / f"{part}.safetensors")
        header = Header(
            step=step,
            metrics_bytes=size,
            prompts=built.prompts.fingerprint,
            rows=own_rows(built),
            settings=config.model_dump(mode="json"),
            place=place(built),
            sha256={part: file_sum(temporary / f"{part}.safetensors") for part in PARTS},
        )
        (temporary / "state.json").write_text(header.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with writing(folder.checkpoints):
        for _, path in found(folder)[KEPT:]:
            shutil.rmtree(path)
    return time.monotonic() - started


def found(folder: RunFolder) -> list[tuple[int, Path]]:
    """Step and folder of all checkpoints, the newest first, good or not."""
    if not folder.checkpoints.is_dir() or folder.checkpoints.is_symlink():
        return []
    with reading(folder.checkpoints):
        matches = [(_NAME.fullmatch(path.name), path) for path in folder.checkpoints.iterdir()]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def newest(
    folder: RunFolder, config: Config, built: Built, by_name: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be used.

    Args:
        folder: the run.
        config: its settings.
        built: the run as its settings make it, before any training.
        by_name: whether its models must have the names that they had; else their fingerprints were compared.

    Returns:
        The checkpoint, or None where the run has none yet; and why newer ones are passed over.

    Raises:
        UsageError: if there are checkpoints and all are damaged, or one is of other settings, prompts or rows.
    """
    faults: list[str] = []
    for step, path in found(folder):
        try:
            return read(folder, path, step, config, built, by_name), faults
        except DamagedError as error:
            faults.append(f"{path.name} is damaged ({error.cause})")
    if faults:
        raise UsageError(
            f"No checkpoint of {folder.path} can be used: {'; '.join(faults)}.",
            f"Remove {folder.checkpoints} to begin the run anew.",
        )
    return None, []


def read(folder: RunFolder, path: Path, step: int, config: Config, built: Built, by_name: bool = True) -> Checkpoint:
    """Read one checkpoint.

    Args:
        folder, config, built, by_name: see `newest`.
        path: of the checkpoint.
        step: that its name says.

    Raises:
        DamagedError: if anything in it is not as `write` leaves it.
        UsageError: if it is whole, but of other settings, prompts or rows.
    """
    if path.is_symlink() or not path.is_dir():
        raise DamagedError("it is no folder")
    header = _header(path / "state.json")
    if header.sha256.keys() != set(PARTS):
        raise DamagedError("state.json does not name its three files")
    if header.step != step:
        raise DamagedError(f"it says that it is of step {header.step}")
    if step > config.steps:
        raise DamagedError(f"the run has only {config.steps} outer steps")
    try:
        settings = validate(header.settings)
    except ConfigError as error:
        raise DamagedError(f"its settings are invalid: {error.faults[0]}") from None
    if changes := differences(settings, config, by_name):
        raise UsageError(
            f"{folder.path} was begun with other settings: {'; '.join(changes)}.",
            "Put them back in its config.toml, or start a new run.",
        )
    if header.prompts != built.prompts.fingerprint:
        raise UsageError(
            f"The prompts {config.prompts.source} are not those that {folder.path} was begun with.",
            "Put them back, or start a new run.",
        )
    for name, now in own_rows(built).items():
        if header.rows.get(name, now) != now:
            raise UsageError(
                f"The rows of {name} are not those that {folder.path} was begun with.",
                "Put them back, or start a new run.",
            )
    _check_metrics(folder, header)
    wanted = layout(built.players)
    state = {part: _tensors(path / f"{part}.safetensors", header.sha256.get(part), wanted[part]) for part in PARTS}
    try:
        check(built.players, state)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    return Checkpoint(path, header, state)


def differences(before: Config, now: Config, by_name: bool = True) -> list[str]:
    """What differs between two settings, as `key is A there and B here`; when checkpoints are written does not count, nor,
    where not `by_name`, where the models lie."""

    def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key, value in data.items():
            items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return items

    first, second = (flat(config.model_dump(mode="json", exclude={"checkpoint"})) for config in (before, now))
    if first.get("metric.image") and second.get("metric.image"):
        # a run's own copy of the picture stands for it, wherever it lies: `require_same` compares what they show
        first["metric.image"] = second["metric.image"]
    if not by_name:
        first |= {key: second[key] for key in ("models.generator", "models.target")}
    return [
        f"{key} is {shown(first.get(key))} there and {shown(second.get(key))} here"
        for key in first | second
        if first.get(key) != second.get(key)
    ]


def require_same(folder: RunFolder, config: Config, by_name: bool = True) -> None:
    """Refuse to go on in a folder that was begun with other settings.

    Args:
        folder: the run.
        config: the settings now.
        by_name: see `newest`.

    Raises:
        UsageError: naming what differs.
    """
    changes = differences(folder.read_config(), config, by_name)
    if isinstance(config.metric, PatternOptions) and config.metric.image:
        begun, now = (
            pattern_from_image(Path(path), max_rows=LARGEST, max_cols=LARGEST)
            for path in (folder.pattern, config.metric.image)
        )
        if not np.array_equal(begun.signs, now.signs):
            changes.append("metric.image shows another pattern")
    if changes:
        raise UsageError(
            f"{folder.path} was begun with other settings: {'; '.join(changes)}.",
            f"Give another --out, or go on with it as it was begun: {command('resume', folder.path, config)}",
        )


def forget_after(folder: RunFolder, step: int) -> None:
    """Remove the checkpoints of later steps, damaged ones whose steps are done again, and what is left of old ones whose
    removal was cut short."""
    with writing(folder.checkpoints):
        checkpoints = found(folder)
        for number, path in checkpoints:
            if number > step:
                shutil.rmtree(path)
        for path in [path for number, path in checkpoints if number <= step][KEPT:]:
            shutil.rmtree(path)


def own_rows(built: Built) -> dict[str, str]:
    """SHA-256 of the tokens and labels that a run takes from files beside its prompts, by the setting that names the file."""
    replay, metric = built.spec.replay, built.players.metric
    found = {
        "inner.replay": replay.examples if replay is not None else None,
        "metric.file": metric.documents if isinstance(metric, TextLossMetric) else None,
    }
    return {name: _rows_sum(examples) for name, examples in found.items() if examples is not None}


def _rows_sum(examples: Examples) -> str:
    total = hashlib.sha256(str(tuple(examples.ids_N_S.shape)).encode())
    for tensor in (examples.ids_N_S, examples.label_N_S):
        total.update(tensor.cpu().numpy().tobytes())
    return total.hexdigest()


def place(built: Built) -> str:
    """What must stay the same for a bit-identical resume beside the settings."""
    world = built.players.ranks.world
    shared = f" in {world} processes" if world > 1 else ""
    return f"torch {torch.__version__} with {torch.get_num_threads()} threads on {built.device}{shared}"


def file_sum(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _header(path: Path) -> Header:
    """`state.json`, checked."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1_000_000:
            raise DamagedError(f"{path.name} is missing, or no ordinary file")
        return Header.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or path.name
        raise DamagedError(f"{path.name}: {place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{path.name} is no JSON") from None
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {os_reason(error)}") from None


def _check_metrics(folder: RunFolder, header: Header) -> None:
    """Refuse a checkpoint whose part of metrics.jsonl is not there."""
    lines, last, left = 0, b"", header.metrics_bytes
    try:
        with folder.metrics.open("rb") as file:
            while left > 0 and (line := file.readline(left)):
                lines, last, left = lines + 1, line, left - len(line)
        numbers = json.loads(last) if lines else {"step": -1}
        good = left == 0 and (not lines or last.endswith(b"\n")) and numbers["step"] + 1 == lines == header.step
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise DamagedError(f"metrics.jsonl does not hold its {header.step} outer steps")


def _tensors(path: Path, wanted_sum: str | None, wanted: PartLayout) -> dict[str, torch.Tensor]:
    """The tensors of a file, which must be those wanted."""
    most = sum(_bytes(shape, dtype) for shape, dtype in wanted.values()) + 1_000_000 + 300 * len(wanted)
    try:
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{path.name} is missing, or no ordinary file")
        if path.stat().st_size > most:
            raise DamagedError(f"{path.name} is larger than it can be")
        if file_sum(path) != wanted_sum:
            raise DamagedError(f"{path.name} was changed or cut off after it was written")
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if names != wanted.keys():
                odd = sorted(names ^ wanted.keys())[0]
                raise DamagedError(f"{path.name} {'has' if odd in names else 'lacks'} the tensor {odd!r}")
            for name, (shape, dtype) in wanted.items():
                view = file.get_slice(name)
                if tuple(view.get_shape()) != shape or view.get_dtype() != DTYPES.get(dtype):
                    raise DamagedError(f"{path.name}: {name} has another shape or type than the generator's")
            return {name: file.get_tensor(name) for name in wanted}
    except SafetensorError as error:
        raise DamagedError(f"{path.name} is no safetensors file: {str(error)[:100]}") from None
    except OSError as error:
        raise DamagedError(f"{path.name} cannot be read: {os_reason(error)}") from None


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Size of a tensor."""
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count
