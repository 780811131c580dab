"""The generated part of docs/architecture.md: each room, what belongs in it, its modules, and what it imports.

`python docs/reference.py` writes it; a test fails where page and code differ.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made from the code -->\n", "<!-- end of rooms -->\n"
FIRST = (
    "cli",
    "settings",
    "tiny",
    "models",
    "data",
    "patterns",
    "metrics",
    "engine",
)  # the way of the data, as far as it goes


def about(path: Path) -> str:
    """A module's docstring."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def sentence(text: str) -> str:
    """Its first sentence, on one line."""
    whole = " ".join(text.split("\n\n")[0].split())
    found = re.match(r"(.+?[.:])(?= [A-Z`(]|$)", whole)
    return (found[1] if found else whole).rstrip(":").replace("|", "\\|")


def imports(folder: Path) -> list[str]:
    """The rooms whose modules those of a folder import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dpg_cli."):
                found.add(str(node.module).split(".")[1])
    return sorted(found - {folder.name, "errors", "escape"})


def modules_of(folder: Path) -> list[str]:
    """A line for each module of a folder, those of the rooms within it after its own."""
    lines = [
        f"| `{path.name}` | {sentence(about(path))} |"
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__"
    ]
    for inner in sorted(path for path in folder.iterdir() if (path / "__init__.py").is_file()):
        what = sentence(about(inner / "__init__.py"))
        lines.append(f"| **`{inner.name}/`** | {what} |")
        lines += [
            line.replace("| `", f"| `{inner.name}/", 1) if line.startswith("| `") else line
            for line in modules_of(inner)
        ]
    return lines


def rooms() -> str:
    """All rooms of the package."""
    folders = {path.name: path for path in (ROOT / "dpg_cli").iterdir() if (path / "__init__.py").is_file()}
    order = [*FIRST, *sorted(set(folders) - set(FIRST))]
    lines: list[str] = []
    for name in order:
        text = about(folders[name] / "__init__.py")
        paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
        taken = ", ".join(f"`{other}`" for other in imports(folders[name])) or "none of ours"
        lines += [f"### `{name}/`", "", *[line for part in paragraphs for line in (part, "")]]
        lines += [f"Imports: {taken}.", "", "| module | what it holds |", "|---|---|", *modules_of(folders[name]), ""]
    return "\n".join(lines)


def page() -> str:
    """docs/architecture.md, its generated part made anew."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n" + rooms() + "\n" + END + tail
