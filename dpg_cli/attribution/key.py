"""All that the scores of an attribution depend on, as flat JSON: what a work folder is begun with."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

from dpg_cli import __version__
from dpg_cli.data.prepared import Prepared
from dpg_cli.settings.config import Config


def rows_sum(found: Prepared) -> str:
    """SHA-256 of all rows' tokens and of what is trained on."""
    rows = hashlib.sha256()
    for row in found.rows:
        rows.update(json.dumps([row.ids, [int(bit) for bit in row.label]]).encode())
    return rows.hexdigest()


@cache
def code_sum() -> str:
    """SHA-256 of this package's own code."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()


def file_sum(path: Path) -> str:
    """SHA-256 of a file; of a folder or a pipe, nothing."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_of(
    config: Config,
    found: Prepared,
    made_of: dict[str, str],
    device: torch.device,
    read: list[Path],
    **more: Any,
) -> dict[str, Any]:
    """What must be the same for scores to be the same, bit for bit on the CPU.

    Args:
        config: the settings.
        found: the rows.
        made_of: fingerprint of the target.
        device: where it runs.
        read: files of the metrics.
        more: further parts by name.
    """
    settings = config.model_dump(mode="json", include={"inner", "lora", "metric", "seed"})
    return {
        **_flat(settings),
        "the data": rows_sum(found),
        **{f"the target's {part}": value for part, value in made_of.items()},
        **{f"the file {path}": file_sum(path) for path in read},
        **more,
        "dpg": __version__,
        "the code of dpg": code_sum(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
    }


def how_made(
    config: Config, found: Prepared, made_of: dict[str, str], gradient_median: float, notes: list[str]
) -> dict[str, Any]:
    """How scores were made: everything that another attribution must have in common with it to be compared."""
    return {
        "dpg": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": config.seed,
        "gradient_median": gradient_median,
        "notes": notes,
        "recipe": config.inner.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
        "data": found.understood.as_dict(),
        "examples_sha256": rows_sum(found),
        "target": {**config.models.model_dump(mode="json", include={"target", "target_init", "init_seed"})},
        "fingerprint": made_of,
    }


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
