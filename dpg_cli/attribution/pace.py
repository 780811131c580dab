"""How long an attribution still takes, from what its steps took.

A step of the reverse costs what a step of the fine-tuning costs times a ratio that is known from counting products
(DESIGN §2); with `sqrt` a step of the fine-tuning besides, where its segment is computed again. So the fine-tuning already
tells how long all of it takes, and the reverse corrects that as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from dpg_cli.engine.inner.tape import Memory, segment_length

FEW = 3  # steps, before which nothing is said


class Pace:
    """Estimates the seconds that are left.

    Args:
        memory: which states are kept.
        queries: Q; a run for each group of them, where they are not all walked at once.
        adapters: adapters alone are trained.
        clock: seconds.
    """

    def __init__(
        self, memory: Memory, queries: int = 1, *, adapters: bool = False, clock: Callable[[], float] = monotonic
    ) -> None:
        self.memory, self.clock = memory, clock
        first, shared, own = (2.0, 2.0, 2.0) if adapters else (3.0, 2.0, 6.0)
        self.ratio = (shared + own * queries) / first
        self.begun: dict[str, tuple[float, int]] = {}
        self.forward: float | None = None

    def left(self, phase: str, done: int, total: int) -> float | None:
        """Seconds that are left, to be called after each step; None while too little is known.

        Args:
            phase: "forward" or "reverse".
            done, total: its steps.
        """
        now = self.clock()
        since, first = self.begun.setdefault(phase, (now, done))
        made = done - first
        if phase == "forward":
            if made < FEW:
                return None
            self.forward = (now - since) / made
            return self.forward * (total - done + self.ratio * total + self._again(0, total))
        again = self._again(first, total) - self._again(done, total)
        if made < FEW:
            if self.forward is None:
                return None
            step = self.forward * self.ratio
        elif self.forward is not None:
            step = max(0.0, now - since - self.forward * again) / made
        else:
            step = (now - since) / (made + again / self.ratio)
        forward = step / self.ratio if self.forward is None else self.forward
        return step * (total - done) + forward * self._again(done, total)

    def _again(self, done: int, total: int) -> int:
        """Steps of the fine-tuning that are still to be computed again when so many are reversed."""
        if self.memory != "sqrt":
            return 0
        length = segment_length(total)
        last = (total - 1) // length * length  # of the last segment nothing is computed again
        left = total - done
        return last if left >= last else left // length * length
