"""The resolved settings of a run: frozen, closed (unknown keys are refused), all faults reported together.

This module is free of torch, so that `dpg presets` answers at once. Sections follow the stages of an outer step
(rollout -> inner run -> credit -> policy); names follow the glossary of the documentation.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import uuid4

import tomli_w
from pydantic import Field, ValidationError, field_validator, model_validator

from dpg_cli.errors import ConfigError, UsageError
from dpg_cli.settings.faults import cut, unknown
from dpg_cli.settings.faults import shown as shown
from dpg_cli.settings.inner import InnerConfig, LoraConfig
from dpg_cli.settings.metric_options import (
    FREQUENT,
    FRESH,
    METRIC_NAMES,
    Count,
    MetricOptions,
    NonNegative,
    PatternOptions,
    Positive,
    PositiveInt,
    Section,
    TextLossOptions,
)
from dpg_cli.settings.metric_options import CustomOptions as CustomOptions
from dpg_cli.settings.metric_options import NormOptions as NormOptions
from dpg_cli.settings.policy import PolicyConfig, TrlConfig

LONGEST = 200  # characters of a key that a near one is looked for
DEEPEST = 8  # levels of tables and lists in settings


class ModelsConfig(Section):
    """Which models play the generator and the target. `tiny`, `prose` and `prose-reader` are embedded; else a folder or a hub name."""

    generator: str = "tiny"
    target: str = "tiny"
    generator_init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: the same architecture, blank; with equal seeds two blank models are equal"
    )
    target_init: Literal["pretrained", "random"] = "pretrained"
    redraw_target: bool = Field(
        False, description="another blank target at every outer step: what is learnt then suits any, not one"
    )
    init_seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of the blank models")
    untie_target: bool = Field(True, description="give the target's LM head its own weights, with the tied values")
    untie_generator: bool = False
    dtype: Literal["float32", "float64"] = "float32"


class PromptsConfig(Section):
    """Where prompts come from and how many an outer step takes."""

    source: str = Field(
        "tiny",
        description="`tiny`, `prose`, `empty`, a file of rows (FILE:COLUMN), a datasets folder, or a hub dataset "
        "(OWNER/NAME@CONFIG#SPLIT:COLUMN)",
    )
    per_step: PositiveInt = Field(64, description="P: prompts an outer step")
    limit: Count = Field(
        0, description="only the first so many prompts of a source; 0: all. Hub datasets are then streamed"
    )
    holdout: Count = Field(0, description="prompts at the end of a source, kept for evaluation alone")
    max_tokens: Count = Field(0, description="prompts are cut after so many tokens of the generator; 0: never")
    instruction: str = Field("", description="what the generator is asked, with {text} where the prompt goes")
    chat: Literal["auto", "always", "never"] = Field(
        "auto", description="wrap prompts by the generator's chat template; auto: where it has one"
    )

    @field_validator("instruction")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if value and "{text}" not in value:
            raise ValueError("has no {text} where the prompt goes")
        return value


class RolloutConfig(Section):
    """How completions are sampled."""

    group_size: PositiveInt = Field(4, description="G: completions a prompt")
    max_tokens: PositiveInt = Field(32, description="longest completion, in tokens of the generator")
    min_tokens: PositiveInt = Field(1, description="the end-of-sequence token cannot be drawn before this many tokens")
    temperature: Positive = 1.0
    alphabet: str = Field(
        "",
        description="characters that completions may be made of: other tokens are never drawn, by no generator; empty: all",
    )
    batch_size: PositiveInt = Field(1024, description="completions sampled at once, by each process")
    portable: bool = Field(
        False,
        description="draw completions that do not depend on the number of processes, nor on batch_size or device beyond "
        "rounding; with several processes always so",
    )


class AttributionConfig(Section):
    """What a completion is worth: the metagradient, or one of the paper's controls and ablations."""

    method: Literal["metagradient", "sgd", "naive", "edit-distance", "language-id", "embedding"] = Field(
        "metagradient",
        description="sgd: through an SGD inner run; naive: each example gets Φ of its inner run; the rest read the text",
    )
    sgd_lr: NonNegative = Field(
        0.0,
        description="of the SGD inner run that `sgd` differentiates; 0: its first step is as long as the optimiser's",
    )
    cross_group: bool = Field(
        True, description="completions of one prompt may share an inner run; false: at most one of them in each"
    )
    inner_runs: Annotated[int, Field(ge=0, le=2**31)] = Field(
        0, description="inner runs that share an outer step's completions; 0: one, or G without cross_group"
    )
    language: Literal["", "en", "es", "de", "fr", "it"] = Field(
        "", description="language-id: the asked language, by default the metric's"
    )
    documents: PositiveInt = Field(64, description="edit-distance and embedding: held-out texts to compare with")
    embedding_model: str = Field("", description="embedding: a sentence-transformers folder or hub name")


class CreditConfig(Section):
    """How rewards reach tokens."""

    mode: Literal["sequence", "token", "expected"] = "expected"
    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="γ of future rewards in token and expected credit; below 1 trades bias for variance"
    )


class DatasetConfig(Section):
    """The dataset that a finished run exports."""

    examples: PositiveInt = 1024
    rewards: bool = Field(
        True, description="attribute the examples; false leaves their rewards empty, in about a third of the time"
    )
    control: bool = Field(True, description="also keep as many examples of the untrained generator, for `dpg verify`")
    forbidden: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="words that no example may hold, in any case: those that do are left out of dataset and control, and "
        "`dpg verify` looks for them",
    )

    @field_validator("forbidden")
    @classmethod
    def _words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not word.strip() for word in value):
            raise ValueError("has an empty word, which every text holds")
        return value


class StopConfig(Section):
    """When a run ends before its last outer step."""

    predicted: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="once so many of a pattern's pixels are expected to be right at `dataset.examples`; 0: never",
    )


class CheckpointConfig(Section):
    """When the state of an unfinished run is saved. It changes nothing in the result."""

    every_seconds: NonNegative = Field(
        60.0, description="least time between two checkpoints; writing them takes a twentieth of the time at most"
    )
    every_steps: Annotated[int, Field(ge=0, le=2**31)] = Field(
        0, description="outer steps between two checkpoints, whatever they take; 0 goes by the time"
    )


class Config(Section):
    """All settings of one run."""

    task: str = "qr-embed"
    scale: str = "tiny"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: PositiveInt = Field(100, description="outer steps")
    device: str = "auto"
    trainer: Literal["dpg", "trl"] = Field(
        "dpg", description="who trains the generator: dpg's own loop, or TRL's GRPOTrainer"
    )
    models: ModelsConfig = ModelsConfig()
    metric: MetricOptions = PatternOptions()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    inner: InnerConfig = InnerConfig()
    lora: LoraConfig = LoraConfig()
    attribution: AttributionConfig = AttributionConfig()
    credit: CreditConfig = CreditConfig()
    policy: PolicyConfig = PolicyConfig()
    trl: TrlConfig = TrlConfig()
    dataset: DatasetConfig = DatasetConfig()
    stop: StopConfig = StopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def checkpoints_generator(self) -> bool:
        """Whether activations of the generator are computed again as it goes backwards."""
        return self.policy.gradient_checkpointing or self.trl.gradient_checkpointing

    @property
    def examples_per_step(self) -> int:
        """N = P · G, completions an outer step."""
        return self.prompts.per_step * self.rollout.group_size

    @property
    def inner_steps(self) -> int:
        """T, optimiser steps an inner run; with packed rows at most so many."""
        length = self.inner.max_length or self.rollout.max_tokens + 1
        return self.inner.steps(self.examples_per_step, length)

    @property
    def replay_rows(self) -> int:
        """Own rows that the longest inner run takes, that on an outer step's completions or on the dataset."""
        inner, most = self.inner, max(self.examples_per_step, self.dataset.examples)
        steps = self.inner_steps
        each = -(-most // max(1, inner.steps_of_epoch(self.examples_per_step)))
        return steps * inner.replayed(each)

    @property
    def attribution_runs(self) -> int:
        """Inner runs that an outer step's completions are attributed in."""
        return self.attribution.inner_runs or (1 if self.attribution.cross_group else self.rollout.group_size)

    @property
    def metric_file(self) -> str:
        """`FILE.py:Name` of a custom metric, which every command must be given again; empty for any other metric."""
        path = self.metric.path if isinstance(self.metric, CustomOptions) else ""
        return path if ".py:" in path else ""

    @model_validator(mode="after")
    def _attributable(self) -> Config:
        """Combinations of attribution, credit and metric that have no meaning."""
        attribution, runs, group = self.attribution, self.attribution_runs, self.rollout.group_size
        if attribution.method not in ("metagradient", "sgd") and self.credit.mode != "sequence":
            raise ValueError(
                f"credit.mode: {self.credit.mode!r} needs a value for each token, and attribution.method = "
                f"{attribution.method!r} has one for each example; set credit.mode = 'sequence'"
            )
        if attribution.method == "naive" and runs < 2:
            raise ValueError(
                "attribution.inner_runs: with method = 'naive' and one inner run every completion gets the same reward; "
                "set attribution.cross_group = false, or attribution.inner_runs to at least 2"
            )
        if attribution.cross_group and runs > self.prompts.per_step:
            raise ValueError(
                f"attribution.inner_runs: {runs} are more than the {self.prompts.per_step} groups (prompts.per_step)"
            )
        if not attribution.cross_group and (runs % group or runs > self.examples_per_step):
            raise ValueError(
                f"attribution.inner_runs: without cross_group it must be a multiple of rollout.group_size ({group}), "
                f"at most {self.examples_per_step}"
            )
        if attribution.method in ("edit-distance", "embedding") and self.metric.name != "text-loss":
            raise ValueError(
                f"attribution.method: {attribution.method!r} compares with held-out texts, and the metric "
                f"{self.metric.name!r} has none; it is for text-loss tasks"
            )
        if attribution.method == "language-id" and not (attribution.language or getattr(self.metric, "language", "")):
            raise ValueError("attribution.language: method = 'language-id' needs a language; give en, es, de, fr or it")
        if attribution.method == "embedding" and not attribution.embedding_model:
            raise ValueError("attribution.embedding_model: method = 'embedding' needs a folder or a hub name")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.models.redraw_target and (self.models.target_init != "random" or self.metric.name != "text-loss"):
            raise ValueError(
                'models.redraw_target: needs models.target_init = "random" and a text-loss metric; the others compare with '
                "the weights of one target"
            )
        if self.trainer == "trl" and self.models.redraw_target:
            raise ValueError("trainer: 'trl' has one target; set models.redraw_target = false, or trainer = 'dpg'")
        if self.stop.predicted and (self.metric.name != "pattern" or self.trainer == "trl"):
            raise ValueError(
                "stop.predicted: only the pixels of a pattern are predicted, by trainer = 'dpg'; set it to 0 (any other metric is "
                "driven as far as policy.kl_budget allows)"
            )
        if bool(getattr(self.metric, "margin", 0)) and (self.inner.max_grad_norm or self.inner.optimizer == "muon"):
            what = "inner.max_grad_norm" if self.inner.max_grad_norm else "inner.optimizer = 'muon'"
            raise ValueError(
                f"metric.margin: with {what} the noise of a weight is no function of its own gradients and is not known; set "
                "metric.margin = 0"
            )
        faults = _policy_faults(self) or _target_faults(self)
        if faults:
            raise ValueError(faults)
        if self.rollout.min_tokens > self.rollout.max_tokens:
            raise ValueError(
                f"rollout.min_tokens: {self.rollout.min_tokens} is more than rollout.max_tokens ({self.rollout.max_tokens})"
            )
        if self.credit.mode != "expected" and self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size: {self.rollout.group_size} leaves nothing to compare within a group; "
                f"credit.mode = {self.credit.mode!r} needs at least 2"
            )
        return self


def _policy_faults(config: Config) -> str:
    """Why the policy step or the inner run's labels cannot be as asked; nothing where they can."""
    policy, natural = config.policy, config.policy.step == "natural"
    if getattr(config.metric, "aim", "gradient") == "moments" and not (
        natural
        and config.inner.labels == "soft"
        and config.credit.mode == "expected"
        and bool(getattr(config.metric, "margin", 0))
    ):
        return (
            "metric.aim: 'moments' are brought to metric.margin by natural steps on soft labels; set metric.margin, "
            "policy.step = 'natural', inner.labels = 'soft' and credit.mode = 'expected', or metric.aim = 'gradient'"
        )
    if natural:
        lean = {
            "micro_batch_tokens": policy.micro_batch_tokens != 0,
            "gradient_checkpointing": policy.gradient_checkpointing,
            "precision": policy.precision != "float32",
            "optimizer_states": policy.optimizer_states != "float32",
        }
        for name in [name for name, asked in lean.items() if asked]:
            return f"policy.{name}: is for policy.step = 'adamw'; natural steps have no such thing, leave it out"
    elif policy.parameters == "head" and policy.gradient_checkpointing:
        return "policy.gradient_checkpointing: with policy.parameters = 'head' nothing is kept for the backbone; leave it out"
    if config.trainer == "trl" and policy.micro_batch_tokens:
        return (
            "policy.micro_batch_tokens: TRL takes even micro-batches; set policy.micro_batch, or take trainer = 'dpg'"
        )
    if natural and policy.epochs > 1:
        return "policy.epochs: a natural step is one step on each rollout; set policy.epochs = 1"
    if config.trainer == "trl" and (natural or config.inner.labels == "soft" or policy.parameters != "all"):
        what = "policy.step = 'natural'" if natural else "inner.labels = 'soft'"
        what = what if natural or config.inner.labels == "soft" else f"policy.parameters = {policy.parameters!r}"
        return f"trainer: 'trl' moves all parameters by an optimiser of its own, on drawn labels, and has no {what}; take 'dpg'"
    return ""


def _target_faults(config: Config) -> str:
    """Why the target cannot be trained as asked; nothing where it can."""
    rows, longest = config.inner.packed_rows, config.inner.max_length or config.rollout.max_tokens
    if config.task != "attribute" and 0 < rows < longest:
        return (
            f"inner.packed_rows: rows of {rows} tokens do not hold completions of up to {longest}; set it to at least "
            f"{longest + 1}, or cut examples with inner.max_length"
        )
    natural, soft = config.policy.step == "natural", config.inner.labels == "soft"
    if config.rollout.alphabet and (natural or soft or config.trainer == "trl"):
        what = "policy.step = 'natural'" if natural else "inner.labels = 'soft'" if soft else "trainer = 'trl'"
        return f"rollout.alphabet: {what} reads the whole vocabulary; take AdamW steps of our own loop on drawn labels"
    if config.inner.replay and (natural or soft or bool(getattr(config.metric, "margin", 0)) or config.stop.predicted):
        return (
            "inner.replay: its rows have tokens and no distribution, which inner.labels = 'soft', policy.step = 'natural', "
            "metric.margin and stop.predicted ask for; leave it out, or set labels = 'drawn', step = 'adamw' and the others to 0"
        )
    if config.inner.replay and config.task == "attribute":
        return "inner.replay: is for `dpg run`; what is attributed is your own data already: put all of it into DATA"
    noise = (
        "stop.predicted" if config.stop.predicted else "metric.margin" if getattr(config.metric, "margin", 0) else ""
    )
    if config.inner.ema and noise and config.inner_steps > 1:  # over one step nothing is averaged
        return f"inner.ema: the noise of averaged weights is not known, which {noise} asks for; set one of the two to 0"
    if not config.lora.rank:
        return ""
    if config.models.redraw_target:
        return "lora.rank: adapters are made for one target; set models.redraw_target = false, or lora.rank = 0"
    if noise:
        return f"lora.rank: the noise of an adapter's change is not known, which {noise} asks for; set {noise} = 0, or lora.rank = 0"
    return ""


def validate(data: dict[str, Any]) -> Config:
    """Build a `Config` from nested plain data.

    Args:
        data: nested mapping as parsed from TOML.

    Returns:
        The frozen settings.

    Raises:
        ConfigError: with one line for every fault found, not only the first.
    """
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError([_fault(item) for item in error.errors()]) from None


def settle(config: Config, known: Config | None = None) -> Config:
    """The settings with what they leave to chance drawn: a `fresh` UUID becomes a certain one.

    Args:
        config: the settings.
        known: settings of a run that goes on, whose UUID, or place of frequent rows, is taken over.
    """
    metric = config.metric
    if isinstance(metric, PatternOptions) and metric.origin == FREQUENT and known is not None:
        if not isinstance(known.metric, PatternOptions):
            return config
        return config.model_copy(update={"metric": metric.model_copy(update={"origin": known.metric.origin})})
    if not isinstance(metric, TextLossOptions) or metric.uuid != FRESH:
        return config
    drawn = known.metric.uuid if known is not None and isinstance(known.metric, TextLossOptions) else str(uuid4())
    return config.model_copy(update={"metric": metric.model_copy(update={"uuid": drawn})})


def _fault(item: Any) -> str:
    """One line for one pydantic error item."""
    place, metric = [str(part) for part in item["loc"]], ""
    if place[0:1] == ["metric"] and len(place) > 1 and place[1] in METRIC_NAMES:
        metric = place.pop(1)  # pydantic names the member of the union; the user's key has no such part
    key = ".".join(place)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = unknown(key, Config, metric) if len(key) < LONGEST else "unknown setting"
        if key == "metric.margin" and metric:
            message = (
                "only a pattern has pixels to put beyond their noise; how far any other metric moves is bounded by "
                "policy.kl_budget: z = sqrt(2 · KL · tokens)"
            )
    elif item["type"].startswith("union_tag"):
        key, message = f"{key}.name", f"give one of {', '.join(METRIC_NAMES)}"
    elif item["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]} (got {shown(item['input'])})"
    return f"{cut(key)}: {message}" if key else message


def depth(data: Any) -> int:
    """How deeply tables and lists are nested: 0 for a plain value. Not recursive, so that no nesting is too deep for it."""
    level, layer = 0, [data]
    while layer := [
        inner
        for outer in layer
        if isinstance(outer, dict | list)
        for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        level += 1
    return level


def load_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        UsageError: if the file is missing, unreadable, larger than 1 MB or not TOML.
    """
    try:
        if path.stat().st_size > 1_000_000:
            raise UsageError(
                f"{path} is larger than 1 MB and cannot be a settings file.", "Name a TOML file of settings."
            )
        text = path.read_text(encoding="utf-8")
        if any(part.count(".") > 1000 and '"' not in part for line in text.splitlines() for part in line.split("=")):
            raise RecursionError("a key has too many parts")  # tomllib takes minutes for tens of thousands
        data = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except (ValueError, RecursionError) as error:  # TOML, UTF-8, integers with too many digits, nesting
        raise UsageError(f"{path} is not valid TOML: {str(error)[:200].rstrip('.')}.", "Correct that line.") from None
    if depth(data) > DEEPEST:
        raise UsageError(f"{path} is nested too deeply for settings.", "See `dpg presets show qr-embed` for the keys.")
    return data


def to_toml(config: Config) -> str:
    """The settings as TOML text that `validate(tomllib.loads(...))` turns into an equal `Config`."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
