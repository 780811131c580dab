"""The states of an inner run, kept for the reverse pass: all of them, √T of them, or none in memory.

With n parameters and T steps, a state (θ, m, v) is 3n numbers and a gradient n:

    keep      T states and gradients in memory: 4nT numbers, nothing computed twice
    sqrt      every √T-th state; the rest are computed again, a segment of √T steps at a time: about 7n√T numbers, and
              T - √T more first-order passes (about a quarter more time)
    offload   as keep, but on disk (from an accelerator: in host memory): 4n numbers in memory

All give the same numbers: what is computed again comes from the same operations on the same values. `keep` also takes
what the steps remember for the dual pass (`remembered.py`), of the last ones up to a limit, which rounds differently.

`sqrt` and `offload` can also keep what they keep in a place that outlives the process (`journal.py`); `resume` then gives
the last state of which they know for certain, to go on from.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, Protocol

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


def segment_length(total: int) -> int:
    """K = ⌈√T⌉, the steps of a segment."""
    return max(1, math.isqrt(max(0, total - 1)) + 1)


class States(Protocol):
    """The states that segments begin with, the last one first out. A list of them is one."""

    def append(self, state: State, /) -> None:
        """Add one."""

    def pop(self) -> State:
        """Take the last one away."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> State:
        """One of them; its tensors belong to the caller once it is popped."""
        ...


class SqrtTape:
    """Every √T-th state; the steps between are computed again, a segment at a time.

    Args:
        total: T.
        gradient: (step, θ) -> g.
        update: (step, state, g) -> next state.
        checkpoints: where the states that segments begin with are kept; None for memory.
    """

    def __init__(
        self,
        total: int,
        gradient: Callable[[int, Tensor], Tensor],
        update: Callable[[int, State, Tensor], State],
        checkpoints: States | None = None,
    ) -> None:
        self.total, self.length = total, segment_length(total)
        self.last_start = (total - 1) // self.length * self.length
        self.gradient, self.update = gradient, update
        self.checkpoints: States = [] if checkpoints is None else checkpoints
        self.segment: list[Step] = []

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        if number % self.length == 0:
            self.checkpoints.append(step.before)
        if number >= self.last_start:
            self.segment.append(step)

    def pop(self) -> Step:
        """See `Tape`."""
        if not self.segment:
            start = (len(self.checkpoints) - 1) * self.length
            stop = min(start + self.length, self.total)
            state = self.checkpoints[-1]
            for number in range(start, stop):
                grad = self.gradient(number, state.theta)
                self.segment.append(Step(state, grad))
                if number < stop - 1:
                    state = self.update(number, state, grad)
        if len(self.segment) == 1:  # the checkpoint is its state
            self.checkpoints.pop()
        return self.segment.pop()

    def resume(self) -> tuple[int, State]:
        """The number of the last step that a state was kept of, and that state; the step is forgotten."""
        state = self.checkpoints[-1]
        self.checkpoints.pop()
        return len(self.checkpoints) * self.length, state


class OffloadTape:
    """Everything outside the device's memory: on disk for the CPU, in host memory for an accelerator.

    Args:
        total: T.
        like: any flat vector of the run, for size, type and device.
        file: open for reading and writing without a buffer: everything goes there, whatever the device, and stays until
            `cut`. None takes a temporary one.

    Raises:
        UsageError: if the temporary folder has too little room.
    """

    def __init__(self, total: int, like: Tensor, file: BinaryIO | None = None) -> None:
        self.like = like.new_empty(0)
        self.size = len(like)
        self.on_disk = like.device.type == "cpu" or file is not None
        self.lasting = file is not None
        self.steps: list[list[Tensor | int | None]] = []
        self.zeros: Tensor = like.new_zeros(1).expand_as(like)
        if file is not None:
            self.file = file
        elif self.on_disk:
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
        view = memoryview(vector.contiguous().cpu().numpy()).cast("B")  # type: ignore[arg-type]
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
            view = view[self.file.readinto(view) :]  # type: ignore[attr-defined]
        return vector.to(self.like.device)

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        self.steps.append([self._put(vector) for vector in (*step.before, step.grad)])

    def pop(self) -> Step:
        """See `Tape`."""
        places = self.steps.pop()
        if self.on_disk:  # give the disk back as the reverse goes on
            vectors = [self._take(place) for place in places]
            if not self.lasting:
                self._truncate(places)
        else:
            vectors = [self._take(place) for place in places]
        return Step(State(*vectors[:3]), vectors[3])

    def _truncate(self, places: list[Tensor | int | None]) -> None:
        first = next((place for place in places if isinstance(place, int)), None)
        if first is not None:
            self.file.truncate(first)

    def index(self) -> list[list[int | None]]:
        """Where each step's vectors lie in a file that lasts: None for zeros, -1 for an empty one."""
        return [[-1 if isinstance(place, Tensor) else place for place in places] for places in self.steps]

    def restore(self, index: list[list[int | None]]) -> None:
        """Take up a file that lasts, with these steps in it."""
        self.steps = [[self.like if place == -1 else place for place in places] for places in index]

    def cut(self) -> None:
        """Give back what lies behind the last step, in a file that lasts."""
        stop = max((place for places in self.steps[-1:] for place in places if isinstance(place, int)), default=None)
        self.file.truncate(0 if stop is None else stop + self.size * self.like.element_size())

    def resume(self) -> tuple[int, State]:
        """The number of the last step, and the state before it; the step is forgotten."""
        step = self.pop()
        self.cut()
        return len(self.steps), step.before


class OriginTape:
    """A tape that leaves θ_0 out, because it can be read from the model again.

    Args:
        tape: keeps all the rest.
        read: gives θ_0.
    """

    def __init__(self, tape: Tape, read: Callable[[], Tensor]) -> None:
        self.tape, self.read = tape, read

    def record(self, number: int, step: Step) -> None:
        """See `Tape`."""
        if not number:
            step = step._replace(before=step.before._replace(theta=step.before.theta.new_empty(0)))
        self.tape.record(number, step)

    def pop(self) -> Step:
        """See `Tape`."""
        step = self.tape.pop()
        return step if len(step.before.theta) else step._replace(before=step.before._replace(theta=self.read()))


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
