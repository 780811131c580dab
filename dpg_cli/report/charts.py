"""Line charts as inline SVG: axes with round numbers, up to three lines told apart by colour and dash, a reference line.

Colours come from the page's style sheet (classes `line-0` …), so that light, dark and printed pages each have their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from dpg_cli.report.text import visible

WIDTH, HEIGHT = 380, 210
RIGHT, TOP, BOTTOM = 12, 12, 34
CHARACTER = 6.2  # width of a figure in the axes' type, for the left margin
MOST_POINTS = 300  # drawn of one line; longer ones keep the lowest and highest value of each stretch

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: what it is.
        points: (outer step, value), finite, by rising step.
    """

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        ident: an id for the page, letters, digits and hyphens.
        title: its heading.
        unit: of the values; may be empty.
        about: one sentence that explains it.
        lines: one to three.
        reference: a value to compare with, drawn as a dashed line, and its label; or None.
        share: the values are shares: the axis spans 0 … 1.
    """

    ident: str
    title: str
    unit: str
    about: str
    lines: tuple[Line, ...]
    reference: tuple[str, float] | None = None
    share: bool = False

    @property
    def summary(self) -> str:
        """The chart in words."""
        parts = []
        for line in self.lines:
            first, last = line.points[0], line.points[-1]
            values = [value for _, value in line.points]
            parts.append(
                f"{line.label}: {short(first[1])} at outer step {short(first[0])}, {short(last[1])} at {short(last[0])}; "
                f"lowest {short(min(values))}, highest {short(max(values))}"
            )
        if self.reference is not None:
            parts.append(f"{self.reference[0]}: {short(self.reference[1])}")
        return ". ".join(parts) + "."

    def svg(self) -> Markup:
        """The chart as an SVG element."""
        return draw(self)


def short(value: float, digits: int = 4) -> str:
    """A number in at most so many significant digits, with a true minus sign."""
    if value == 0:
        return "0"
    text = f"{value:,.0f}" if 10**digits <= abs(value) < 1e6 else f"{value:,.{digits}g}"
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-").replace("-", "\u2212")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten, at most `most` of them."""
    if not high - low > 1e-290:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks of one axis with as many digits as tell them apart."""
    largest = max(abs(value) for value in values)
    step = min((b - a for a, b in pairwise(values)), default=largest) or 1.0
    place = math.floor(math.log10(step) + 1e-9)
    labels = []
    for value in values:
        if abs(value) < step / 1000:
            text = "0"
        elif 1e-4 <= largest < 1e6:
            text = f"{value:,.{max(0, -place)}f}"
        else:
            mantissa, _, power = f"{value:.{max(0, math.floor(math.log10(abs(value))) - place)}e}".partition("e")
            text = f"{mantissa}e{int(power)}"
        labels.append(text.replace("-", "\u2212"))
    return labels


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the first, the last, and the lowest and highest of each stretch of equal length."""
    if len(points) <= most:
        return list(points)
    width = -(-2 * len(points) // most)
    kept = {points[0], points[-1]}
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def span(chart: Chart) -> tuple[float, float]:
    """Lowest and highest value of the vertical axis."""
    values = [value for line in chart.lines for _, value in line.points]
    if chart.reference is not None:
        values.append(chart.reference[1])
    if chart.share:
        return min(0.0, *values), max(1.0, *values)
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def draw(chart: Chart) -> Markup:
    """The SVG of a chart; all text in it is escaped."""
    low, high = span(chart)
    steps = [step for line in chart.lines for step, _ in line.points]
    first, last = min(steps), max(steps)
    heights = ticks(low, high)
    labels = tick_labels(heights)
    left = round(12 + CHARACTER * max(map(len, labels)))
    right = WIDTH - RIGHT

    def across(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return left + share * (right - left)

    def down(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{chart.ident}-t {chart.ident}-d">',
        f'<title id="{chart.ident}-t">{escape(visible(chart.title))}</title>',
        f'<desc id="{chart.ident}-d">{escape(visible(chart.summary))}</desc>',
    ]
    for value, label in zip(heights, labels, strict=True):
        y = down(value)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>')
    for step in (tick for tick in ticks(first, last) if tick == round(tick)):
        x = across(step)
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(short(step))}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(left + right) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">outer step</text>'
    )
    if chart.reference is not None:
        y = down(chart.reference[1])
        parts.append(f'<line class="reference" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, line in enumerate(chart.lines):
        points = [(across(step), down(value)) for step, value in thinned(line.points)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line line-{number}" points="{path}"/>')
        x, y = points[-1]
        parts.append(f'<circle class="dot dot-{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>')
    parts.append("</svg>")
    return Markup("".join(parts))
