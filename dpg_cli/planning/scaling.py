"""A cost model of an outer step on W processes: pure functions of sizes and of a device's rates; no model is loaded.

With n_g and n_t parameters, N completions of K tokens to prompts of Q tokens, target sequences of S tokens, T inner steps of B
examples, and F = 2 n · tokens for a forward pass (source of the counts: DESIGN §2):

    shared by the ranks      rollout: reading 2 n_g P Q, writing 2 n_g N K; inner run 3F; reverse 3F at t = 0 and 8F elsewhere;
                             with `sqrt` about 3F (T - √T) / T more; policy 6 n_g N (Q + K)
    done by every rank       optimiser steps and adjoints: passes over vectors of n_t numbers, T times each; AdamW on n_g numbers
    sent                     g_t (T times, and what `sqrt` computes again) and Hessian-vector products (T - 1 times), n_t numbers each;
                             the policy's gradient, n_g numbers a mini-batch; a ring all-reduce sends 2 (W - 1) / W of each

A rank's share of B rows is ⌈B / W⌉: the slowest rank is waited for. Writing a token is bound by arithmetic or by reading
the weights once for all rows that are written together, whichever takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpg_cli.engine.inner.tape import Memory
from dpg_cli.models.loading import LanguageModel
from dpg_cli.models.lora import is_adapted
from dpg_cli.planning.memory import Need
from dpg_cli.settings.config import Config

UPDATE_VECTORS, ADJOINT_VECTORS, ADAMW_VECTORS = (
    7,
    13,
    7,
)  # read or written, of n numbers: `engine/inner/optimizers/`, torch's AdamW


@dataclass(frozen=True)
class Size:
    """A model: parameters (tied ones once), layers, width, heads, vocabulary, the width of keys and values, and how many
    parameters are trained where that is not all of them: those of adapters."""

    parameters: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    kv_width: int
    adapters: int = 0

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
        return cls(model.parameter_count, layers, width, heads, vocabulary, width // heads * kv_heads, adapters)

    def untied(self) -> Size:
        """With an LM head of its own."""
        return replace(self, parameters=self.parameters + self.vocabulary * self.width)


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
    """

    name: str
    memory: float
    rate: float
    efficiency: float
    bandwidth: float
    link: float
    far_link: float
    per_node: int = 8


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

    @property
    def examples(self) -> int:
        """N."""
        return self.prompts * self.group_size

    @property
    def inner_steps(self) -> int:
        """T."""
        return max(1, round(self.passes * -(-self.examples // self.inner_batch)))

    @property
    def policy_steps(self) -> int:
        """Optimiser steps of the generator."""
        return -(-self.examples // self.minibatch) * self.epochs


@dataclass(frozen=True)
class Prediction:
    """What an outer step costs on W processes: seconds by part, and bytes that a rank holds, by part.

    Attributes:
        flops: operations of all ranks.
        sent: bytes that a rank sends.
        seconds_by_part: rollout, inner run, reverse, policy, every rank's own vectors, sending.
        bytes_by_part: generator, frozen weights of a target with adapters, states, target activations, policy activations, cache, labels.
    """

    flops: float
    sent: float
    seconds_by_part: dict[str, float]
    bytes_by_part: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of an outer step; nothing overlaps."""
        return sum(self.seconds_by_part.values())

    @property
    def bytes(self) -> float:
        """A rank's peak: the metagradient, the policy step and the rollout follow each other, the largest counts."""
        parts = self.bytes_by_part
        passing = (parts["states"] + parts["target activations"], parts["policy activations"], parts["cache"])
        return parts["generator"] + parts["frozen"] + parts["labels"] + max(passing)

    def largest(self) -> tuple[str, str]:
        """The part that takes most time, and the one that takes most memory."""
        return tuple(max(parts, key=lambda name: parts[name]) for parts in (self.seconds_by_part, self.bytes_by_part))  # type: ignore[return-value]


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
        labels=config.credit.mode == "expected",
        attributed=method in ("metagradient", "sgd"),
        extra_runs=int(several or method in ("sgd", "naive")),
        averaged=bool(config.inner.ema),
        element=8 if config.models.dtype == "float64" else 4,
        passes=config.inner_steps / -(-config.examples_per_step // batch),
    )


def longest_of(config: Config) -> int:
    """Tokens of the longest example."""
    return config.inner.max_length or config.rollout.max_tokens + 1


def computed_again(job: Job) -> int:
    """Inner steps whose gradient the reverse pass computes once more: all but the last segment, with `sqrt`."""
    if job.states != "sqrt" or not job.attributed:
        return 0
    segment = math.isqrt(max(0, job.inner_steps - 1)) + 1
    return (job.inner_steps - 1) // segment * segment


def operations(job: Job) -> dict[str, float]:
    """Floating-point operations of an outer step by part, of all ranks together."""
    steps, total, visits = job.inner_steps, job.examples, job.examples * job.passes
    forward_t = 2.0 * job.target.parameters * visits * job.target_tokens
    known = need_of(job).remembered_steps  # each spares its dual pass two forward-sized products, the first step one
    plain, dual = 3.0, 3.0 + 8 * (steps - 1) - 2 * min(known, steps - 1) - (known == steps)
    if job.target.adapters:  # frozen weights have neither gradient nor tangent; counted: docs/log.md
        plain, dual = 2.0, 2.0 + 4 * (steps - 1) - 0.8 * known
    reverse = dual / steps * forward_t if job.attributed else 0.0
    reverse += plain * forward_t * computed_again(job) / steps
    read, written = job.prompts * job.prompt_tokens, total * job.completion_tokens
    return {
        "rollout": 2.0 * job.generator.parameters * (read + written),
        "inner run": plain * forward_t * (1 + job.extra_runs),
        "reverse": reverse,
        "policy": 6.0 * job.generator.parameters * total * (job.prompt_tokens + job.completion_tokens) * job.epochs,
    }


def sent_numbers(job: Job) -> tuple[int, int]:
    """Numbers of the target's and of the generator's size that are summed over ranks in an outer step."""
    steps = job.inner_steps
    vectors = steps * (1 + job.extra_runs) + computed_again(job) + (steps - 1 if job.attributed else 0)
    return vectors * job.target.trained, job.policy_steps * job.generator.parameters


def need_of(job: Job, world: int = 1) -> Need:
    """What a rank's inner run and reverse hold."""
    return Need(
        parameters=job.target.trained,
        element=job.element,
        steps=job.inner_steps,
        states=job.states,
        exact=job.exact,
        rows=min(job.micro_batch, -(-job.inner_batch // world)),
        length=job.target_tokens,
        layers=job.target.layers,
        width=job.target.width,
        heads=job.target.heads,
        vocabulary=job.target.vocabulary,
        batch=-(-job.inner_batch // world),
        averaged=job.averaged,
    )


def predict(job: Job, device: Device, world: int = 1) -> Prediction:
    """Time and memory of an outer step.

    Args:
        job: sizes.
        device: rates of each process's device.
        world: W.
    """
    work = operations(job)
    pace = device.rate * device.efficiency
    # The slowest rank: what it has of each batch, in units of an even share.
    uneven = -(-job.inner_batch // world) * world / job.inner_batch
    uneven_policy = -(-job.minibatch // world) * world / job.minibatch
    own_prompts = -(-job.prompts // world)
    rows = min(job.at_once, own_prompts * job.group_size)
    batches = -(-own_prompts * job.group_size // rows)
    weights = job.generator.parameters * job.element
    token = max(2.0 * job.generator.parameters * rows / pace, weights / device.bandwidth)
    reading = 2.0 * job.generator.parameters * own_prompts * job.prompt_tokens / pace
    own_vectors = job.inner_steps * (UPDATE_VECTORS + ADJOINT_VECTORS) * job.target.trained
    own_vectors += job.policy_steps * ADAMW_VECTORS * job.generator.parameters
    sent = 2 * (world - 1) / world * sum(sent_numbers(job)) * job.element
    link = device.link if world <= device.per_node else device.far_link
    need = need_of(job, world)
    states = (need.vectors + (world > 1)) * job.target.trained * job.element
    length = job.prompt_tokens + job.completion_tokens
    policy_rows = min(job.policy_rows, -(-job.minibatch // world))
    own_logits = job.completion_tokens + 1
    activations = length * job.generator.layers * 60 * job.generator.width + own_logits * 6 * job.generator.vocabulary
    labels = job.examples * job.target_tokens * job.target.vocabulary if job.labels else 0
    return Prediction(
        flops=sum(work.values()),
        sent=sent,
        seconds_by_part={
            "rollout": reading + batches * job.completion_tokens * token,
            "inner run": work["inner run"] * uneven / world / pace,
            "reverse": work["reverse"] * uneven / world / pace,
            "policy": work["policy"] * uneven_policy / world / pace,
            "own vectors": own_vectors * job.element / device.bandwidth,
            "sending": sent / link if world > 1 else 0.0,
        },
        bytes_by_part={
            "generator": 4.0 * weights,
            "frozen": float(job.target.frozen * job.element),
            "states": float(states),
            "target activations": need.bytes - need.vectors * job.target.trained * job.element,
            "policy activations": float(policy_rows * activations * job.element),
            "cache": float(2 * rows * length * job.generator.layers * job.generator.kv_width * job.element),
            "labels": float(labels * job.element),
        },
    )
