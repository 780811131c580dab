"""Loading models and tokenisers strictly: folders, hub names, the embedded model; chat templates; the process's allocator.

Not here: parameters as the engine sees them (`engine/params.py`). The names below come from `loading.py`, which imports
torch and transformers, only when they are asked for: `hub.py` stays light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpg_cli.models.loading import LanguageModel, load, load_generator, load_target, pick_device

__all__ = ["LanguageModel", "load", "load_generator", "load_target", "pick_device"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dpg_cli.models import loading

    return getattr(loading, name)
