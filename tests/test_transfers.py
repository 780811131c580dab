"""No silent host work: how often an outer step waits for numbers of the device, by module, held to a named few.

What each of these reads is a decision of the host: when a rollout ends, whether a sum is finite, how wide a micro-batch is, when conjugate
gradients stop, and the figures of the log. None grows with the number of weights.
"""

from __future__ import annotations

from collections import Counter

import pytest
from transfers import Transfers

from dpg_cli.driver.build import build
from dpg_cli.engine import loop
from dpg_cli.settings.presets import find, resolve

TOKENS, PIECES = 6, 16  # of a completion; most pieces that an outer step's completions are taken in here
NAMED = {  # module: most reads, of one outer step without its policy step and rollout
    "engine/metagrad.py": 1,  # whether the weights ran away, all at once
    "engine/records.py": 2 * PIECES,  # the width of a micro-batch, what was given once, and completions by number
    "engine/inner/head.py": 18,  # whether a head is a standard one, on two tokens: of the target, the metric and the policy step
    "engine/inner/target.py": 8,  # tokens of a batch, which places are trained
    "engine/inner/run.py": 6,  # is it finite; the median gradient
    "engine/inner/prefixes.py": 2,  # whether examples begin alike
    "engine/inner/product.py": 10,
    "engine/reverse/dual.py": 6,
    "engine/phi.py": 4,  # Φ itself, and whether it and its gradient are finite
    "engine/arguments.py": 2,  # ids within the vocabulary
    "engine/detect.py": 5,  # figures of the log
    "engine/loop.py": 4,
    "engine/soft.py": 6,  # where a completion cannot end yet
    "engine/noise.py": 4,
    "metrics/": 6,  # measures
}
GENERATOR = 4 * TOKENS + 60  # its stages: four a written token; policy steps, statistics, at most three a product


def counted(preset: str, sets: list[str], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Reads of the second outer step, by module; torch's own optimiser, whose step counts lie on the host, left out."""
    built = build(resolve(find(preset).data(), [f"rollout.max_tokens={TOKENS}", *sets]))
    loop.outer_step(built.players, built.spec, built.prompts.at(0), 0)  # with the engine's self-check
    seen = Transfers()
    with monkeypatch.context() as patched, seen:
        seen.also(patched)
        if built.players.policy_optimizer is not None:
            step = built.players.policy_optimizer.step

            def uncounted() -> None:
                before = seen.counts.copy()
                step()
                seen.counts.clear()
                seen.counts.update(before)

            patched.setattr(built.players.policy_optimizer, "step", uncounted)
        loop.outer_step(built.players, built.spec, built.prompts.at(1), 1)
    modules: Counter[str] = Counter()
    for where, count in seen.counts.items():
        module = where.partition(":")[0]
        known = next((name for name in NAMED if module.startswith(name)), module)
        modules["engine/generator/" if module.startswith(("engine/generator/", "engine/natural/")) else known] += count
    return modules


@pytest.mark.parametrize(
    ("preset", "sets"),
    [
        ("l2-shrink.prose", ["prompts.per_step=8", "inner.batch_size=8", f"rollout.min_tokens={TOKENS}", "policy.cg_iterations=3"]),
        (
            "language-rephrase.tiny",
            ["prompts.per_step=4", "rollout.group_size=2", "inner.batch_size=4", "policy.minibatch=4", "metric.documents=4"],
        ),
    ],
)  # fmt: skip
def test_an_outer_step_waits_for_a_named_few(preset: str, sets: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = counted(preset, sets, monkeypatch)
    generator = found.pop("engine/generator/")
    assert TOKENS < generator <= GENERATOR
    assert found.keys() <= NAMED.keys(), "a new place waits for the device"
    assert {name: count for name, count in found.items() if count > NAMED[name]} == {}
    assert found["engine/metagrad.py"] == 1  # it was one for each parameter


def test_what_is_counted_is_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of read once, and arithmetic not at all."""
    import torch

    values = torch.tensor([1.0, 0.0, 2.0])
    seen = Transfers()
    with monkeypatch.context() as patched, seen:
        seen.also(patched)
        (values * 2 + values.sum()).clamp_min(0)
        assert sum(seen.counts.values()) == 0
        float(values.sum())
        bool(values.any())
        values.nonzero()
        values[values > 0]
        values.tolist()
    assert seen.counts == {"elsewhere": 5}
