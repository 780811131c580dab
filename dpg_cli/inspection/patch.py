"""What fine-tuning did to the patch of the LM head that a run keeps: norms, signs, pixel accuracy, what a reader reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpg_cli.errors import UsageError
from dpg_cli.inspection.tensors import TensorFile, read_header
from dpg_cli.patterns.pattern import Pattern, decode_qr, pattern_from_image, pixel_accuracy
from dpg_cli.patterns.render import text_pattern

LARGEST_DRAWN = 100  # rows or columns of a drawing in the terminal
LARGEST_READ = 400  # rows or columns in which a QR code is looked for
_ANY = 2**20


@dataclass(frozen=True)
class Patch:
    """A patch before and after.

    Attributes:
        shape: rows and columns.
        norm_before, norm_after, norm_change: l2 norms.
        unmoved: share of entries that did not change.
        wanted: what the pattern says, if it is a QR code.
        pixel_accuracy: share of signs that equal the pattern's; None without a pattern of that shape.
        read: what zxing-cpp reads in the signs; None if nothing.
        drawing: the signs in half blocks, with a second drawing of the wrong ones; None if it is too large.
    """

    shape: tuple[int, int]
    norm_before: float
    norm_after: float
    norm_change: float
    unmoved: float
    wanted: str | None
    pixel_accuracy: float | None
    read: str | None
    drawing: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the drawing as rows of text."""
        return {**vars(self), "drawing": None if self.drawing is None else self.drawing.split("\n")}


def before_and_after(file: TensorFile) -> tuple[int, int] | None:
    """Shape of the tensors `before` and `after` of a file, if it has such a pair of matrices."""
    pair = [file.tensors.get(name) for name in ("before", "after")]
    if any(tensor is None or len(tensor.shape) != 2 or tensor.size == 0 for tensor in pair):
        return None
    first, last = (tensor.shape for tensor in pair if tensor is not None)
    return (first[0], first[1]) if first == last else None


def read_patch(path: Path, pattern_path: Path | None) -> Patch | None:
    """Look at a `patch.safetensors`.

    Args:
        path: the file.
        pattern_path: the run's `pattern.png`.

    Returns:
        None if there is no such file, or it holds no pair of matrices.

    Raises:
        UsageError: if a file is damaged.
    """
    if not path.is_file():
        return None
    file = read_header(path)
    shape = before_and_after(file)
    if shape is None:
        return None
    totals = np.zeros(3)
    unmoved = 0
    for first, last in zip(file.blocks("before"), file.blocks("after"), strict=True):
        before, after = first.astype(np.float64), last.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            totals += [float(np.sum(np.square(part))) for part in (before, after, after - before)]
            unmoved += int(np.sum(after == before))
    norms = np.sqrt(totals).tolist()
    pattern = read_pattern(pattern_path)
    if pattern is not None and pattern.shape != shape:
        pattern = None
    signs = None
    if max(shape) <= LARGEST_READ:
        with np.errstate(invalid="ignore"):
            change = file.rows("after").astype(np.float64) - file.rows("before").astype(np.float64)
            signs = np.nan_to_num(np.sign(change)).astype(np.int8)
    seeks = signs is not None and shape[0] == shape[1] and (pattern is None or pattern.kind == "qr")
    return Patch(
        shape=shape,
        norm_before=norms[0],
        norm_after=norms[1],
        norm_change=norms[2],
        unmoved=unmoved / (shape[0] * shape[1]),
        wanted=None if pattern is None else pattern.payload,
        pixel_accuracy=None if pattern is None or signs is None else pixel_accuracy(signs, pattern),
        read=decode_qr(signs) if seeks and signs is not None else None,
        drawing=text_pattern(signs, pattern) if signs is not None and max(shape) <= LARGEST_DRAWN else None,
    )


def read_pattern(path: Path | None) -> Pattern | None:
    """The pattern of a run, if it has one.

    Raises:
        UsageError: if the picture is damaged.
    """
    if path is None or not path.is_file():
        return None
    try:
        return pattern_from_image(path, max_rows=_ANY, max_cols=_ANY)
    except UsageError as error:
        raise UsageError(error.cause, "It is the pattern that the run was to show; take it from a copy.") from None
