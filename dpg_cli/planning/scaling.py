"""A cost model of an outer step on W processes: pure functions of sizes and of a device's rates; no model is loaded.

With n_g and n_t parameters, N completions of K tokens to prompts of Q tokens, target sequences of S tokens, T inner steps of B
examples, and F = 2 n · tokens for a forward pass (source of the counts: DESIGN §2):

    shared by the ranks      rollout: reading 2 n_g P Q, writing 2 n_g N K; inner run 3F; reverse 3F at t = 0 and 8F elsewhere;
                             with `sqrt` about 3F (T - √T) / T more; policy 6 n_g N (Q + K), or a natural step (`generator.py`)
    done by every rank       optimiser steps and adjoints: passes over vectors of n_t numbers, T times each; AdamW on n_g numbers
    sent                     g_t (T times, and what `sqrt` computes again) and Hessian-vector products (T - 1 times), n_t numbers each;
                             the policy's gradient, n_g numbers a mini-batch; a ring all-reduce sends 2 (W - 1) / W of each

A rank's share of B rows is ⌈B / W⌉: the slowest rank is waited for. Writing a token is bound by arithmetic or by reading
the weights once for all rows that are written together, whichever takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dpg_cli.engine.generator.credit import form_of_labels
from dpg_cli.planning.generator import (
    contexts_bytes,
    hidden_bytes,
    policy_bytes,
    policy_operations,
    resident,
    rollout_bytes,
    sink_bytes,
    trained,
)
from dpg_cli.planning.job import Device, Job
from dpg_cli.planning.memory import Need

# read or written, of n numbers: `engine/inner/optimizers/`, torch's AdamW, an iteration of conjugate gradients
UPDATE_VECTORS, ADJOINT_VECTORS, ADAMW_VECTORS, SOLVE_VECTORS = 7, 13, 7, 12
SOFT_LABELS, SUNK_LABELS = (
    4.0,
    2.5,
)  # products with the generator's head a trained token: soft labels, credits of drawn ones
NOISE_TOKENS = 65536  # that a pattern's noise is taken of, `engine/noise.py`


@dataclass(frozen=True)
class Prediction:
    """What an outer step costs on W processes: seconds by part, and bytes that a rank holds, by part and by phase.

    Attributes:
        flops: operations of all ranks.
        sent: bytes that a rank sends.
        seconds_by_part: rollout, contexts (with a pattern's noise), inner run, reverse, policy, every rank's own vectors, sending.
        bytes_by_part: generator, frozen weights of a target with adapters, states, target activations, policy, cache, labels.
        bytes_by_phase: what is held in the rollout, the contexts, the metagradient, the policy step, and the final dataset.
    """

    flops: float
    sent: float
    seconds_by_part: dict[str, float]
    bytes_by_part: dict[str, float]
    bytes_by_phase: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of an outer step; nothing overlaps."""
        return sum(self.seconds_by_part.values())

    @property
    def bytes(self) -> float:
        """A rank's peak: the phases follow each other, the largest counts."""
        return max(self.bytes_by_phase.values())

    def largest(self) -> tuple[str, str]:
        """The part that takes most time, and the one that takes most memory."""
        return tuple(max(parts, key=lambda name: parts[name]) for parts in (self.seconds_by_part, self.bytes_by_part))  # type: ignore[return-value]


def computed_again(job: Job) -> int:
    """Inner steps whose gradient the reverse pass computes once more: all but the last segment, with `sqrt`."""
    if job.states != "sqrt" or not job.attributed:
        return 0
    segment = math.isqrt(max(0, job.inner_steps - 1)) + 1
    return (job.inner_steps - 1) // segment * segment


def operations(job: Job) -> dict[str, float]:
    """Floating-point operations of an outer step by part, of all ranks together."""
    steps, total, visits = job.inner_steps, job.examples, job.examples * job.passes
    forward_t = 2.0 * job.target.multiplied * visits * job.target_tokens
    known = need_of(job).remembered_steps  # each spares its dual pass two forward-sized products, the first step one
    plain, dual = 3.0, 3.0 + 8 * (steps - 1) - 2 * min(known, steps - 1) - (known == steps)
    if job.target.adapters:  # frozen weights have neither gradient nor tangent; counted: docs/log.md
        plain, dual = 2.0, 2.0 + 4 * (steps - 1) - 0.8 * known
    reverse = dual / steps * forward_t if job.attributed else 0.0
    reverse += plain * forward_t * computed_again(job) / steps
    head = 2.0 * job.generator.head * total * job.completion_tokens  # of the generator's distributions, once
    reverse += head * (SOFT_LABELS - 1 if job.soft else SUNK_LABELS if job.step == "natural" else 0) * job.passes
    reverse += 2.0 * job.generator.head * job.chosen if job.step == "natural" else 0.0
    noise = 0.0
    if job.hears_noise:
        share = min(1.0, NOISE_TOKENS / (total * job.completion_tokens))
        noise = share * (head * job.contexts + 2.0 * job.target.multiplied * total * job.target_tokens)
    read, written = job.prompts * job.prompt_tokens, total * job.completion_tokens
    columns = total * (job.prompt_tokens + job.completion_tokens)
    backbone = 2.0 * (job.generator.multiplied - job.generator.head)
    return {
        "rollout": 2.0 * job.generator.multiplied * (read + written),
        "contexts": noise + (backbone * columns if job.contexts else 0.0),
        "inner run": plain * forward_t * (1 + job.extra_runs) + head * job.soft * job.passes,
        "reverse": reverse,
        "policy": policy_operations(job),
    }


def sent_numbers(job: Job) -> tuple[int, int]:
    """Numbers of the target's and of the generator's size that are summed over ranks in an outer step."""
    steps = job.inner_steps
    vectors = steps * (1 + job.extra_runs) + computed_again(job) + (steps - 1 if job.attributed else 0)
    return vectors * job.target.trained, job.policy_steps * trained(job)


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
        metric_tokens=job.metric_tokens,
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
    uneven_policy = -(-job.minibatch // world) * world / job.minibatch if job.step == "adamw" else world
    own_prompts = -(-job.prompts // world)
    rows = min(job.at_once, own_prompts * job.group_size)
    own_vectors = job.inner_steps * (UPDATE_VECTORS + ADJOINT_VECTORS) * job.target.trained
    moved = ADAMW_VECTORS if job.step == "adamw" else SOLVE_VECTORS * job.products
    own_vectors += job.policy_steps * moved * trained(job)
    sent = 2 * (world - 1) / world * sum(sent_numbers(job)) * job.element
    link = device.link if world <= device.per_node else device.far_link
    need = need_of(job, world)
    states = (need.vectors + (world > 1)) * job.target.trained * job.element
    labels = label_numbers(job) * job.element if job.labels else 0
    parts = {
        "generator": resident(job),
        "frozen": float(job.target.frozen * job.element),
        "states": float(states),
        "target activations": need.bytes - need.vectors * job.target.trained * job.element,
        "policy": policy_bytes(job, min(job.policy_rows, -(-job.minibatch // world))),
        "cache": rollout_bytes(job, rows),
        "labels": labels + hidden_bytes(job) + sink_bytes(job),
    }
    target = job.target.parameters * job.element
    return Prediction(
        flops=sum(work.values()),
        sent=sent,
        seconds_by_part={
            "rollout": rollout_seconds(job, device, world),
            "contexts": work["contexts"] / world / pace,
            "inner run": work["inner run"] * uneven / world / pace,
            "reverse": work["reverse"] * uneven / world / pace,
            "policy": work["policy"] * uneven_policy / world / pace,
            "own vectors": own_vectors * job.element / device.bandwidth,
            "sending": sent / link if world > 1 else 0.0,
        },
        bytes_by_part=parts,
        bytes_by_phase={
            "rollout": parts["generator"] + target + parts["cache"],
            "contexts": parts["generator"] + target + hidden_bytes(job) + contexts_bytes(job),
            "metagradient": sum(
                parts[name] for name in ("generator", "frozen", "states", "target activations", "labels")
            ),
            "policy": parts["generator"]
            + target
            + job.target.trained * job.element
            + parts["labels"]
            + parts["policy"],
            "dataset": dataset_bytes(job, world),
        },
    )


def rollout_seconds(job: Job, device: Device, world: int = 1, examples: int = 0) -> float:
    """Seconds that a rank samples: of an outer step, or of so many examples.

    Args:
        job, device, world: see `predict`.
        examples: N; 0 for an outer step's.
    """
    pace = device.rate * device.efficiency
    own = -(-(examples or job.examples) // world)
    rows = min(job.at_once, own)
    weights = job.generator.multiplied * job.element
    token = max(2.0 * job.generator.multiplied * rows / pace, weights / device.bandwidth)
    token = max(token, job.generator.layers * device.launch)
    reading = 2.0 * job.generator.multiplied * own / job.group_size * job.prompt_tokens / pace
    return reading + -(-own // rows) * job.completion_tokens * token


def label_numbers(job: Job) -> int:
    """Numbers that hold the credits of labels: each, or their factors."""
    tokens, size = job.examples * job.target_tokens, job.target
    if form_of_labels(tokens, size.vocabulary, size.width, job.inner_steps) == "factors":
        return 2 * size.width * (tokens + job.inner_steps * size.vocabulary)
    return tokens * size.vocabulary


def dataset_bytes(job: Job, world: int = 1) -> float:
    """A rank's peak while the final dataset and its control are made: drawn tokens, no labels, at most two generators."""
    batch = -(-job.inner_batch * max(job.dataset, 1) // max(1, job.examples))
    need = need_of(replace(job, inner_batch=batch), world)
    need = replace(need, steps=job.inner_steps)
    second = job.generator.parameters * job.element if job.control else 0.0
    return resident(job) + second + job.target.frozen * job.element + need.bytes


def dataset_seconds(job: Job, device: Device, rewards: bool, world: int = 1) -> float:
    """Seconds that the final dataset and its control take: sampling, an inner run on each, and its reverse for rewards."""
    times = 1 + job.control
    scale = job.dataset / job.examples
    work = operations(replace(job, step="adamw", soft=False, hears_noise=False))
    passes = work["inner run"] * times + (work["reverse"] if rewards else 0.0)
    sampling = times * rollout_seconds(job, device, world, job.dataset)
    return sampling + scale * passes / world / (device.rate * device.efficiency)
