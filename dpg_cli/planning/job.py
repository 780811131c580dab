"""The sizes of an outer step, before it runs: models, a device, and the job that settings describe. No model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from dpg_cli.engine.inner.tape import Memory
from dpg_cli.engine.natural.fisher import KEPT
from dpg_cli.engine.whole.policy import MOST
from dpg_cli.metrics.text_loss import TOKENS
from dpg_cli.models.loading import LanguageModel
from dpg_cli.models.lora import is_adapted
from dpg_cli.settings.config import Config
from dpg_cli.settings.metric_options import PatternOptions, TextLossOptions

UUID_TOKENS = 40  # a UUID has 36 characters


@dataclass(frozen=True)
class Size:
    """A model: parameters (tied ones once), layers, width, heads, vocabulary, the width of keys and values, and how many
    parameters are trained where that is not all of them: those of adapters. Of the parameters, `looked_up` multiply nothing:
    embeddings that the head does not share."""

    parameters: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_width: int
    adapters: int = 0
    looked_up: int = 0

    @property
    def head(self) -> int:
        """Numbers of the LM head."""
        return self.vocabulary * self.width

    @property
    def multiplied(self) -> int:
        """Parameters that a forward pass multiplies each token with."""
        return self.parameters - self.looked_up

    @property
    def trained(self) -> int:
        """Parameters that are trained: the length of states and adjoints."""
        return self.adapters or self.parameters

    @property
    def frozen(self) -> int:
        """Those that are not."""
        return self.parameters - self.trained

    @classmethod
    def of(cls, model: LanguageModel) -> Size:
        """The size of a loaded model."""
        config = model.model.config.get_text_config()
        vocabulary, width = model.head.shape
        heads = getattr(config, "num_attention_heads", 12)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        layers = getattr(config, "num_hidden_layers", 12)
        adapters = model.trained_count if is_adapted(model.model) else 0
        kv_width = width // heads * kv_heads
        return cls(model.parameter_count, layers, width, heads, vocabulary, kv_width, adapters, looked_up(model.model))

    def untied(self) -> Size:
        """With an LM head of its own."""
        return replace(self, parameters=self.parameters + self.head, looked_up=self.looked_up + self.head)


def looked_up(model: nn.Module) -> int:
    """Parameters of a causal LM's embeddings, those that its head shares left out."""
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(table.numel() for table in tables if table is not head)


@dataclass(frozen=True)
class Device:
    """One process's device.

    Attributes:
        name: for tables.
        memory: bytes.
        rate: operations a second of a large matrix product in the run's number format.
        efficiency: share of it that these passes reach.
        bandwidth: bytes a second of its memory.
        link, far_link: bytes a second that it sends to another within a node, and to another node.
        per_node: devices a node.
        launch: seconds that a layer takes at the least where one token of each row is written.
    """

    name: str
    memory: float
    rate: float
    efficiency: float
    bandwidth: float
    link: float
    far_link: float
    per_node: int = 8
    launch: float = 0.0


@dataclass(frozen=True)
class Job:
    """The sizes of an outer step; the letters of the module's header."""

    generator: Size
    target: Size
    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    target_tokens: int
    inner_batch: int
    micro_batch: int
    states: Memory
    minibatch: int
    policy_rows: int
    epochs: int
    at_once: int
    steps: int
    labels: bool = False
    attributed: bool = True
    extra_runs: int = 0
    element: int = 4
    averaged: bool = False
    passes: float = 1.0
    exact: bool = True
    step: Literal["adamw", "natural"] = "adamw"
    moves: Literal["all", "head", "lora"] = "all"
    fisher_tokens: int = 0
    products: int = 10
    reference: bool = False
    soft: bool = False
    hears_noise: bool = False
    checkpointing: bool = False
    quantised: bool = False
    dataset: int = 0
    control: bool = True
    metric_tokens: int = 0

    @property
    def examples(self) -> int:
        """N."""
        return self.prompts * self.group_size

    @property
    def inner_steps(self) -> int:
        """T."""
        return max(1, round(self.passes * -(-self.examples // self.inner_batch)))

    @property
    def contexts(self) -> bool:
        """The hidden states that completions were drawn from are kept."""
        return self.soft or self.step == "natural"

    @property
    def chosen(self) -> int:
        """Tokens that a natural step is taken from."""
        default = max(1, KEPT // self.generator.vocabulary)
        most = self.fisher_tokens or (default if self.moves == "head" else min(MOST, default))
        return min(most, self.examples * self.completion_tokens)

    @property
    def policy_steps(self) -> int:
        """Optimiser steps of the generator."""
        if self.step == "natural":
            return 1
        return -(-self.examples // self.minibatch) * self.epochs


def job_of(config: Config, generator: Size, target: Size, prompt_tokens: int = 0) -> Job:
    """The job that settings describe.

    Args:
        config: the settings.
        generator, target: sizes of their models as trained, heads untied where the settings untie them.
        prompt_tokens: Q, what a prompt takes; 0 takes the limit of the settings.
    """
    method = config.attribution.method
    several = method == "metagradient" and config.attribution_runs > 1
    batch = min(config.inner.batch_size * config.inner.accumulation, config.examples_per_step)
    batch += config.inner.replayed(batch)
    if config.inner.packed_rows:
        batch = -(
            -config.examples_per_step // config.inner.steps_of_epoch(config.examples_per_step, longest_of(config))
        )
    return Job(
        generator=generator,
        target=target,
        prompts=config.prompts.per_step,
        group_size=config.rollout.group_size,
        prompt_tokens=prompt_tokens or config.prompts.max_tokens or 1,
        completion_tokens=config.rollout.max_tokens,
        target_tokens=longest_of(config),
        inner_batch=batch,
        micro_batch=config.inner.micro_batch,
        states=config.inner.states,
        exact=config.inner.second_order == "exact" or config.inner.precision != "float32",
        minibatch=min(config.policy.minibatch, config.examples_per_step),
        policy_rows=config.policy.micro_batch or config.examples_per_step,
        epochs=config.policy.epochs,
        at_once=config.rollout.batch_size,
        steps=config.steps,
        labels=config.credit.mode == "expected" and config.policy.step != "natural",  # which takes them as they come
        attributed=method in ("metagradient", "sgd"),
        extra_runs=int(several or method in ("sgd", "naive")),
        averaged=bool(config.inner.ema),
        element=8 if config.models.dtype == "float64" else 4,
        passes=config.inner_steps / -(-config.examples_per_step // batch),
        step=config.policy.step,
        moves=config.policy.parameters,
        fisher_tokens=config.policy.fisher_tokens,
        products=config.policy.cg_iterations,
        reference=config.policy.kl > 0 and config.policy.step == "adamw",
        soft=config.inner.labels == "soft",
        hears_noise=isinstance(config.metric, PatternOptions) and (config.inner_steps == 1 or config.metric.margin > 0),
        checkpointing=config.policy.gradient_checkpointing,
        quantised=config.policy.optimizer_states == "8bit",
        dataset=config.dataset.examples,
        control=config.dataset.control,
        metric_tokens=read_by(config),
    )


def read_by(config: Config) -> int:
    """Tokens that the metric has in the model at once, at most: a UUID, or a piece of held-out text."""
    if not isinstance(config.metric, TextLossOptions):
        return 0
    return UUID_TOKENS if config.metric.uuid else TOKENS


def longest_of(config: Config) -> int:
    """Tokens of the longest example."""
    return config.inner.max_length or config.rollout.max_tokens + 1
