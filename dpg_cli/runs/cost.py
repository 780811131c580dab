"""What a run will cost, before it runs: sizes, memory and time, from the settings and a short matrix-product timing.

Counts (F = one forward pass over an outer step's completions, 2 · parameters · tokens operations; source: DESIGN §2):
rollout F, inner run 3F, reverse pass 3F at t = 0 (dual forward) and 8F at every other inner step, policy step 3F.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dpg_cli.config import Config
from dpg_cli.errors import one_line
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.render import text_pattern
from dpg_cli.runs.build import build
from dpg_cli.runs.memory import BASE_BYTES, Need, check_memory

LARGEST_DRAWN = 100  # rows or columns of a drawing
EFFICIENCY = 0.23  # of a large matrix product's rate that these passes reach; measured on the tiny scale: docs/log.md


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a run.

    Attributes:
        effect: what the data would be for, in words.
        drawing: the pattern that is asked for, in half blocks; None where there is none, or too large a one.
        generator_parameters, target_parameters: sizes.
        completions_per_step, tokens_per_step: N, and N times the longest completion.
        inner_steps: T.
        flops_per_step: floating-point operations an outer step.
        memory_mb: peak memory of states, activations and credits.
        seconds_per_step, seconds: of an outer step and of the run.
    """

    effect: str
    drawing: str | None
    generator_parameters: int
    target_parameters: int
    completions_per_step: int
    tokens_per_step: int
    inner_steps: int
    flops_per_step: float
    memory_mb: float
    seconds_per_step: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """For people."""
        drawing = "" if self.drawing is None else "".join(f"#   {line}\n" for line in self.drawing.split("\n"))
        return (
            f"# {one_line(self.effect)}\n{drawing}"
            f"# generator {self.generator_parameters:,} parameters, target {self.target_parameters:,}\n"
            f"# outer step: {self.completions_per_step:,} completions, at most {self.tokens_per_step:,} tokens, "
            f"T = {self.inner_steps}, {self.flops_per_step / 1e9:,.1f} GFLOP\n"
            f"# estimated: {self.memory_mb:,.0f} MB, {self.seconds_per_step:.2f} s an outer step, "
            f"{self.seconds / 60:.1f} min in all"
        )


def estimate(config: Config, named_metric: str | None = None) -> Cost:
    """Load the models, check every setting against them, and predict the cost.

    Args:
        config: the settings.
        named_metric: what the user gave as --metric.

    Raises:
        UsageError: whatever `dpg run` would refuse, and a need of more memory than the machine has.
    """
    built = build(config, named_metric)
    generator, target = built.players.generator, built.players.target
    tokens = config.examples_per_step * config.rollout.max_tokens
    steps = config.inner_steps
    forward_g, forward_t = 2.0 * generator.parameter_count * tokens, 2.0 * target.parameter_count * tokens
    reverse = (3 + 8 * (steps - 1)) / steps * forward_t
    method = config.attribution.method
    if method not in ("metagradient", "sgd"):
        reverse = 0.0
    # Φ is read from a run of its own, unless the rewards come from that very run or from the text
    inner_runs = 1 + (method in ("sgd", "naive") or (method == "metagradient" and config.attribution_runs > 1))
    flops = (1 + 3) * forward_g + 3 * inner_runs * forward_t + reverse
    element = 8 if config.models.dtype == "float64" else 4
    vocabulary, width = generator.head.shape
    layers = getattr(generator.model.config, "num_hidden_layers", 12)
    rows = min(config.policy.minibatch, config.examples_per_step)
    policy = rows * (config.rollout.max_tokens + 1) * (6 * vocabulary + layers * 60 * width)
    credits = tokens * target.head.shape[0] if config.credit.mode == "expected" else 0
    always = (4 * generator.parameter_count + credits) * element
    need = Need.of(
        target,
        steps,
        min(config.inner.micro_batch, config.inner.batch_size, config.examples_per_step),
        config.rollout.max_tokens + 1,
        config.inner.states,
    )
    # The metagradient and the policy step follow each other: the larger of the two counts.
    other = always + max(0.0, policy * element - need.bytes)
    check_memory(
        need, built.device, states_flag="--set inner.states=", rows_flag="--set inner.micro_batch=", other=other
    )
    seconds = flops / (matmul_rate(built.device) * EFFICIENCY)
    metric = built.players.metric
    effect, drawing = metric.describe(), None
    if isinstance(metric, PatternMetric):
        rows, columns = metric.pattern.shape
        effect += f"; {rows} x {columns} at row {metric.window[0].start}, column {metric.window[1].start}"
        drawing = text_pattern(metric.pattern.signs) if max(rows, columns) <= LARGEST_DRAWN else None
    return Cost(
        effect,
        drawing,
        generator.parameter_count,
        target.parameter_count,
        config.examples_per_step,
        tokens,
        steps,
        flops,
        (BASE_BYTES + need.bytes + other) / 1e6,
        seconds,
        seconds * config.steps,
    )


def matmul_rate(device: torch.device, size: int = 1024) -> float:
    """Operations a second of a float32 matrix product, timed for about a tenth of a second."""
    matrix = torch.randn(size, size, device=device)
    matrix @ matrix
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        float((matrix @ matrix)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
