"""What the experiments' sections and figures share, and all of them together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.store import Row, Store

Axes = Any  # matplotlib's; it is imported only where something is drawn


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def pick(rows: Iterable[Row], **values: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def several(values: Iterable[Any]) -> list[Any]:
    """Different values, in order."""
    return sorted(set(values))


def sections(store: Store, figures: str) -> list[str]:
    """The section of each experiment that has results.

    Args:
        store: the raw results.
        figures: the folder of the pictures, as the page sees it.
    """
    from benchmarks.study.experiments import EXPERIMENTS

    made = []
    for name, module in EXPERIMENTS.items():
        if rows := store.rows(name):
            made.append(module.section(rows).rstrip("\n") + f"\n\n![{module.CAPTION}]({figures}/{name}.png)\n")
    return made


def draw(store: Store, folder: Path) -> None:
    """The picture of each experiment that has results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.study.experiments import EXPERIMENTS

    folder.mkdir(parents=True, exist_ok=True)
    for name, module in EXPERIMENTS.items():
        if rows := store.rows(name):
            figure, axes = pyplot.subplots(1, module.PANELS, figsize=(4.6 * module.PANELS, 3.6), squeeze=False)
            module.figure(rows, axes[0])
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            pyplot.close(figure)
