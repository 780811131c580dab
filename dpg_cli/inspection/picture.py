"""`dpg inspect --render`: the LM head, or any matrix of a file, drawn whole or in part, before, after, or its change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dpg_cli.errors import UsageError
from dpg_cli.escape import pasted, printable
from dpg_cli.inspection.look import kind_of, run_of
from dpg_cli.inspection.patch import before_and_after
from dpg_cli.inspection.tensors import TensorFile, read_header
from dpg_cli.inspection.weights import PATCH, Weights, weights_of
from dpg_cli.patterns.render import render_blocks, row_step
from dpg_cli.runs.folder import RunFolder, command

SHOWS = ("before", "after", "difference")


@dataclass(frozen=True)
class Matrix:
    """A matrix that is read block by block.

    Attributes:
        file: where it lies, or None for values in memory.
        name: of the tensor.
        values: in memory, (R, C); None for a file's.
    """

    file: TensorFile | None
    name: str
    values: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(R, C)."""
        rows, columns = self.values.shape if self.file is None and self.values is not None else self._tensor_shape()
        return rows, columns

    def _tensor_shape(self) -> tuple[int, ...]:
        assert self.file is not None
        return self.file.tensors[self.name].shape

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Some rows, floating-point."""
        part = self.values[start:stop] if self.values is not None else None
        if part is None:
            assert self.file is not None
            part = self.file.rows(self.name, start, stop)
        return part if part.dtype in (np.float32, np.float64) else part.astype(np.float64)


@dataclass(frozen=True)
class Pair:
    """What can be drawn: a matrix, and where it is known what it was before."""

    after: Matrix
    before: Matrix | None
    title: str


def draw(
    path: Path, *, show: str | None = None, window: tuple[int, int, int, int] | None = None, tensor: str | None = None
) -> Image.Image:
    """Draw the LM head of a run's target, of a checkpoint or a model folder, or a tensor of a file.

    Args:
        path: see `look`.
        show: before, after or difference; by default the difference where there is a before, else the values.
        window: row, column, rows and columns of the part to draw; the whole by default.
        tensor: name of the matrix; the LM head by default.

    Raises:
        UsageError: if there is no such matrix, or no before, or the part lies outside.
    """
    if show is not None and show not in SHOWS:
        raise UsageError(f"--show {show!r} is unknown.", f"Choose {', '.join(SHOWS)}.")
    pair = find(path, tensor, needs_before=show != "after")
    if show is None:
        show = "after" if pair.before is None else "difference"
    if show != "after" and pair.before is None:
        raise UsageError(
            f"What {path} was before is not known: --show {show} needs a run or its target.", "Take --show after."
        )
    chosen = pair.before if show == "before" and pair.before is not None else pair.after
    rows, columns = chosen.shape
    row, column, height, width = window or (0, 0, rows, columns)
    if height < 1 or width < 1 or row + height > rows or column + width > columns:
        raise UsageError(
            f"--patch {row},{column},{height},{width} leaves the matrix of {rows} x {columns}.",
            "Give ROW,COL,ROWS,COLS inside of it.",
        )
    minus = pair.before if show == "difference" else None
    words = {"before": "before", "after": "", "difference": "change"}[show]
    place = "" if window is None else f", from row {row}, column {column}"
    title = printable(f"{pair.title}{': ' if words else ''}{words}{place}", 120)
    return render_blocks(_blocks(chosen, minus, row, column, height, width), (height, width), title=title)


def _blocks(
    matrix: Matrix, minus: Matrix | None, row: int, column: int, height: int, width: int
) -> Iterator[np.ndarray]:
    """Rows of a window in blocks that `render_blocks` takes."""
    step = row_step(height)
    size = max(1, 2**22 // matrix.shape[1] // step) * step
    for start in range(row, row + height, size):
        stop = min(start + size, row + height)
        block = matrix.rows(start, stop)[:, column : column + width]
        if minus is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                block = block - minus.rows(start, stop)[:, column : column + width]
        yield block


def find(path: Path, tensor: str | None, needs_before: bool) -> Pair:
    """The matrix that is meant, and its state before if that is known and needed.

    Raises:
        UsageError: if there is none.
    """
    kind = kind_of(path)
    if kind == "run":
        run = RunFolder(path)
        if not run.target.is_dir():
            raise UsageError(
                f"{path} has no target yet: the run is not finished.", f"Finish it: {command('resume', path)}"
            )
        return _of_target(run, tensor, needs_before)
    if kind == "model":
        owner = run_of(path)
        if owner is not None and path.resolve().name == "target":
            return _of_target(owner, tensor, needs_before)
    weights = Weights((read_header(path),)) if kind == "tensors" else weights_of(path)
    if kind == "tensors" and tensor is None and before_and_after(weights.files[0]):
        return Pair(Matrix(weights.files[0], "after"), Matrix(weights.files[0], "before"), path.name)
    after = _matrix(weights, tensor, path)
    return Pair(after, None, f"{path.name}: {after.name}")


def _of_target(run: RunFolder, tensor: str | None, needs_before: bool) -> Pair:
    """A matrix of a run's target, against the base target."""
    weights = weights_of(run.target)
    after = _matrix(weights, tensor, run.target)
    head = weights.head()
    is_head = head is not None and head[1].name == after.name
    title = "LM head of the target" if is_head else after.name
    return Pair(after, _base(run, after, is_head) if needs_before else None, title)


def _base(run: RunFolder, after: Matrix, is_head: bool) -> Matrix:
    """The same matrix of the base target: as the run kept it, or from the model that its settings name."""
    kept = run.target / PATCH
    if is_head and kept.is_file():
        file = read_header(kept)
        if before_and_after(file) == after.shape:
            return Matrix(file, "before")
    import torch

    from dpg_cli.models.fingerprint import require_same
    from dpg_cli.models.loading import load_target
    from dpg_cli.runs.sessions import read_info

    base = load_target(run.read_config().models, torch.device("cpu"))
    if (recorded := read_info(run)[0].fingerprints.get("target")) is not None:
        require_same("target", base, recorded, pasted(run.path))
    name = after.name
    if is_head:
        values = base.head
    else:
        parameters = dict(base.model.named_parameters())
        if name not in parameters:
            raise UsageError(f"The base target has no parameter {name!r}.", "Take --show after.")
        values = parameters[name]
    matrix = Matrix(None, name, values.detach().float().numpy())
    if matrix.shape != after.shape:
        raise UsageError("The base target has another shape than the run's target.", "Take --show after.")
    return matrix


def _matrix(weights: Weights, tensor: str | None, path: Path) -> Matrix:
    """The tensor of that name, or the LM head, or the only matrix there is."""
    if tensor is not None:
        file = weights.find(tensor)
        if file is None:
            names = ", ".join(printable(item.name, 60) for _, item in weights.tensors[:3])
            raise UsageError(f"{path} has no tensor {tensor!r}.", f"For example: {names}.")
        return _checked(Matrix(file, tensor))
    head = weights.head()
    if head is not None:
        return _checked(Matrix(head[0], head[1].name))
    matrices = [(file, item) for file, item in weights.tensors if len(item.shape) == 2]
    if len(matrices) != 1:
        names = ", ".join(printable(item.name, 60) for _, item in matrices[:3]) or "none has two axes"
        raise UsageError(f"{path} has no LM head to draw.", f"Name a matrix with --tensor: {names}.")
    return _checked(Matrix(matrices[0][0], matrices[0][1].name))


def _checked(matrix: Matrix) -> Matrix:
    """A matrix with values in it."""
    shape = matrix._tensor_shape()
    if len(shape) != 2 or 0 in shape:
        raise UsageError(
            f"The tensor {matrix.name!r} of shape {list(shape)} is no matrix to draw.", "Name one with --tensor."
        )
    return matrix
