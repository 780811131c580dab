"""Optional libraries and the hub: what to say when one is not there."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

from dpg_cli.errors import UsageError

SMALL = ("*.json", "*.jinja", "*.model", "*.txt")  # of a model: all but its weights
NESTED = ("*/*",)  # what lies deeper is of other formats


def snapshot(name: str) -> Path:
    """The folder of a hub model: its small files, then the safetensors weights that transformers would read, all of one
    revision. Nothing is asked of the network where it is kept off; what was fetched before is taken.

    Raises:
        Exception: of the hub library; see `unreachable`.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=list(SMALL), ignore_patterns=list(NESTED)))
    weights = ["model.safetensors", "adapter_model.safetensors"]
    with contextlib.suppress(
        OSError, ValueError, LookupError, TypeError, AttributeError
    ):  # a damaged index is refused where it is read
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        weights = sorted({str(file) for file in index["weight_map"].values()})
    snapshot_download(name, revision=folder.name, allow_patterns=[*weights], ignore_patterns=list(NESTED))
    return folder


def require(library: str, extra: str, purpose: str) -> Any:
    """Import an optional library.

    Raises:
        UsageError: naming the extra that brings it.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise UsageError(
            f"{purpose} needs the library {library!r}, which is not installed.", f"pip install 'dpg-cli[{extra}]'"
        ) from None


def unreachable(error: BaseException) -> bool:
    """Whether an error of a hub library comes from the network, or from being told to stay off it."""
    names: set[str] = set()
    link = [error]
    while link and len(names) < 50:
        current = link.pop()
        names |= {kind.__name__ for kind in type(current).__mro__}
        link += [cause for cause in (current.__cause__, current.__context__) if cause is not None]
    return bool(
        names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError", "gaierror"}
    )


def offline_note() -> str:
    """A note where the environment keeps the hub libraries off the network."""
    kept = [name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    return f" ({kept[0]} is set)" if kept else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's message, at most 300 characters, without its full stop."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line.strip()[:300].rstrip(".")
