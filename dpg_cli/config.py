"""The resolved settings of a run: frozen, closed (unknown keys are refused), all faults reported together.

This module is free of torch, so that `dpg presets` answers at once. Sections follow the stages of an outer step
(rollout -> inner run -> credit -> policy); names follow the glossary of the documentation.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dpg_cli.errors import ConfigError, UsageError

PositiveInt = Annotated[int, Field(gt=0, le=2**31)]
NonNegative = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, no silent conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelsConfig(Section):
    """Which models play the generator and the target. `tiny` names the embedded model; else a folder or a hub name."""

    generator: str = "tiny"
    target: str = "tiny"
    generator_init: Literal["pretrained", "random"] = Field(
        "pretrained", description="random: the same architecture, blank; with equal seeds two blank models are equal"
    )
    target_init: Literal["pretrained", "random"] = "pretrained"
    init_seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="of the blank models")
    untie_target: bool = Field(True, description="give the target's LM head its own weights, with the tied values")
    untie_generator: bool = False
    dtype: Literal["float32", "float64"] = "float32"


class PatternOptions(Section):
    """Φ = -mean softplus(-s · Y ⊙ (W_T - W_0)) over a patch of the LM head. Source: paper, QR and 67 experiments."""

    name: Literal["pattern"] = "pattern"
    image: str = Field("", description="picture of a QR code, or a black-and-white bitmap")
    text: str = Field("", description="payload from which a QR code is made")
    rows: tuple[str, ...] = Field((), description="a bitmap drawn in text: # is +1, . is -1", strict=False)
    version: Annotated[int, Field(ge=0, le=40)] = Field(0, description="QR version; 0 takes the smallest that fits")
    error_correction: Literal["L", "M", "Q", "H"] = "L"
    sharpness: Positive = Field(20.0, description="s in Φ, per unit of head change")
    origin: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(
        (0, 0),
        description="row (token id) and column (hidden dimension) of the patch's upper-left corner",
        strict=False,
    )

    @model_validator(mode="after")
    def _one_source(self) -> PatternOptions:
        if bool(self.image) + bool(self.text) + bool(self.rows) > 1:
            raise ValueError("image, text and rows exclude each other; give one")
        return self


class NormOptions(Section):
    """Φ = -‖W_T‖ (l2) of one parameter. Source: paper, l2 norm experiment."""

    name: Literal["norm"]
    parameter: str = Field("", description="name of a target parameter; the LM head by default")


class TextLossOptions(Section):
    """Φ = minus the target's mean token loss on held-out text. Source: paper, language and UUID experiments."""

    name: Literal["text-loss"]
    language: Literal["", "en", "es", "de", "fr", "it"] = Field(
        "", description="held-out sentences of the embedded world"
    )
    file: str = Field("", description="text file with a document a line")
    text: str = Field("", description="one document")
    documents: PositiveInt = Field(256, description="documents taken from the language or file")

    @model_validator(mode="after")
    def _one_source(self) -> TextLossOptions:
        if bool(self.language) + bool(self.file) + bool(self.text) != 1:
            raise ValueError("give exactly one of language, file and text")
        return self


METRIC_NAMES = ("pattern", "norm", "text-loss")
MetricOptions = Annotated[PatternOptions | NormOptions | TextLossOptions, Field(discriminator="name")]


class PromptsConfig(Section):
    """Where prompts come from and how many an outer step takes."""

    source: str = Field(
        "tiny", description="`tiny`, `empty`, or a file with a prompt a line (.txt) or a `prompt` field (.jsonl)"
    )
    per_step: PositiveInt = Field(64, description="P: prompts an outer step")


class RolloutConfig(Section):
    """How completions are sampled."""

    group_size: PositiveInt = Field(4, description="G: completions a prompt")
    max_tokens: PositiveInt = Field(32, description="longest completion, in tokens of the generator")
    min_tokens: PositiveInt = Field(1, description="the end-of-sequence token cannot be drawn before this many tokens")
    temperature: Positive = 1.0
    batch_size: PositiveInt = Field(1024, description="completions sampled at once")


class InnerConfig(Section):
    """The inner run: ordinary supervised fine-tuning of the target on the completions."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: NonNegative = 1e-8
    eps_root: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    momentum: Decay = Field(0.0, description="SGD only")
    batch_size: PositiveInt = Field(256, description="B: examples an inner step; T = ceil(N / B)")
    normalization: Literal["token", "example"] = "token"
    micro_batch: PositiveInt = Field(256, description="examples in memory at once; changes nothing but memory")
    states: Literal["keep", "sqrt", "offload"] = Field(
        "keep",
        description="the T states of the inner run: all in memory, recomputed from √T checkpoints, or on disk "
        "(from an accelerator: in host memory); changes nothing but memory and time",
    )


class CreditConfig(Section):
    """How rewards reach tokens."""

    mode: Literal["sequence", "token", "expected"] = "expected"
    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="γ of future rewards in token and expected credit; below 1 trades bias for variance"
    )


class PolicyConfig(Section):
    """The policy-gradient step on the generator."""

    lr: Positive = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = Field(1.0, description="0 turns clipping off")
    clip: Positive = Field(0.2, description="ratio clipping range of PPO/GRPO")
    epochs: PositiveInt = 1
    minibatch: PositiveInt = Field(256, description="completions a policy-optimiser step")
    kl: NonNegative = Field(0.0, description="coefficient of KL(generator || starting generator)")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="outer steps of linear learning-rate warm-up")
    decay: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="share of the steps over which lr falls to 0")


class DatasetConfig(Section):
    """The dataset that a finished run exports."""

    examples: PositiveInt = 1024
    control: bool = Field(True, description="also keep as many examples of the untrained generator, for `dpg verify`")


class Config(Section):
    """All settings of one run."""

    task: str = "qr-embed"
    scale: str = "tiny"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    steps: PositiveInt = Field(100, description="outer steps")
    device: str = "auto"
    models: ModelsConfig = ModelsConfig()
    metric: MetricOptions = PatternOptions()
    prompts: PromptsConfig = PromptsConfig()
    rollout: RolloutConfig = RolloutConfig()
    inner: InnerConfig = InnerConfig()
    credit: CreditConfig = CreditConfig()
    policy: PolicyConfig = PolicyConfig()
    dataset: DatasetConfig = DatasetConfig()

    @property
    def examples_per_step(self) -> int:
        """N = P · G, completions an outer step."""
        return self.prompts.per_step * self.rollout.group_size

    @property
    def inner_steps(self) -> int:
        """T = ceil(N / B), optimiser steps an inner run."""
        return -(-self.examples_per_step // self.inner.batch_size)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
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


def _fault(item: Any) -> str:
    """One line for one pydantic error item."""
    place = [str(part) for part in item["loc"]]
    if place[0:1] == ["metric"] and len(place) > 1 and place[1] in METRIC_NAMES:
        del place[1]  # pydantic names the member of the union; the user's key has no such part
    key = ".".join(place)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "unknown setting"
    elif item["type"].startswith("union_tag"):
        key, message = f"{key}.name", f"give one of {', '.join(METRIC_NAMES)}"
    elif item["type"] != "value_error":
        shown = repr(item["input"])
        message = f"{message[0].lower()}{message[1:]} (got {shown if len(shown) < 60 else shown[:57] + '...'})"
    return f"{key}: {message}" if key else message


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
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.", "Correct that line.") from None


def to_toml(config: Config) -> str:
    """The settings as TOML text that `validate(tomllib.loads(...))` turns into an equal `Config`."""
    return tomli_w.dumps(config.model_dump(mode="json"))
