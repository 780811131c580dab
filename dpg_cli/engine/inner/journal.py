"""What an inner run and its reverse tell of their progress, so that they can go on after the process was killed.

The engine says when a point is safe to go on from and what must be kept there; how it is kept is the journal's own
(`attribution/work.py` keeps it in a folder). Steps are counted from the first one that is made here. Going on gives the
same numbers: what was made after the last safe point is made again by the same operations on the same values.

    forward   the tape's states are the points; `stepped` says that one more may be relied on
    turn      θ_T, Φ and ∂Φ/∂θ_T
    reverse   the adjoints of the state before a step, and the credits up to there; from then on later states are not needed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from dpg_cli.engine.inner.optimizers import State
from dpg_cli.engine.inner.tape import Memory, Tape


@dataclass
class Course:
    """The figures of the forward run's steps so far.

    Attributes:
        norms: |g_t| before clipping.
        losses: of each step.
        gradient_median: of the first step.
    """

    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_median: float = 0.0


@dataclass(frozen=True)
class Begun:
    """A forward run to go on with: `done` steps are made, `state` is the state after them.

    At the end of the run only θ of that state is there.
    """

    done: int
    state: State
    course: Course


@dataclass
class Backward:
    """How far the reverse is.

    Attributes:
        left: steps that are not reversed yet.
        bars: a query: adjoints of the state before those that are.
        token_Q_N_S: credits so far, of this process's rows.
        visits: credits of visits, (Q, B), of the steps that are reversed, the last step first; empty unless asked for.
        values, measures: Φ and its measures, a query.
        differences: what second derivatives by differences go on from, numbers a query.
    """

    left: int
    bars: list[State]
    token_Q_N_S: Tensor
    visits: list[Tensor]
    values: list[float]
    measures: list[dict[str, float]]
    differences: list[list[float]] = field(default_factory=list)


class Journal(Protocol):
    """Where progress is kept."""

    def tape(
        self,
        memory: Memory,
        total: int,
        like: Tensor,
        gradient: Callable[[int, Tensor], Tensor],
        update: Callable[[int, State, Tensor], State],
    ) -> Tape:
        """The tape of the run, with the states that are kept already; see `tape.make_tape`.

        Raises:
            UsageError: for a memory whose states do not outlive the process.
        """
        ...

    def begun(self, like: Tensor) -> Begun | None:
        """The forward run so far, once the tape is made; None where there is none."""
        ...

    def stepped(self, done: int, course: Course) -> None:
        """The tape has the state before step `done` and all before; `course` is of the steps before it."""

    def backward(self, like: Tensor) -> Backward | None:
        """The reverse so far; None where the forward run is not at its end."""
        ...

    def turned(self, theta: Tensor, course: Course, point: Backward) -> None:
        """The forward run is at its end, with this θ_T; `point` is where the reverse begins."""

    def reversed(self, point: Backward) -> None:
        """The reverse has come to where it may be worth keeping a point; it may be called after every step."""
