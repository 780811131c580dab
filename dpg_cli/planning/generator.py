"""What the generator's side of an outer step holds and computes: rollout, contexts, and the policy step by what it moves.

With n_g parameters, V · D numbers of its head, M chosen tokens, and a = 2 V D operations a token of the head (counted by PyTorch's
own counter, `tests/test_planning.py`):

    held throughout   n_g; AdamW: gradient and two moments of what is trained, the KL's reference n_g; natural: where it began
    rollout           keys and values 2 · rows · (Q + K) · layers · D_kv, one layer's twice while it grows; six rows × V of logits
    contexts          hidden states N · K · D, and one micro-batch without a graph
    policy, head      four vectors of V · D: the gradient, which becomes the residual, solution, direction, image; q of the chosen tokens, where
                      kept; (3 a, or 2 a where q is kept) a product, 5 a to 7 a around them, and 2 D² V a preconditioning
    policy, beyond    the head's gradient, hidden states' adjoints N · K · D, five vectors of what is trained, the dual pass's activations
    policy, AdamW     activations of a micro-batch: 60 D a token and layer, or with checkpointing D and one layer's; six of logits
"""

from __future__ import annotations

from dpg_cli.engine.inner.head import chunk_logits
from dpg_cli.engine.inner.target import CPU_TOKENS
from dpg_cli.engine.natural.fisher import KEPT
from dpg_cli.engine.reverse.choice import activation_numbers
from dpg_cli.planning.job import Job

ACTIVATIONS, UNGRAPHED, LOGITS = 60, 12, 6  # hidden vectors a token and layer; vectors of one layer; tables of logits
QUANTISED = 2 / 4 + 2 / 256  # two moments of a byte with a scale for 256 of them, in float32 numbers
HEAD_VECTORS, WHOLE_VECTORS, PROBES = 4, 5, 4


def trained(job: Job) -> int:
    """Numbers of the generator that the policy moves."""
    return {"all": job.generator.parameters, "head": job.generator.head, "lora": job.generator.trained}[job.moves]


def resident(job: Job) -> float:
    """Bytes that are held throughout."""
    own = job.generator.parameters
    moments = QUANTISED if job.quantised else 2
    more = trained(job) if job.step == "natural" else (1 + moments) * trained(job) + own * job.reference
    return float((own + more) * job.element)


def rollout_bytes(job: Job, rows: int) -> float:
    """Bytes of sampling so many completions at once."""
    size = job.generator
    columns = job.prompt_tokens + job.completion_tokens
    cache = 2 * rows * columns * size.kv_width * (size.layers + 1)
    reading = rows / job.group_size * job.prompt_tokens * UNGRAPHED * size.width
    return float((cache + max(reading, LOGITS * rows * size.vocabulary)) * job.element)


def hidden_bytes(job: Job) -> float:
    """Bytes of the hidden states that are kept for soft labels and natural steps."""
    return float(job.examples * job.completion_tokens * job.generator.width * job.element) if job.contexts else 0.0


def contexts_bytes(job: Job) -> float:
    """Bytes of making them, besides."""
    columns = job.prompt_tokens + job.completion_tokens
    tokens = job.policy_rows * columns if job.policy_rows < job.examples else max(columns, CPU_TOKENS)
    return float(tokens * UNGRAPHED * job.generator.width * job.element) if job.contexts else 0.0


def sink_bytes(job: Job) -> float:
    """Bytes of the gradient by the head, which grows while the inner run is reversed."""
    if job.step != "natural":
        return 0.0
    bars = job.examples * job.completion_tokens * job.generator.width if job.moves != "head" else 0
    return float((job.generator.head + bars) * job.element)


def policy_bytes(job: Job, rows: int) -> float:
    """Bytes of the policy step, besides what is held and the sink's.

    Args:
        job: sizes.
        rows: completions in memory at once.
    """
    size, length = job.generator, job.prompt_tokens + job.completion_tokens
    tokens, chosen = rows * length, job.chosen
    if job.step == "adamw":
        layers = size.layers + ACTIVATIONS if job.checkpointing else size.layers * ACTIVATIONS
        read = rows * job.completion_tokens
        logits = LOGITS * min(chunk_logits(size.vocabulary), read * size.vocabulary) + 3 * read * size.width
        return float((tokens * layers * size.width + logits) * job.element)
    kept = chosen * size.vocabulary if chosen * size.vocabulary <= KEPT else 0
    read = 2 * chosen * size.width + kept + 4 * chunk_logits(size.vocabulary)
    if job.moves == "head":
        return float(((HEAD_VECTORS - 1) * size.head + read + 6 * size.width**2) * job.element)
    dual = activation_numbers(tokens, length, size.layers, size.width, size.heads)
    return float((WHOLE_VECTORS * trained(job) + read + dual) * job.element)


def policy_operations(job: Job) -> float:
    """Operations of the policy step, of all ranks together."""
    size, length = job.generator, job.prompt_tokens + job.completion_tokens
    if job.step == "adamw":
        passes = 4.0 if job.checkpointing else 3.0
        whole = 2.0 * (passes if job.moves != "lora" else passes - 1) * size.multiplied
        return (whole + 2.0 * size.multiplied * job.reference) * job.examples * length * job.epochs
    chosen, a = job.chosen, 2.0 * size.head
    kept = chosen * size.vocabulary <= KEPT
    products = job.products + 1
    tokens = chosen / job.completion_tokens * length
    if job.moves == "head":
        solves = 2.0 * size.head * size.width * (2 * job.products + 2)
        return chosen * a * ((2 if kept else 3) * products + (1 if kept else 2) + 4) + solves
    backbone = 2.0 * (size.multiplied - size.head) * tokens
    return (4 * products + 3 * PROBES + 4) * backbone + chosen * a * (4 * products + 3 * PROBES + 4)
