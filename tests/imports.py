"""Who imports whom, read from the source: modules of the package and of the benchmarks, and the rooms that they stand in."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASES = ("dpg_cli", "benchmarks")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module by its dotted name; a package by that of its folder."""
    found = {}
    for base in BASES:
        for path in sorted((root / base).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> list[tuple[str, list[str]]]:
    """(module, names) of each import of a file, those within functions too; imports for type checkers alone are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(below)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for below in ast.walk(node)
    }
    found: list[tuple[str, list[str]]] = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Which of our modules each of our modules imports."""
    known = modules(root)
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        edges[name] = set()
        for module, names in imported(path):
            for found in [f"{module}.{inner}" for inner in names] or [module]:
                edges[name] |= (
                    {place for place in (found, module) if place in known and place != name}
                    if (found not in known)
                    else {found}
                )
    return edges


def room(module: str) -> str:
    """The folder that a module belongs to, as one speaks of it; `metrics/base.py`, the protocol, counts by itself."""
    parts = module.split(".")
    if module == "dpg_cli.metrics.base":
        return "metrics/base"
    if parts[0] != "dpg_cli":
        return parts[0]
    return parts[1] if len(parts) > 1 else "top"


def rooms(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        found.setdefault(room(name), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in found.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's algorithm would be faster; these graphs are small)."""
    reach: dict[str, set[str]] = {}
    for start in edges:
        seen: set[str] = set()
        ahead = list(edges[start])
        while ahead:
            node = ahead.pop()
            if node not in seen:
                seen.add(node)
                ahead += edges.get(node, ())
        reach[start] = seen
    groups = {tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))) for node in edges}
    return [list(group) for group in sorted(groups) if group]
