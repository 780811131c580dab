"""How long the steps of differences are, and how wrong what they give is.

A step ε along ḡ_t moves each prediction to either side by m = hypot(|ε ḣ| / |h|, |ε ℓ̇|). Truncation is of the order of m²,
rounding of η / m, with η the numbers' relative precision: they balance near m = η^⅓, whatever model, optimiser and direction.
So each inner step measures m of a few rows, by their credits, and takes the ε that makes it `aim` = η^⅓.

Some inner steps (the first of the walk, every fourth power after it, the last) are checked on a quarter of their rows, with
D(4ε), D(ε) and D(ε/4) of credits and of the Hessian-vector product. From

    |D(4ε) - D(ε)|² = (15 T)² + (1 + 1/16) R²          |D(ε) - D(ε/4)|² = (15/16 T)² + (1 + 16) R²

follow truncation T and rounding R at ε: the error is √(T² + R²), and least at ε (R² / 2T²)^⅙, by which `aim` is mended. Steps
between take T ~ m² and R ~ 1 / m from there, with the m of all their rows (for R of all tokens alike).

One-sided differences (`one_sided.py`) have T ~ m: then `aim` begins at η^½, the first differences are (3 T)² and (3/4 T)², and
the error is least at ε (R² / T²)^¼. Their m is |ε ℓ̇|, and they are checked on a sixteenth of the rows.

The error of all credits adds up, over inner steps by the size of their credits: what each one's differences err, and what the
Hessian-vector products of those walked before it erred, by the size of θ̄. Source: DESIGN §7.

A model that jumps (a gate at a tie) moves a prediction as far for a short step as for a long one: where predictions moved by
more than `JUMP`, their credits count as wrong; where a step a hundred times shorter than one that did still moves some so far,
that is enough. A jump or a kink that is met within the step but not at its edge is passed by with a shorter one: its share of D
grows as 1 / ε like rounding's does, so that no equation tells them apart, and a check that ends above `POOR` tries shorter steps.
Checks see few rows and few inner steps. To both sides every step of all rows is also judged by how uneven its sides are
(`central.py`), which in a smooth model goes by m: where they are `UNEVEN` times what a check found for that m, a shorter step
tells which it was. Unevenness that falls with the step was curvature; another is an error, unless a shorter step has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dpg_cli.engine.inner.target import TargetRun
from dpg_cli.engine.records import Examples
from dpg_cli.engine.reverse.differences.central import Differenced, difference_pass, reads_padding
from dpg_cli.engine.reverse.differences.one_sided import Base, one_sided_pass
from dpg_cli.engine.reverse.dual_pass import DualResult
from dpg_cli.engine.soft import LabelSink
from dpg_cli.errors import DegenerateError

WORST = 0.05  # relative error of token credits, beyond which differences are refused
POOR = {2: 5e-3, 1: 2e-2}  # by the order: beyond this error shorter steps are tried
SHORTER = 16.0  # by this factor
UNEVEN = 4.0  # times what is expected of a smooth model
CAUTION = 4.0  # to both sides, predictions are moved by so much less than truncation would ask for: fewer jumps are met
FEW, QUARTER = 16, 4  # a step's length is measured on 1/16 of its rows, its error on 1/4 (one-sided: on 1/16)
TOKENS = 64  # labels, at least, that either is measured on
BEGIN = 1e-3  # of |θ|: the first step tried, in float32
TRIES = 5
FINE = 10.0  # times the error that a step of `aim` would have: good enough not to try a longer one
AGAIN = 3  # times that a batch may be passed, where some of its rows went much further than those measured
JUMP = {2: 0.1, 1: 0.01}  # by the order of the differences
JUMPS = "a short step moves its predictions far: it has jumps (a router at a tie, rounding within), or is very curved"
WIDE = 4.0  # the factor between the three steps of a check


@dataclass(frozen=True)
class Errors:
    """Squares of relative errors at the step taken.

    Attributes:
        truncation, rounding: T² and R².
        order: T goes by this power of the step: 2 to both sides, 1 to one.
    """

    truncation: float
    rounding: float
    order: int = 2

    def scaled(self, factor: float, least: float = 0.0) -> Errors:
        """Those at ε times a factor; or where predictions that count moved so much further, and all of them by `least`."""
        truncation = self.truncation * factor ** (2 * self.order)
        return Errors(truncation, self.rounding / (least or factor) ** 2, self.order)

    def at(self, factor: float) -> float:
        """The relative error at ε times a factor."""
        there = self.scaled(factor)
        return math.sqrt(there.truncation + there.rounding)

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.truncation + other.truncation, self.rounding + other.rounding, self.order)

    @property
    def best(self) -> float:
        """The factor at which the error is least, within the steps that were tried."""
        if not self.rounding > 0 or not self.truncation > 0:
            return 1.0 if self.rounding == self.truncation else WIDE if self.rounding > 0 else 1 / WIDE
        best = (self.rounding / (self.order * self.truncation)) ** (1 / (2 * self.order + 2))
        return min(max(best, 1 / WIDE), WIDE)

    @classmethod
    def of(cls, wide: float, narrow: float, size: float, order: int = 2) -> Errors:
        """From |D(4ε) - D(ε)|², |D(ε) - D(ε/4)|² and |D(ε)|²."""
        if not size > 0:
            return cls(0.0, 0.0, order)
        up, down = (WIDE**order - 1) ** 2, (1 - WIDE**-order) ** 2
        truncation = max(0.0, ((1 + WIDE**2) * wide - (1 + WIDE**-2) * narrow)) / (
            (1 + WIDE**2) * up - (1 + WIDE**-2) * down
        )
        rounding = max(0.0, narrow - down * truncation) / (1 + WIDE**2)
        return cls(truncation / size, rounding / size, order)


@dataclass
class Differences:
    """The second-order passes of one walk, by differences.

    Attributes:
        run: the target.
        remedy: what to do where they are refused.
        walked: inner steps so far.
        aim: how far predictions are moved.
    """

    run: TargetRun
    remedy: str
    walked: int = 0
    aim: float = 0.0
    _precision: float = 0.0  # η
    _length: float = 0.0  # ε |ḡ| of the step before
    # relative errors of an inner step's credits and Hessian-vector product, as they were checked last
    _credits: Errors = field(init=False)
    _product: Errors = field(init=False)
    _reference: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the rows that were checked, see `_moved`
    _excess: float = 0.0  # error of the step by what it met, beyond what checks tell
    _carried: float = 0.0  # square of what all products so far did to θ̄
    _wrong: float = 0.0  # squares of the errors of credits, and of credits
    _all: float = 0.0

    def __post_init__(self) -> None:
        self._credits = self._product = Errors(0.0, 0.0, self.order)

    @property
    def order(self) -> int:
        """The power of the step that truncation goes by."""
        return 1 if self.run.second_order == "one-sided" else 2

    def _differ(
        self, theta: Tensor, direction: Tensor, batch: Examples, weights_B: Tensor, epsilon: float, base: Base, *,
        need_hvp: bool, need_labels: bool | Literal["factors"] = False, sink: LabelSink | None = None, judged: bool = False,
    ) -> Differenced:  # fmt: skip
        """Differences of one step; `judged`: with how uneven its sides are, if it has two."""
        options: dict[str, Any] = {"need_hvp": need_hvp, "need_labels": need_labels, "sink": sink}
        if self.order == 1:
            return one_sided_pass(self.run, theta, direction, batch, weights_B, epsilon, base, **options)
        if judged and not (
            base.grad is not None and reads_padding(self.run, batch)
        ):  # g lacks an embedding's padding row
            options |= {"judged": True, "gradient": base.grad, "clip": base.clip}
        return difference_pass(self.run, theta, direction, batch, weights_B, epsilon, **options)

    def __call__(
        self,
        theta: Tensor,
        direction: Tensor,
        batch: Examples,
        weights_B: Tensor,
        *,
        need_hvp: bool,
        need_labels: bool | Literal["factors"],
        hvp_into: Tensor | None = None,
        remembered: object = None,
        sink: LabelSink | None = None,
        base: Base | None = None,
    ) -> DualResult:
        """See `dual_pass`, of which `remembered` is not used; the inner steps come from the last to the first.

        Args:
            base: what the inner run knows of the batch.

        Raises:
            DegenerateError: if the credits err by more than `WORST`.
        """
        run, number = self.run, self.walked
        self.walked += 1
        length = float(torch.linalg.vector_norm(direction))
        if not 0 < length < math.inf:
            result = difference_pass(
                run, theta, direction, batch, weights_B, 1.0, need_hvp=False, need_labels=need_labels
            )
            hvp = torch.zeros_like(theta) if need_hvp else None
            return DualResult(result.token_B_S, result.label_B_S_V, hvp, result.factor_B_S_2D)
        self._precision = torch.finfo(theta.dtype).eps
        self.aim = self.aim or self._precision ** (1 / (1 + self.order)) / (CAUTION if self.order == 2 else 1.0)
        base = base or Base()
        if self.order == 1:
            labels = bool(need_labels) or sink is not None
            base = base.known(run, theta, batch, weights_B, need_grad=need_hvp, need_losses=not labels)
        epsilon = self._epsilon(theta, direction, length, batch, weights_B, base)
        if _checked(number) or not need_hvp:
            epsilon = self._check(theta, direction, batch, weights_B, epsilon, need_hvp, base)
        found, epsilon = self._pass(theta, direction, batch, weights_B, epsilon, need_hvp, need_labels, sink, base)
        self._length = epsilon * length
        hvp, moved = found.hvp, self._further(found)
        jumped, size = self._account(found, self._credits.scaled(*moved), 0.0 if need_hvp else self._excess)
        if hvp is not None and hvp_into is not None:
            product = float(torch.linalg.vector_norm(hvp))
            hvp = hvp_into.add_(hvp)
            size_after = max(float(torch.linalg.vector_norm(hvp)), torch.finfo(hvp.dtype).tiny)
            error = math.hypot(self._product.scaled(*moved).at(1.0), self._excess)
            self._carried += (error * product / size_after) ** 2
        self._refuse(jumped, size)
        return DualResult(found.token_B_S, found.label_B_S_V, hvp, found.factor_B_S_2D)

    def _pass(
        self, theta: Tensor, direction: Tensor, batch: Examples, weights_B: Tensor, epsilon: float, need_hvp: bool,
        need_labels: bool | Literal["factors"], sink: LabelSink | None, base: Base,
    ) -> tuple[Differenced, float]:  # fmt: skip
        """All rows, and ε; again where that makes it much better, since some went further than those measured, or met a jump."""
        best: tuple[float, Differenced, float] | None = None  # error, and what to return
        before = 0.0  # how uneven a longer step was
        for _ in range(AGAIN):
            found = self._differ(
                theta,
                direction,
                batch,
                weights_B,
                epsilon,
                base,
                need_hvp=need_hvp,
                need_labels=need_labels,
                sink=sink,
                judged=True,
            )
            errors = (self._credits + self._product).scaled(*self._further(found))
            jumped, size = self._jumped(found)
            _, moved, uneven = self._moved(found)
            smooth = self._reference[2] * moved / (self._reference[1] or math.inf)
            allowed = UNEVEN * math.hypot(smooth, 2 * math.sqrt(errors.rounding))
            if before and SHORTER / 2 < before / (uneven or before) < 2 * SHORTER:  # it was curvature
                allowed = uneven
            excess = max(math.sqrt(jumped / size) if size else 0.0, uneven if uneven > allowed else 0.0)
            error = math.hypot(errors.at(1.0), excess)
            if best is None or error < best[0]:
                best, self._excess = (error, found, epsilon), uneven if uneven > allowed else 0.0
            if sink is not None:
                break
            factor = 1 / SHORTER if excess > POOR[self.order] else self._better(errors, 0.3)
            if factor == 1.0:
                break
            before = uneven if factor == 1 / SHORTER else 0.0
            epsilon *= factor
        assert best is not None
        return best[1], best[2]

    def _better(self, errors: Errors, share: float) -> float:
        """The factor of the step that brings an error below a share of itself; 1 where none does.

        No longer step is taken than one that does as well as the precision lets it: it may meet a jump.
        """
        factor, fine = errors.best, FINE * self._precision ** (self.order / (1 + self.order))
        worth = errors.at(factor) < share * errors.at(1.0) and (factor < 1.0 or errors.at(1.0) > fine)
        return factor if worth else 1.0

    def _further(self, found: Differenced) -> tuple[float, float]:
        """How much further than at the last check predictions were moved: those that count, and all."""
        pairs = zip(self._moved(found), self._reference, strict=True)
        count, every, _ = (moved / before if moved > 0 and before > 0 else 1.0 for moved, before in pairs)
        return count, every

    def state(self) -> list[float]:
        """What `go_on` takes, for a walk that goes on in another process."""
        errors = (self._credits, self._product)
        return [
            float(self.walked), self.aim, self._length, *self._reference, self._carried, self._wrong, self._all,
            *(number for each in errors for number in (each.truncation, each.rounding)),
        ]  # fmt: skip

    def go_on(self, state: list[float]) -> None:
        """Go on where another process was."""
        walked, self.aim, self._length, first, second, third, self._carried, self._wrong, self._all, *errors = state
        self.walked, self._reference = int(walked), (first, second, third)
        self._credits, self._product = (Errors(errors[at], errors[at + 1], self.order) for at in (0, 2))

    @property
    def error(self) -> float:
        """The estimated relative error of all token credits so far."""
        return math.sqrt(self._wrong / self._all) if self._all > 0 else 0.0

    def _rows(
        self, batch: Examples, weights_B: Tensor, share: int, turn: int, base: Base
    ) -> tuple[Examples, Tensor, Base]:
        """A share of the batch's rows with at least `TOKENS` labels, others at each turn, and what is known of them."""
        needed = TOKENS * len(batch) // max(1, int(batch.label_N_S.sum()))
        count = min(len(batch), max(1, len(batch) // share, needed))
        start = min(turn * count % len(batch), len(batch) - count)
        some = batch.rows(start, start + count)
        return some, weights_B[start : start + count], base.rows(start, start + count, some.ids_N_S.shape[1])

    def _moved(self, found: Differenced) -> tuple[float, float, float]:
        """m of some rows: (Σ τ² m⁴ / Σ τ²)^¼, what truncation goes by (one-sided: with m², ^½), and the root mean square; and how
        uneven the sides are."""
        credits, moved = found.token_B_S.double(), found.moved_B_S.double()
        sums = (
            credits.square().sum(),
            (credits * moved**self.order).square().sum(),
            (moved > 0).sum(),
            moved.square().sum(),
        )
        size, total, count, plain = (self.run.ranks.total(float(each)) for each in sums)
        weighted = (total / size) ** (0.5 / self.order) if size > 0 else 0.0
        return weighted, math.sqrt(plain / count) if count else 0.0, found.uneven or 0.0

    def _epsilon(
        self, theta: Tensor, direction: Tensor, length: float, batch: Examples, weights_B: Tensor, base: Base
    ) -> float:
        """The step that moves predictions by `aim`."""
        some, weights, known = self._rows(batch, weights_B, FEW, self.walked, base)
        if self.order == 1:
            known = known.known(self.run, theta, some, weights, need_grad=False, need_losses=True)
        step = self._length / length
        if not step:
            own = float(torch.linalg.vector_norm(theta)) or 1.0
            step = BEGIN * own / length * self.aim / torch.finfo(torch.float32).eps ** (1 / 3)
        far = 0.0  # the shortest step that moved predictions by a jump
        for _ in range(TRIES):
            found = self._differ(theta, direction, some, weights, step, known, need_hvp=False)
            moved, _, _ = self._moved(found)
            if JUMP[self.order] < moved < math.inf:
                if step * 100 < far:
                    raise self._refusal(JUMPS)
                far = step
            if not moved < math.inf:
                step /= 100
                continue
            factor = self.aim / moved if moved > 0 else 100.0
            step *= min(max(factor, 1e-3), 1e3)
            if 1 / 3 < factor < 3:
                break
        return step

    def _check(
        self, theta: Tensor, direction: Tensor, batch: Examples, weights_B: Tensor, epsilon: float, need_hvp: bool,
        base: Base,
    ) -> float:  # fmt: skip
        """Measure the errors of a step, and mend it."""
        some, weights, known = self._rows(batch, weights_B, FEW if self.order == 1 else QUARTER, self.walked, base)
        known = known.known(self.run, theta, some, weights, need_grad=need_hvp, need_losses=self.order == 1)

        def mended(epsilon: float) -> tuple[float, Errors, Errors, tuple[float, float, float]]:
            """A step near this one, its errors and how far it moves predictions."""
            for _ in range(2):
                credits, product, moved = self._errors(theta, direction, some, weights, epsilon, need_hvp, known)
                factor = self._better(credits + product, 0.5)
                epsilon *= factor
                if 1 / WIDE < factor < WIDE:
                    break
            rounding = 2 * (product if need_hvp else credits).rounding ** 0.5
            smooth = math.sqrt(max(0.0, moved[2] ** 2 - rounding**2))  # the rest of it falls with longer steps
            reached = moved[0] * factor, moved[1] * factor, smooth * factor
            return epsilon, credits.scaled(factor), product.scaled(factor), reached

        taken = mended(epsilon)
        for turn in range(1, AGAIN):
            if (taken[1] + taken[2]).at(1.0) <= POOR[self.order]:
                break
            shorter = mended(epsilon / SHORTER**turn)
            if (shorter[1] + shorter[2]).at(1.0) < (taken[1] + taken[2]).at(1.0):
                taken = shorter
        self.aim *= taken[0] / epsilon
        _, self._credits, product, self._reference = taken
        if need_hvp:
            self._product = product
        return taken[0]

    def _errors(
        self, theta: Tensor, direction: Tensor, some: Examples, weights: Tensor, epsilon: float, need_hvp: bool,
        base: Base,
    ) -> tuple[Errors, Errors, tuple[float, float, float]]:  # fmt: skip
        """Of credits, and of the Hessian-vector product; and how far predictions are moved."""
        middle: DualResult | None = None
        moved = 0.0, 0.0, 0.0
        sizes, found = [0.0, 0.0], [[0.0, 0.0], [0.0, 0.0]]
        for turn, factor in enumerate((1.0, WIDE, 1 / WIDE)):
            result = self._differ(
                theta, direction, some, weights, factor * epsilon, base, need_hvp=need_hvp, judged=middle is None
            )
            if middle is None:
                middle, moved = result, self._moved(result)
                sizes = [self._square(result.token_B_S, True), 0.0 if result.hvp is None else self._square(result.hvp)]
                continue
            found[0][turn - 1] = self._square(result.token_B_S.sub_(middle.token_B_S), True)
            if result.hvp is not None and middle.hvp is not None:
                found[1][turn - 1] = self._square(result.hvp.sub_(middle.hvp))
        first, second = (
            Errors.of(wide, narrow, size, self.order) for (wide, narrow), size in zip(found, sizes, strict=True)
        )
        return first, second, moved

    def _square(self, values: Tensor, shared: bool = False) -> float:
        """|values|², of all ranks where each has its own rows."""
        square = float(torch.linalg.vector_norm(values)) ** 2
        return self.run.ranks.total(square) if shared else square

    def _jumped(self, found: Differenced) -> tuple[float, float]:
        """The squares of the credits whose predictions jumped, and of all."""
        jumped = found.token_B_S * (found.moved_B_S > JUMP[self.order])
        return self._square(jumped, True), self._square(found.token_B_S, True)

    def _account(self, found: Differenced, errors: Errors, excess: float) -> tuple[float, float]:
        """Count the credits of an inner step, and their error; the squares of those that jumped, and of all.

        Args:
            errors, excess: of the credits.
        """
        jumped, size = self._jumped(found)
        self._all += size
        self._wrong += size * (errors.at(1.0) ** 2 + excess**2 + self._carried) + jumped
        return jumped, size

    def _refuse(self, jumped: float, size: float) -> None:
        cause = ""
        if jumped > WORST**2 * size:
            cause = JUMPS
        elif not self.error <= WORST:
            cause = f"their credits are about {self.error:.0%} off"
        if cause:
            raise self._refusal(cause)

    def _refusal(self, cause: str) -> DegenerateError:
        return DegenerateError(f"Differences of ordinary passes do not suit this target: {cause}.", self.remedy)


def _checked(number: int) -> bool:
    """Whether the inner step walked as this number, from 0, is checked."""
    number += 1
    while number % 4 == 0:
        number //= 4
    return number == 1
