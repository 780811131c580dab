"""The states of an inner run, kept for the reverse pass: all of them, √T of them, or none in memory.

With n parameters and T steps, a state (θ, m, v) is 3n numbers and a gradient n:

    keep      T states and gradients in memory: 4nT numbers, nothing computed twice
    sqrt      every √T-th state; the rest are computed again, a segment of √T steps at a time: about 7n√T numbers, and
              T - √T more first-order passes (about a quarter more time)
    offload   as keep, but on disk (from an accelerator: in host memory): 4n numbers in memory

All give the same numbers: what is computed again comes from the same operations on the same values. `keep` also takes
what the steps remember for the dual pass (`remembered.py`), of the last ones up to a limit, which rounds differently.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from dpg_cli.engine.inner.optimizers import State
from dpg_cli.engine.inner.remembered import LIMIT, Remembered
from dpg_cli.errors import UsageError

Memory = Literal["keep", "sqrt", "offload"]


class Step(NamedTuple):
    """A step of an inner run: the state before it, its gradient, and products for its dual pass, or None."""

    before: State
    grad: Tensor
    remembered: Remembered | None = None


class Tape(Protocol):
    """States in the order of the steps; `pop` gives them back from the last to the first."""

    def record(self, number: int, step: Step) -> None:
        """Step `number` (counted from 0) is done."""

    def pop(self) -> Step:
        """The last step not yet popped. Its tensors belong to the caller, but for an expanded zero (stride 0)."""
        ...


class KeepTape:
    """Everything in memory; of the remembered products, those of the last steps, up to a limit of bytes."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        self.steps.append(step)
        total = 0
        for place in reversed(range(len(self.steps))):
            remembered = self.steps[place].remembered
            if remembered is None:
                break
            total += remembered.bytes
            if total > LIMIT:
                self.steps[place] = self.steps[place]._replace(remembered=None)

    def pop(self) -> Step:
        """See `Tape`."""
        return self.steps.pop()


class FirstTape(KeepTape):
    """The first two steps alone, where no reverse pass follows."""

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        if number < 2:
            self.steps.append(step)


class SqrtTape:
    """Every √T-th state; the steps between are computed again, a segment at a time.

    Args:
        total: T.
        gradient: (step, θ) -> g.
        update: (step, state, g) -> next state.
    """

    def __init__(
        self, total: int, gradient: Callable[[int, Tensor], Tensor], update: Callable[[int, State, Tensor], State]
    ) -> None:
        self.length = max(1, math.isqrt(max(0, total - 1)) + 1)
        self.last_start = (total - 1) // self.length * self.length
        self.gradient, self.update = gradient, update
        self.checkpoints: list[State] = []
        self.segment: list[Step] = []

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        if number >= self.last_start:
            self.segment.append(step)
        elif number % self.length == 0:
            self.checkpoints.append(step.before)

    def pop(self) -> Step:
        """See `Tape`."""
        if not self.segment:
            start = (len(self.checkpoints) - 1) * self.length
            state = self.checkpoints.pop()
            for number in range(start, start + self.length):
                grad = self.gradient(number, state.theta)
                self.segment.append(Step(state, grad))
                if number < start + self.length - 1:
                    state = self.update(number, state, grad)
        return self.segment.pop()


class OffloadTape:
    """Everything outside the device's memory: on disk for the CPU, in host memory for an accelerator.

    Args:
        total: T.
        like: any flat vector of the run, for size, type and device.

    Raises:
        UsageError: if the temporary folder has too little room.
    """

    def __init__(self, total: int, like: Tensor) -> None:
        self.like = like.new_empty(0)
        self.size = len(like)
        self.on_disk = like.device.type == "cpu"
        self.steps: list[list[Tensor | int | None]] = []
        self.zeros: Tensor = like.new_zeros(1).expand_as(like)
        if self.on_disk:
            folder = Path(tempfile.gettempdir())
            needed, free = total * 4 * self.size * like.element_size(), shutil.disk_usage(folder).free
            if needed > free:
                raise UsageError(
                    f"Offloading {total} states takes {needed / 1e9:.1f} GB of disk; {folder} has {free / 1e9:.1f}.",
                    "Point TMPDIR at a larger disk, or keep states by checkpoints (sqrt).",
                )
            self.file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - it lives as long as the tape

    def _put(self, vector: Tensor) -> Tensor | int | None:
        """A vector's place; None for one without memory of its own, the length 0 for an empty one."""
        if len(vector) == 0:
            return vector
        if vector.stride(0) == 0:
            return None
        if not self.on_disk:
            return vector.to("cpu")
        place = self.file.seek(0, 2)
        view = memoryview(vector.contiguous().numpy()).cast("B")  # type: ignore[arg-type]
        while view:
            view = view[self.file.write(view) :]
        return place

    def _take(self, place: Tensor | int | None) -> Tensor:
        """The vector again."""
        if place is None:
            return self.zeros
        if isinstance(place, Tensor):
            return place.to(self.like.device)
        vector = torch.empty(self.size, dtype=self.like.dtype)
        self.file.seek(place)
        view = memoryview(vector.numpy()).cast("B")  # type: ignore[arg-type]
        while view:
            view = view[self.file.readinto(view) :]
        return vector

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        self.steps.append([self._put(vector) for vector in (*step.before, step.grad)])

    def pop(self) -> Step:
        """See `Tape`."""
        places = self.steps.pop()
        if self.on_disk:  # give the disk back as the reverse goes on
            vectors = [self._take(place) for place in places]
            first = next((place for place in places if isinstance(place, int)), None)
            if first is not None:
                self.file.truncate(first)
        else:
            vectors = [self._take(place) for place in places]
        return Step(State(*vectors[:3]), vectors[3])


class OriginTape:
    """A tape that leaves θ_0 out, because it can be read from the model again.

    Args:
        tape: keeps all the rest.
        read: gives θ_0.
    """

    def __init__(self, tape: Tape, read: Callable[[], Tensor]) -> None:
        self.tape, self.read = tape, read
        self.left = 0

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        self.left = number + 1
        if not number:
            step = step._replace(before=step.before._replace(theta=step.before.theta.new_empty(0)))
        self.tape.record(number, step)

    def pop(self) -> Step:
        """See `Tape`."""
        self.left -= 1
        step = self.tape.pop()
        return step if self.left else step._replace(before=step.before._replace(theta=self.read()))


def make_tape(
    memory: Memory,
    total: int,
    like: Tensor,
    gradient: Callable[[int, Tensor], Tensor],
    update: Callable[[int, State, Tensor], State],
) -> Tape:
    """The tape for a choice of memory; see the module's header.

    Args:
        memory: the choice.
        total: T.
        like: any flat vector of the run.
        gradient, update: what `SqrtTape` computes again with.
    """
    if memory == "keep":
        return KeepTape()
    if memory == "sqrt":
        return SqrtTape(total, gradient, update)
    return OffloadTape(total, like)
