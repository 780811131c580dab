"""What a run will cost, before it runs: sizes, memory and time, from the settings and two short timings of this device.

The counts are those of `scaling.py`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dpg_cli.driver.build import Built, build
from dpg_cli.driver.prospect import Prospect
from dpg_cli.driver.trial import try_out
from dpg_cli.engine.inner.product import times
from dpg_cli.engine.natural.scalar import ScalarProspect
from dpg_cli.errors import one_line
from dpg_cli.metrics.merged import plain
from dpg_cli.metrics.pattern import PatternMetric
from dpg_cli.patterns.render import text_pattern
from dpg_cli.planning.job import Device, Size, job_of
from dpg_cli.planning.memory import BASE_BYTES, check_memory, machine_bytes
from dpg_cli.planning.scaling import need_of, predict
from dpg_cli.settings.config import Config

PROBED = 64  # prompts whose length is taken
LARGEST_DRAWN = 100  # rows or columns of a drawing
EFFICIENCY = {  # of a large product's rate that a run's passes reach, by its policy step; docs/scaling.md has what was measured
    "adamw": 0.33,  # between 0.20 and 0.49 on the tiny scale
    "natural": 0.53,  # between 0.47 and 0.63 on prose: most of it is products with the head
}

ROUGH = "times are right to a factor of 2 either way, memory to a fifth, as far as measured (docs/scaling.md: CPU)"


@dataclass(frozen=True)
class Cost:
    """Predicted cost of a run.

    Attributes:
        effect: what the data would be for, in words.
        drawing: the pattern that is asked for, in half blocks; None where there is none, or too large a one.
        generator_parameters, target_parameters: sizes.
        trained_parameters: of the target's; fewer where it has adapters.
        completions_per_step, tokens_per_step: N, and N times the longest completion.
        inner_steps: T.
        processes: that share the run.
        flops_per_step: floating-point operations an outer step, of all processes.
        memory_mb: peak memory of each process: models, states, activations and credits.
        seconds_per_step, seconds: of an outer step and of the run.
        notes: what the engine chose for the target, a sentence each.
        prospect: the least KL of a pattern, where natural steps or a margin ask for it.
    """

    effect: str
    drawing: str | None
    generator_parameters: int
    target_parameters: int
    trained_parameters: int
    completions_per_step: int
    tokens_per_step: int
    inner_steps: int
    processes: int
    flops_per_step: float
    memory_mb: float
    seconds_per_step: float
    seconds: float
    notes: tuple[str, ...] = ()
    prospect: Prospect | ScalarProspect | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "prospect": None if self.prospect is None else self.prospect.as_dict()}

    def as_text(self) -> str:
        """For people."""
        drawing = "" if self.drawing is None else "".join(f"#   {line}\n" for line in self.drawing.split("\n"))
        notes = "".join(f"# {one_line(note)}\n" for note in self.notes)
        shared = f" for each of {self.processes} processes" if self.processes > 1 else ""
        trained = f" ({self.trained_parameters:,} trained)" if self.trained_parameters < self.target_parameters else ""
        return (
            f"# {one_line(self.effect)}\n{drawing}"
            f"# generator {self.generator_parameters:,} parameters, target {self.target_parameters:,}{trained}\n"
            f"# outer step: {self.completions_per_step:,} completions, at most {self.tokens_per_step:,} tokens, "
            f"T = {self.inner_steps}, {self.flops_per_step / 1e9:,.1f} GFLOP\n{notes}"
            f"# estimated{shared}: {self.memory_mb:,.0f} MB, {self.seconds_per_step:.2f} s an outer step, "
            f"{self.seconds / 60:.1f} min in all; {ROUGH}"
            + ("" if self.prospect is None else f"\n# {self.prospect.line()}")
        )


def estimate(config: Config, named_metric: str | None = None, processes: int = 1) -> Cost:
    """Load the models, check every setting against them, try out the smallest piece of the run, and predict the cost.

    Args:
        config: the settings.
        named_metric: what the user gave as --metric.
        processes: that share the run, each with a device like this one.

    Raises:
        UsageError: whatever `dpg run` would refuse, and a need of more memory than the machine has.
    """
    built = build(config, named_metric)
    generator, target = built.players.generator, built.players.target
    job = job_of(config, Size.of(generator), Size.of(target), prompt_tokens(built))
    if built.spec.replay is not None:  # whose rows may be longer
        job = replace(job, target_tokens=max(job.target_tokens, built.spec.replay.examples.ids_N_S.shape[1]))
    predicted = predict(job, this_device(built.device, job.step), processes)
    need = need_of(job, processes)
    # The metagradient and the policy step follow each other: the larger of the two counts.
    other = predicted.bytes - need.bytes
    check_memory(
        need, built.device, states_flag="--set inner.states=", rows_flag="--set inner.micro_batch=", other=other
    )
    notes = try_out(built)
    metric = built.players.metric
    effect, drawing = metric.describe(), None
    metric = plain(metric)
    if isinstance(metric, PatternMetric):
        rows, columns = metric.pattern.shape
        effect += f"; {rows} x {columns} at row {metric.window[0].start}, column {metric.window[1].start}"
        drawing = text_pattern(metric.pattern.signs) if max(rows, columns) <= LARGEST_DRAWN else None
    return Cost(
        effect,
        drawing,
        generator.parameter_count,
        target.parameter_count,
        target.trained_count,
        config.examples_per_step,
        config.examples_per_step * config.rollout.max_tokens,
        config.inner_steps,
        processes,
        predicted.flops,
        (BASE_BYTES + predicted.bytes) / 1e6,
        predicted.seconds,
        predicted.seconds * config.steps,
        notes,
        built.prospect,
    )


def prompt_tokens(built: Built) -> int:
    """Mean tokens of some prompts, as the generator reads them."""
    texts = list(built.prompts.prompts[:PROBED])
    form = built.spec.sampling.prompts
    rows = form.encode(texts) if form is not None else built.players.generator.tokenizer(texts)["input_ids"]
    return max(1, round(sum(map(len, rows)) / len(rows)))


def this_device(device: torch.device, step: str = "adamw") -> Device:
    """This machine's device, timed for a fifth of a second; the links between several are assumed, not measured.

    Args:
        device: of this process.
        step: the policy step of the run.
    """
    link = (300e9, 50e9) if device.type == "cuda" else (1e9, 1e9)
    return Device(
        str(device), machine_bytes(device), matmul_rate(device), EFFICIENCY[step], copy_rate(device), *link
    )  # fmt: skip


def copy_rate(device: torch.device, size: int = 1 << 24) -> float:
    """Bytes a second that a vector's copy reads and writes, timed for about a tenth of a second."""
    source = torch.zeros(size, device=device)
    to = torch.empty_like(source)
    to.copy_(source)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        to.copy_(source)
        float(to[0])
        count += 1
    return 2 * source.element_size() * size * count / (time.perf_counter() - started)


def matmul_rate(device: torch.device, size: int = 1024) -> float:
    """Operations a second of a float32 matrix product as the engine makes it, timed for about a tenth of a second."""
    matrix = torch.randn(size, size, device=device)
    times(matrix, matrix)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < 0.1:
        float(times(matrix, matrix)[0, 0])
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - started)
