"""A run on a card that is not at hand: hours, memory of each phase, and what limits it, from the settings and shapes alone.

Operations are counted (`scaling.py`, `generator.py`); the card's rates are its data sheet's, and the share of them that is reached is
an assumption (`cards.py`). Nothing is loaded, fetched or timed, and what will not fit is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dpg_cli.data.prompts import load_prompts
from dpg_cli.errors import UsageError
from dpg_cli.models.lora import Lora
from dpg_cli.planning.asked import Asked, asked
from dpg_cli.planning.cards import FREE, Card, card_of
from dpg_cli.planning.job import Job, Size, job_of
from dpg_cli.planning.scaling import Prediction, dataset_seconds, predict
from dpg_cli.planning.shapes import size_of
from dpg_cli.settings.config import Config, validate
from dpg_cli.settings.presets import merge, parse_override

CONTEXT_BYTES = 0.6e9  # of the driver, the libraries and their handles, on every card
WRAPPED, LETTERS = 40, 4  # tokens of a chat template; bytes of a token, about
UNKNOWN = 512  # tokens of a prompt whose length nobody has said
LEANER = (  # tried one by one, then together, in this order
    "rollout.batch_size=64",
    "inner.micro_batch=4",
    "policy.micro_batch=4",
    'inner.states="sqrt"',
    'inner.states="offload"',
)
PHASES = {  # seconds that belong to each phase of memory
    "rollout": ("rollout",),
    "contexts": ("contexts",),
    "metagradient": ("inner run", "reverse"),
    "policy": ("policy", "own vectors", "sending"),
}


@dataclass(frozen=True)
class Phase:
    """One phase of an outer step, or the final dataset.

    Attributes:
        seconds: of an outer step; of the final dataset, once.
        bytes: at its peak.
        limit: what takes its time, in words.
    """

    seconds: float
    bytes: float
    limit: str


@dataclass(frozen=True)
class Outlook:
    """What is predicted.

    Attributes:
        card: by its data sheet.
        generator, target: sizes.
        phases: by name.
        steps, inner_steps: of the run.
        flops: of an outer step.
        law: what the law of DESIGN §9 asks.
        prompt: tokens that a prompt was taken as.
    """

    card: Card
    generator: Size
    target: Size
    phases: Mapping[str, Phase]
    steps: int
    inner_steps: int
    flops: float
    law: Asked
    prompt: int

    @property
    def seconds_per_step(self) -> float:
        """Of an outer step."""
        return sum(phase.seconds for name, phase in self.phases.items() if name != "dataset")

    @property
    def hours(self) -> float:
        """Of the whole run, its final dataset included."""
        return (self.steps * self.seconds_per_step + self.phases["dataset"].seconds) / 3600

    @property
    def largest(self) -> str:
        """The phase that takes most memory."""
        return max(self.phases, key=lambda name: self.phases[name].bytes)

    @property
    def bytes(self) -> float:
        """The peak."""
        return self.phases[self.largest].bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "card": self.card.name,
            "hours": self.hours,
            "seconds_per_step": self.seconds_per_step,
            "memory_gb": self.bytes / 1e9,
            "largest": self.largest,
            "phases": {name: asdict(phase) for name, phase in self.phases.items()},
            "flops_per_step": self.flops,
            "law": asdict(self.law),
            "prompt_tokens": self.prompt,
            "assumed": self.card.about(),
        }

    def as_text(self) -> str:
        """For people."""
        rows = [
            f"#   {name:<13}{phase.seconds:>10.2f} s{phase.bytes / 1e9:>8.1f} GB   {phase.limit}"
            for name, phase in self.phases.items()
        ]
        trained = f" ({self.target.adapters:,} trained)" if self.target.adapters else ""
        return "\n".join(
            [
                f"# {self.card.about()}",
                f"# generator {self.generator.parameters:,} parameters, target {self.target.parameters:,}{trained}; "
                f"prompts of {self.prompt:,} tokens; {self.flops / 1e12:,.1f} TFLOP an outer step, T = {self.inner_steps}",
                *rows,
                f"# predicted: {self.steps:,} outer steps of {self.seconds_per_step:.1f} s and the final dataset, {self.hours:.2f} h in all; "
                f"{self.bytes / 1e9:.1f} of {self.card.memory / 1e9:g} GB, most of it in the {self.largest}",
                f"# {self.law.line()}",
            ]
        )


def outlook(config: Config, card: str, processes: int = 1) -> Outlook:
    """The run of some settings on a card.

    Args:
        config: the settings.
        card: its name.
        processes: cards that share the run.

    Raises:
        UsageError: for an unknown card, a model whose shape is not known, and settings that the card has too little memory for.
    """
    found = card_of(card)
    made = _predicted(config, found, processes)
    if made.bytes > FREE * found.memory:
        raise UsageError(
            f"This needs about {made.bytes / 1e9:.0f} GB in the {made.largest}, and the {found.name} has {found.memory / 1e9:g} "
            f"({FREE:.0%} of it for us).",
            _advice(config, found, processes),
        )
    return made


def _advice(config: Config, card: Card, processes: int) -> str:
    """The first change, or the shortest row of them, that would fit."""
    for change in (*((one,) for one in LEANER), LEANER[:4], (*LEANER[:3], LEANER[4])):
        data = config.model_dump(mode="json")
        for text in change:
            data = merge(data, parse_override(text))
        made = _predicted(validate(data), card, processes)
        if made.bytes <= FREE * card.memory:
            return f"{' '.join(f'--set {text}' for text in change)} takes {made.bytes / 1e9:.1f} GB."
    return "Take smaller models, adapters (lora.rank, policy.parameters), or a card with more memory."


def _predicted(config: Config, card: Card, processes: int) -> Outlook:
    """The outlook, whether it fits or not."""
    generator, target = sizes(config)
    prompt = prompt_bound(config)
    job = job_of(config, generator, target, prompt)
    prediction = predict(job, card.device(), processes)
    phases = phases_of(job, prediction, card, config, processes)
    law = asked(config, target.vocabulary, target.width)
    return Outlook(card, generator, target, phases, config.steps, config.inner_steps, prediction.flops, law, prompt)


def sizes(config: Config) -> tuple[Size, Size]:
    """Generator and target as they are trained, from their shapes."""
    models, policy = config.models, config.policy
    adapters = Lora(policy.lora_rank, policy.lora_alpha, policy.lora_modules) if policy.parameters == "lora" else None
    untied = models.untie_generator or policy.parameters == "head"
    generator = size_of(models.generator, untied=untied, lora=adapters)
    lora = Lora.of(config.lora) if config.lora.rank else None
    return generator, size_of(models.target, untied=models.untie_target, lora=lora)


def prompt_bound(config: Config) -> int:
    """Tokens of a prompt, about: from the limit, from embedded prompts, or a guess that is said."""
    source = config.prompts.source
    around = len(config.prompts.instruction) // LETTERS + (WRAPPED if config.prompts.instruction else 0)
    if source == "empty":
        return 1 + around
    if config.prompts.max_tokens:
        return config.prompts.max_tokens + around
    if source in ("tiny", "prose"):
        texts = load_prompts(source)[:256]
        return 1 + around + sum(len(text.encode()) for text in texts) // (LETTERS * len(texts))
    return UNKNOWN + around


def phases_of(job: Job, prediction: Prediction, card: Card, config: Config, processes: int) -> dict[str, Phase]:
    """Seconds, peak and limit of each phase."""
    device, seconds = card.device(), prediction.seconds_by_part
    found: dict[str, Phase] = {}
    for name, parts in PHASES.items():
        longest = max(parts, key=lambda part: seconds[part])
        limit = "arithmetic" if longest not in ("own vectors", "sending") else longest
        if name == "rollout":
            limit = rollout_limit(job, card)
        found[name] = Phase(
            sum(seconds[part] for part in parts), prediction.bytes_by_phase[name] + CONTEXT_BYTES, limit
        )
    last = dataset_seconds(job, device, config.dataset.rewards, processes)
    drawing = "drawing it: " + rollout_limit(replace(job, prompts=job.dataset, group_size=1), card)
    found["dataset"] = Phase(last, prediction.bytes_by_phase["dataset"] + CONTEXT_BYTES, drawing)
    return found


def rollout_limit(job: Job, card: Card) -> str:
    """What a written token waits for."""
    device, size = card.device(), job.generator
    rows = min(job.at_once, job.examples)
    waits = {
        "arithmetic": 2.0 * size.multiplied * rows / (device.rate * device.efficiency),
        "reading the weights": size.multiplied * job.element / device.bandwidth,
        "launches, one layer after another": size.layers * device.launch,
    }
    return max(waits, key=lambda name: waits[name])
