"""What an attribution reports: to the screen, as JSON, and in the record beside the scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dpg_cli.attribution.scores import Scored
from dpg_cli.settings.config import InnerConfig


@dataclass(frozen=True)
class Answer:
    """What the run says of one query.

    Attributes:
        name: of the query.
        metric: what Φ is, in words.
        value, value_before: Φ after and before the fine-tuning.
        measures: readable measures after it.
        helpful, harmful: the examples with the highest and the lowest scores.
    """

    name: str
    metric: str
    value: float
    value_before: float
    measures: dict[str, float]
    helpful: list[Scored] = field(repr=False)
    harmful: list[Scored] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = {side: [row.as_row() for row in getattr(self, side)] for side in ("helpful", "harmful")}
        return {**asdict(self), **sides}


@dataclass(frozen=True)
class Attribution:
    """What attributing left.

    Attributes:
        answers: of each query; the properties are those of the first.
        examples, inner_steps: N (those with something to train on) and the steps that were made.
        data: how the rows were understood, see `data.prepared.Understood`.
        gradient_median: median |g_0|; ε far below it makes the optimiser a sign function.
        epsilon: the same against ε, in words.
        notes: what the engine chose for the target, a sentence each.
        precision_error: relative error of token scores in bf16, of the first and the last step the larger; None in float32.
        difference_error: estimated relative error of token scores by differences, None where they are exact.
        clipped_share: of the steps, on which the gradient was clipped; None where it never is.
        seconds, peak_memory_mb: of the process.
        width: queries that were walked at once.
    """

    answers: list[Answer]
    examples: int
    inner_steps: int
    data: dict[str, Any]
    gradient_median: float
    epsilon: str
    notes: list[str]
    precision_error: float | None
    difference_error: float | None
    clipped_share: float | None
    seconds: float
    peak_memory_mb: float | None
    width: int = 1

    @property
    def metric(self) -> str:
        """What Φ is, in words."""
        return self.answers[0].metric

    @property
    def value(self) -> float:
        """Φ after the fine-tuning."""
        return self.answers[0].value

    @property
    def value_before(self) -> float:
        """Φ before it."""
        return self.answers[0].value_before

    @property
    def measures(self) -> dict[str, float]:
        """Readable measures after it."""
        return self.answers[0].measures

    @property
    def helpful(self) -> list[Scored]:
        """The examples with the highest scores."""
        return self.answers[0].helpful

    @property
    def harmful(self) -> list[Scored]:
        """The examples with the lowest scores."""
        return self.answers[0].harmful


def as_json(result: Attribution) -> dict[str, Any]:
    """A result for JSON: of one query with all of its answer, of several with a list of them."""
    answers = [answer.as_dict() for answer in result.answers]
    data = {name: value for name, value in asdict(result).items() if name != "answers"}
    if len(answers) > 1:
        return {"queries": answers, **data}
    own = {name: value for name, value in answers[0].items() if name != "name"}
    return {**own, **data}


def against_gradient(inner: InnerConfig, median: float) -> str:
    """ε against the gradients of the first step, on one line."""
    if inner.optimizer != "adamw":
        return f"median |g| of the first step {median:.1e}; {inner.optimizer} is linear in it."
    floor = inner.eps + inner.eps_root**0.5
    answers = floor / (floor + median) if floor + median else 1.0
    said = (
        f"median |g| of the first step {median:.1e}, ε {floor:.1e}: an update answers to its gradient by {answers:.0%}"
    )
    if answers >= 0.1:
        return f"{said}."
    return f"{said}; AdamW is nearly sign(g), and scores fade. Try --set inner.eps={median:.0e}"
