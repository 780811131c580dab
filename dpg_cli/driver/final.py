"""The final dataset of a run and its control: drawn, fine-tuned on, attributed, written. DESIGN §6.

All ranks do this together; the first one writes. When it is cut short, it is repeated from the beginning, from the last
checkpoint, and gives the same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dpg_cli.artefacts.dataset import Progress, draws, measure, silent, without, write_card
from dpg_cli.artefacts.draft import drafted, write_dataset, write_draft
from dpg_cli.driver.build import Built
from dpg_cli.engine.generator.alphabet import restricted
from dpg_cli.engine.records import Metagradient
from dpg_cli.models.loading import load_generator
from dpg_cli.runs.files import writing
from dpg_cli.runs.folder import RunFolder
from dpg_cli.settings.config import Config

Stage = Callable[[str], None]


@dataclass(frozen=True)
class Final:
    """What the final datasets do to the target.

    Attributes:
        result: of the trained generator's; its tokens' rewards are let go.
        control: Φ as "phi" and the measures of the untrained generator's; None where none was asked for.
    """

    result: Metagradient
    control: dict[str, float] | None

    @property
    def measures(self) -> dict[str, float]:
        """Φ as "phi" and the measures."""
        return _measures(self.result)


def final_data(
    config: Config,
    built: Built,
    folder: RunFolder | None,
    on_stage: Stage = lambda name: None,
    progress: Progress = silent,
) -> Final:
    """Make the final dataset and, if asked for, the control.

    Args:
        config: the settings.
        built: models, metric and prompts; the generator is trained.
        folder: where they go; None on ranks that write nothing.
        on_stage: called with the name of each stage that begins.
        progress: of the sampling.
    """
    if folder is not None:
        with writing(folder.dataset):
            folder.dataset.mkdir(exist_ok=True)
    result = one(config, built, folder, "train", on_stage, progress)
    control = _measures(one(config, built, folder, "control", on_stage, progress)) if config.dataset.control else None
    final = Final(result, control)
    if folder is not None:
        write_card(folder.dataset / "README.md", config, built.players.metric.describe(), final.measures, final.control)
    return final


def one(
    config: Config, built: Built, folder: RunFolder | None, name: str, on_stage: Stage, progress: Progress
) -> Metagradient:
    """Make one of the two. Only the trained generator's examples ("train") get rewards.

    Returns:
        What fine-tuning on it gives, without the rewards: they are in the file.
    """
    players, size, trained = built.players, config.dataset.examples, name == "train"
    generator = players.generator
    if not trained:
        generator = restricted(load_generator(config.models, built.device), config.rollout.alphabet)
    what = "the dataset" if trained else "the control"
    rewards = trained and config.dataset.rewards
    on_stage(f"drawing {what}: {size:,} examples")
    with drafted(None if folder is None else folder.dataset / f"{name}.parquet") as draft:
        parts = draws(
            generator, built.spec, built.prompts, size, config.steps, config.seed + 2, players.ranks, progress
        )
        parts = without(parts, generator, config.dataset.forbidden)
        reading = write_draft(draft, parts, generator, players.target, built.spec.max_length)
        if left := size - len(reading.examples):
            on_stage(f"left {left:,} of {size:,} examples out of {what}: they hold a forbidden word")
        on_stage(f"fine-tuning on {what}" + (", rewards of its examples" if rewards else ""))
        result = measure(players, built.spec, reading.examples, config.examples_per_step, rewards)
        if folder is not None and draft is not None:
            write_dataset(folder.dataset / f"{name}.parquet", draft, reading, result if rewards else None)
    return replace(result, token_N_S=result.token_N_S[:0])


def _measures(result: Metagradient) -> dict[str, float]:
    """Φ and the measures, flat."""
    return {"phi": result.value, **result.measures}
