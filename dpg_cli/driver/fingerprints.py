"""The models of a run over its sessions: recorded when it begins, compared when it goes on, named anew where they moved."""

from __future__ import annotations

from collections.abc import Mapping

from dpg_cli.driver.build import Built
from dpg_cli.engine.ranks import ALONE, Ranks
from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted
from dpg_cli.models.fingerprint import Fingerprint, fingerprint, require_same, require_unchanged
from dpg_cli.models.loading import pick_device
from dpg_cli.runs.folder import RunFolder
from dpg_cli.runs.sessions import read_info
from dpg_cli.settings.config import Config


def fingerprints(built: Built) -> dict[str, Fingerprint]:
    """Those of a run's two models, before any training."""
    return {"generator": fingerprint(built.players.generator), "target": target_fingerprint(built)}


def target_fingerprint(built: Built) -> Fingerprint:
    """That of the target as it was loaded, without adapters."""
    return built.target_made_of or fingerprint(built.players.target)


def compare(folder: RunFolder, built: Built) -> bool:
    """Refuse models other than those the run was begun with.

    Returns:
        Whether both were compared: a run that an earlier release began has no fingerprints.

    Raises:
        UsageError: naming the model and what changed.
    """
    recorded = read_info(folder)[0].fingerprints
    roles = {"generator": (built.players.generator, None), "target": (built.players.target, built.target_made_of)}
    for role, (model, known) in roles.items():
        if role in recorded:
            require_same(role, model, recorded[role], pasted(folder.path), known)
    return all(role in recorded for role in roles)


def relocate(folder: RunFolder, places: Mapping[str, str], ranks: Ranks = ALONE) -> Config:
    """Write into a run's settings where its models lie now, once they have proved to be the same.

    Args:
        folder: the run.
        places: new names of one model or both.
        ranks: the processes that share the run, of which this is the first.

    Returns:
        The settings, changed.

    Raises:
        UsageError: if there is another model at the place, or the run has no fingerprint to compare it with.
    """
    config, recorded = folder.read_config(), read_info(folder)[0].fingerprints
    lacking = [role for role in places if role not in recorded]
    if lacking:
        raise UsageError(
            f"{folder.path} has no fingerprint of its {lacking[0]}: an earlier release began it.",
            f"Put the {lacking[0]} back to {getattr(config.models, lacking[0])}.",
        )
    models = config.models.model_copy(update=dict(places))
    device = pick_device(config.device) if ranks.world == 1 else ranks.device
    require_unchanged(models, list(places), recorded, pasted(folder.path), device)
    config = config.model_copy(update={"models": models})
    with folder.locked():
        folder.write_config(config)
    return config
