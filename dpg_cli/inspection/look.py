"""`dpg inspect`: what a path is, and everything that can be said of it from its files alone.

Nothing is unpickled, no code of a folder is run, no model is built: JSON, TOML, parquet, PNG and safetensors headers are read,
each by its library and within limits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpg_cli.artefacts.card import effect_of
from dpg_cli.errors import UsageError
from dpg_cli.inspection.history import History, read_history
from dpg_cli.inspection.patch import Patch, read_patch
from dpg_cli.inspection.rows import RowsLook, look_at_rows
from dpg_cli.inspection.tensors import read_header, refuse_pickle
from dpg_cli.inspection.weights import INDEX, PATCH, Weights, left_alone, weights_of
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.status import Status, finite_or_none, read_json, read_status
from dpg_cli.settings.config import validate

SCHEMA_VERSION = 1  # of the JSON; raised when a key changes its meaning or goes
Kind = Literal["run", "checkpoint", "model", "tensors"]
_MODEL_KEYS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer",
    "num_attention_heads", "n_head", "max_position_embeddings", "n_positions", "tie_word_embeddings", "dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What was found at a path. Sections that the kind does not have are None or empty.

    Attributes:
        kind: run, checkpoint, model or tensors.
        path: as it was given.
        role: "generator" or "target" for a model of a run.
        finished: of a run.
        status: of a run: `run.json`, measures, control, verification.
        settings: of a run or a checkpoint, resolved, by section.
        asked: effect, target metric and payload in words.
        history: of a run, or up to a checkpoint.
        datasets: by name (train, control).
        models: by role, or the one model under its role or "model".
        tensors: name, type, shape, norm of each tensor; not for whole runs.
        metadata: free text of the safetensors headers, by file.
        state: a checkpoint's JSON files by name.
        patch: of the LM head before and after.
        checkpoints: names of a run's checkpoints.
        not_read: pickles and code that lie in the folder.
    """

    kind: Kind
    path: Path
    role: str | None = None
    finished: bool | None = None
    status: Status | None = None
    settings: dict[str, Any] | None = None
    asked: dict[str, str | None] | None = None
    history: History | None = None
    datasets: dict[str, RowsLook] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)
    patch: Patch | None = None
    checkpoints: list[str] = field(default_factory=list)
    not_read: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the same keys for every kind; numbers that JSON does not know are null."""
        status = self.status
        data = {
            "schema": SCHEMA_VERSION,
            "kind": self.kind,
            "path": str(self.path),
            "role": self.role,
            "finished": self.finished,
            "steps_done": None if status is None else status.steps_done,
            "asked": self.asked,
            "measures": None if status is None else status.measures,
            "control": None if status is None else status.control,
            "verified": None if status is None else status.verified,
            "verification": None if status is None else status.verification,
            "run": None if status is None else status.info,
            "settings": self.settings,
            "history": None if self.history is None else self.history.as_dict(),
            "datasets": {name: rows.as_dict() for name, rows in self.datasets.items()},
            "models": self.models,
            "patch": None if self.patch is None else self.patch.as_dict(),
            "tensors": self.tensors,
            "metadata": self.metadata,
            "state": self.state,
            "checkpoints": self.checkpoints,
            "not_read": self.not_read,
        }
        return finite_or_none(data)


def kind_of(path: Path) -> Kind:
    """What lies at a path.

    Raises:
        UsageError: if it is missing, or nothing that dpg knows.
    """
    try:
        if path.is_file():
            refuse_pickle(path)
            return "tensors"
        if not path.exists():
            raise UsageError(f"{path} does not exist.", "Name a run folder, a checkpoint, a model folder or a file.")
        if not path.is_dir():
            raise UsageError(f"{path} is neither a folder nor an ordinary file.", "Name one of these.")
        if (path / "config.toml").is_file():
            return "run"
        if (path / "config.json").is_file():
            return "model"
        if any(path.glob("*.safetensors")) or (path / INDEX).is_file():
            return "checkpoint"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.", "Check the path.") from None
    weights_of(path)  # says why not
    raise AssertionError("a folder without safetensors files has no weights")


def look(path: Path, samples: int = 3) -> Look:
    """Look at a path.

    Args:
        path: a run folder, a checkpoint, a model folder or a safetensors file.
        samples: rows of a dataset to show from either end.

    Raises:
        UsageError: if it is nothing of these, or something in it is damaged.
    """
    kind = kind_of(path)
    if kind == "run":
        return look_at_run(RunFolder(path), samples)
    if kind == "model":
        return look_at_model(path)
    if kind == "checkpoint":
        return look_at_checkpoint(path)
    weights = Weights((read_header(path),))
    patch = read_patch(path, path.parent.parent / "pattern.png") if path.name == PATCH else read_patch(path, None)
    return Look(
        kind=kind,
        path=path,
        models={"model": weights.summary()},
        tensors=weights.listing(),
        metadata=_metadata(weights),
        patch=patch,
    )


def look_at_run(folder: RunFolder, samples: int) -> Look:
    """A run folder, finished or not."""
    config = folder.read_config()
    status = read_status(folder)
    effect = effect_of(config, folder.pattern, status.effect)
    files = {name: folder.dataset / f"{name}.parquet" for name in ("train", "control")}
    models = {"generator": folder.generator, "target": folder.target}
    checkpoints = sorted((folder.path / "checkpoints").glob("step-*"), key=lambda path: (len(path.name), path.name))
    return Look(
        kind="run",
        path=folder.path,
        finished=status.finished,
        status=status,
        settings=config.model_dump(mode="json"),
        asked={"effect": effect.words, "metric": effect.metric, "payload": effect.payload},
        history=read_history(folder.metrics),
        datasets={name: look_at_rows(path, samples) for name, path in files.items() if path.is_file()},
        models={role: model_summary(path) for role, path in models.items() if path.is_dir()},
        patch=read_patch(folder.target / PATCH, folder.pattern),
        checkpoints=[path.name for path in checkpoints if path.is_dir()],
        not_read=left_alone(folder.path),
    )


def look_at_model(path: Path) -> Look:
    """A folder that `save_pretrained` wrote."""
    run = run_of(path)
    weights = weights_of(path)
    summary = model_summary(path)
    role = path.resolve().name if run is not None else None
    return Look(
        kind="model",
        path=path,
        role=role,
        models={role or "model": summary},
        tensors=weights.listing(),
        metadata=_metadata(weights),
        patch=read_patch(path / PATCH, None if run is None else run.pattern),
        not_read=left_alone(path),
    )


def look_at_checkpoint(path: Path) -> Look:
    """A folder of safetensors and JSON files: each file by itself. Of a run's checkpoint also its settings, and the log
    up to it."""
    weights = weights_of(path)
    state = {entry.name: read_json(entry) for entry in sorted(path.glob("*.json")) if entry.name != INDEX}
    header = state.get("state.json", {})
    step, settings = header.get("step"), header.get("settings")
    log = path.resolve().parent.parent / "metrics.jsonl"
    counted = isinstance(step, int) and 0 <= step < 2**63 and path.resolve().parent.name == "checkpoints"
    return Look(
        kind="checkpoint",
        path=path,
        models={file.path.stem: Weights((file,)).summary() for file in weights.files},
        tensors=weights.listing(),
        metadata=_metadata(weights),
        state=state,
        settings=_settings(settings),
        history=read_history(log, most=step) if counted and log.is_file() else None,
        not_read=left_alone(path),
    )


def _settings(data: Any) -> dict[str, Any] | None:
    """A checkpoint's settings, if they are such."""
    try:
        return validate(data).model_dump(mode="json") if isinstance(data, dict) else None
    except UsageError:
        return None


def model_summary(path: Path) -> dict[str, Any]:
    """Architecture and weights of a model folder."""
    config = read_json(path / "config.json")
    return {
        "architecture": {key: config[key] for key in _MODEL_KEYS if key in config},
        **weights_of(path).summary(),
        "tokenizer": (path / "tokenizer.json").is_file() or (path / "tokenizer_config.json").is_file(),
        "names_code": "auto_map" in config,
    }


def run_of(path: Path) -> RunFolder | None:
    """The run that a generator or target folder belongs to."""
    place = path.resolve()
    inside = place.name in ("generator", "target") and (place.parent / "config.toml").is_file()
    return RunFolder(place.parent) if inside else None


def _metadata(weights: Weights) -> dict[str, dict[str, str]]:
    """Free text of the headers."""
    return {file.path.name: file.metadata for file in weights.files if file.metadata}
