"""What a model was, in four sums: its weights, its configuration, its tokeniser, its chat template.

A run keeps those of its two models in `run.json`. Whatever goes on from it later (resume, verify, export) compares, so that
a folder that was written over in between is noticed, and one that only moved can be named again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from dpg_cli.errors import UsageError
from dpg_cli.models.folder import ModelError
from dpg_cli.models.loading import LanguageModel, load_generator, load_target
from dpg_cli.models.lora import base_state
from dpg_cli.settings.config import ModelsConfig

Fingerprint = dict[str, str]  # part -> SHA-256
PARTS = {
    "weights": "other weights",
    "config": "another configuration",
    "tokenizer": "another tokeniser",
    "template": "another chat template",
}  # part -> what a change of it is called
UNSEEN = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
    "use_cache",
)  # change nothing that is computed
PIECE = 1 << 24  # values hashed at once


def fingerprint(model: LanguageModel) -> Fingerprint:
    """The sums of a model as it is now: of θ_0, right after it was loaded. Adapters that were put on it do not count."""
    own, tokenizer = model.model.config.to_diff_dict(), model.tokenizer
    config = {key: value for key, value in own.items() if key not in UNSEEN and not key.startswith("_")}
    return {
        "weights": _sum(_bytes_of(base_state(model.model))),
        "config": _sum([_plain(config)]),
        "tokenizer": _sum([_plain([_rules(tokenizer), tokenizer.special_tokens_map, list(model.end_ids)])]),
        "template": _sum([_plain(getattr(tokenizer, "chat_template", None))]),
    }


def _sum(pieces: Iterator[bytes] | Sequence[bytes]) -> str:
    """SHA-256 of some bytes."""
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def _plain(data: Any) -> bytes:
    """JSON with sorted keys."""
    return json.dumps(data, sort_keys=True, default=str).encode()


def _bytes_of(state: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """Name, type, shape and values of every weight, tied ones once."""
    seen: set[int] = set()
    for name, tensor in sorted(state.items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
        for piece in tensor.detach().reshape(-1).split(PIECE):
            yield piece.cpu().contiguous().view(torch.uint8).numpy().data


def _rules(tokenizer: Any) -> Any:
    """Everything that makes tokens of a text: the fast tokeniser's own description, without what a call of it sets; the
    vocabulary of a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    data = json.loads(backend.to_str())
    return {key: value for key, value in data.items() if key not in ("padding", "truncation")}


def changes(recorded: Mapping[str, str], now: Fingerprint) -> list[str]:
    """What differs, in words; parts that an earlier release did not record are left out."""
    return [words for part, words in PARTS.items() if part in recorded and recorded[part] != now[part]]


def require_same(
    role: str, model: LanguageModel, recorded: Mapping[str, str], run: str, known: Fingerprint | None = None
) -> None:
    """Refuse a model that is not the one a run was begun with.

    Args:
        role: that it plays, generator or target.
        model: as it was loaded.
        recorded: the fingerprint that the run kept.
        run: the run's folder, as it can be pasted into a command.
        known: its fingerprint, where that was taken before it was changed.

    Raises:
        UsageError: naming what changed.
    """
    found = changes(recorded, known or fingerprint(model))
    if found:
        raise UsageError(
            f"The {role} {model.name!r} is not the one that {run} was begun with: it has {' and '.join(found)}.",
            f"Put that model back; or name where it lies now: dpg resume {run} --{role} FOLDER",
        )


def require_unchanged(
    models: ModelsConfig,
    roles: Sequence[str],
    recorded: Mapping[str, Mapping[str, str]],
    run: str,
    device: torch.device,
) -> None:
    """Load the models that a run was begun with once more, and refuse others in their place.

    Args:
        models: as the run's settings name them.
        roles: which of them.
        recorded: the fingerprints that the run kept; nothing is loaded for a role without one.
        run: the run's folder, as it can be pasted into a command.
        device: where they are loaded.

    Raises:
        UsageError: naming what changed, or what cannot be loaded.
    """
    for role in roles:
        if role not in recorded:
            continue
        try:
            model = (load_generator if role == "generator" else load_target)(models, device)
        except ModelError as error:
            raise moved(error, role, run) from error
        require_same(role, model, recorded[role], run)


def moved(error: ModelError, role: str, run: str) -> UsageError:
    """The refusal of a run's model that cannot be loaded, with what to do where it lies elsewhere now."""
    return UsageError(error.cause, f"{error.remedy} If the {role} has moved: dpg resume {run} --{role} FOLDER")
