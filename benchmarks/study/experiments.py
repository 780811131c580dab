"""The experiments by name, in the order of the page."""

from __future__ import annotations

from types import ModuleType

from benchmarks.study import ablation, credit, fluency, lds, metasmoothness, theorem, transfer

EXPERIMENTS: dict[str, ModuleType] = {
    module.NAME: module for module in (theorem, lds, credit, ablation, metasmoothness, transfer, fluency)
}
