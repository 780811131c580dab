"""The experiments by name, in the order of the page; their sections and figures together."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from benchmarks.study import ablation, credit, fluency, lds, metasmoothness, theorem, transfer
from benchmarks.study.store import Store

EXPERIMENTS: dict[str, ModuleType] = {
    module.NAME: module for module in (theorem, lds, credit, ablation, metasmoothness, transfer, fluency)
}


def sections(store: Store, figures: str) -> list[str]:
    """The section of each experiment that has results.

    Args:
        store: the raw results.
        figures: the folder of the pictures, as the page sees it.
    """
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

    folder.mkdir(parents=True, exist_ok=True)
    for name, module in EXPERIMENTS.items():
        if rows := store.rows(name):
            figure, axes = pyplot.subplots(1, module.PANELS, figsize=(4.6 * module.PANELS, 3.6), squeeze=False)
            module.figure(rows, axes[0])
            figure.tight_layout()
            figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
            pyplot.close(figure)
