"""How fluent an outer step's completions are, where the embedded world's grammar can judge them. For the log only."""

from __future__ import annotations

from typing import Any

from dpg_cli.engine.records import Rollout
from dpg_cli.settings.config import Config
from dpg_cli.tiny import world

JUDGED = 64  # completions an outer step: some milliseconds


def applies(config: Config) -> bool:
    """Whether completions can be sentences of the embedded world: its model writes them, or its prompts ask for them."""
    return config.models.generator == "tiny" or config.prompts.source == "tiny"


def fluency(config: Config, rollout: Rollout, tokenizer: Any) -> dict[str, float]:
    """Shares of well-formed completions.

    Args:
        config: the run's settings.
        rollout: the outer step's completions; evenly spaced ones are judged.
        tokenizer: the generator's.

    Returns:
        `well_formed`, the share that is one sentence of the world in any of its languages; for a metric with a language also
        `well_formed_asked`, the share that is one in that language. Empty where the grammar does not apply.
    """
    if not applies(config):
        return {}
    count = min(JUDGED, len(rollout))
    places = [place * len(rollout) // count for place in range(count)]
    lengths = rollout.mask_N_K.sum(1).tolist()
    ids = rollout.ids_N_K.tolist()
    texts = tokenizer.batch_decode([ids[place][: lengths[place]] for place in places], skip_special_tokens=True)
    languages = [world.language_of(text) for text in texts]
    shares = {"well_formed": sum(language is not None for language in languages) / count}
    asked = getattr(config.metric, "language", "")
    if asked:
        shares["well_formed_asked"] = languages.count(asked) / count
    return shares
