"""Pictures of what training did to the LM head: a patch with its decoded pattern, a whole matrix, a terminal drawing.

Numbers are shown by a diverging colour map, white at 0, on a symmetric scale: blue is positive, orange negative. Both
ends are about equally dark: colour-blind readers see the hue, and scanners see nothing but the black and white pattern.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dpg_cli.errors import UsageError
from dpg_cli.patterns.pattern import QUIET_ZONE, Pattern

INK, MUTED, RULE, RED = (26, 32, 44), (100, 110, 125), (205, 211, 219), (220, 30, 40)
_STOPS = np.array(
    [[150, 66, 0], [222, 129, 42], [250, 200, 145], [255, 255, 255], [158, 202, 240], [58, 143, 209], [8, 81, 156]]
)
_GLYPHS = "±·…“”‘’"  # what Pillow's font knows beyond ASCII, of use here
_MARGIN, _GAP, _PANEL = 36, 24, 290
_LARGEST = 1200  # pixels: matrices larger than that are averaged, smaller ones magnified up to it


def render_patch(before: np.ndarray, after: np.ndarray, pattern: Pattern, *, title: str, subtitle: str) -> Image.Image:
    """Four panels side by side: the patch before, after, the change, and the signs of the change as a scannable code.

    Cells whose sign differs from the pattern are outlined in red; a change of exactly 0 is drawn grey.

    Args:
        before: patch of the LM head before SFT, float (R, C).
        after: the same patch after SFT.
        pattern: the signs aimed at, (R, C).
        title: heading, for example the payload.
        subtitle: line below it, for example the pixel accuracy.
    """
    if not np.shape(before) == np.shape(after) == pattern.shape:
        raise ValueError(f"patches of shape {np.shape(before)} and {np.shape(after)} for a pattern of {pattern.shape}")
    first, last = _finite(before), _finite(after)
    with np.errstate(invalid="ignore", over="ignore"):
        change = _finite(np.subtract(after, before))  # what is not finite has no sign, and is wrong
    wrong = np.sign(change) != pattern.signs
    weights, moved = _extent(first, last), _extent(change)
    rows, columns = pattern.shape
    border = QUIET_ZONE if pattern.kind == "qr" else 1
    longest = max(rows, columns)
    panel = max(_PANEL, 3 * (longest + 2 * border)) if longest <= 177 else _PANEL  # all QR versions stay scannable
    bare, framed = max(1, panel // longest), max(1, panel // (longest + 2 * border))
    signs = np.select([change > 0, change < 0], [0, 255], 176).astype(np.uint8)
    code = np.pad(signs, border, constant_values=255)[..., None].repeat(3, axis=2)
    marked = np.pad(wrong, border)
    count = f"all {wrong.size:,} as intended" if not wrong.any() else f"{wrong.sum():,} of {wrong.size:,} wrong"
    panels = [
        ("Before", _cells(_colours(first, weights), bare), weights, "weights"),
        ("After fine-tuning", _cells(_colours(last, weights), bare), weights, "weights"),
        ("Change", _cells(_colours(change, moved), bare, wrong), moved, "after - before"),
        ("Sign of the change", _cells(code, framed, marked), None, count),
    ]
    width = max(panel, *(picture.width for _, picture, _, _ in panels))
    height = max(panel, *(picture.height for _, picture, _, _ in panels))
    canvas = Image.new("RGB", (2 * _MARGIN + 4 * width + 3 * _GAP, 2 * _MARGIN + height + 170), "white")
    draw = ImageDraw.Draw(canvas)
    _heading(draw, title, subtitle, canvas.width - 2 * _MARGIN)
    top = _MARGIN + 112
    for place, (label, picture, extent, note) in enumerate(panels):
        left = _MARGIN + place * (width + _GAP) + (width - picture.width) // 2
        _write(draw, (left, top - 30), label, 18, INK, width)
        _framed(canvas, picture, (left, top + (height - picture.height) // 2))
        below = top + height + 14
        if extent is None:
            _write(draw, (left, below - 3), note, 15, RED if wrong.any() else INK, width)
            _write(draw, (left, below + 17), "black: up · white: down · grey: 0", 15, MUTED, width)
        else:
            _legend(canvas, (left, below), max(picture.width, 160), extent, note)
    return canvas


def pattern_image(pattern: Pattern) -> Image.Image:
    """The pattern itself: a QR code of 8-pixel modules with its quiet zone, a bitmap with one pixel an entry.

    `pattern_from_image` reads either back.
    """
    pixels = np.where(pattern.signs > 0, 0, 255).astype(np.uint8)
    if pattern.kind == "qr":
        pixels = np.pad(pixels, QUIET_ZONE, constant_values=255).repeat(8, 0).repeat(8, 1)
    return Image.fromarray(pixels)


def render_matrix(values: np.ndarray, *, title: str) -> Image.Image:
    """A whole matrix by the diverging colour map, with its smallest and largest entry.

    Cells are squares of whole pixels. A side longer than 1,200 entries is averaged over stretches of equal length.

    Args:
        values: float (R, C), up to a full head such as 50257 x 768. Entries that are not finite are drawn as 0.
        title: heading.
    """
    values = np.asarray(values)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"a matrix is needed, not an array of shape {values.shape}")
    return render_blocks([values], (values.shape[0], values.shape[1]), title=title)


def row_step(rows: int) -> int:
    """How many rows of a matrix are averaged into one row of its picture."""
    return -(-rows // _LARGEST)


def render_blocks(blocks: Iterable[np.ndarray], shape: tuple[int, int], *, title: str) -> Image.Image:
    """A matrix that is too large to hold, drawn as `render_matrix` draws it.

    Args:
        blocks: its rows from the top, float (r, C) each, where r is a multiple of `row_step(R)` but for the last block.
        shape: (R, C), neither 0.
        title: heading.
    """
    steps = [row_step(side) for side in shape]
    parts, low, high, bad = [], np.inf, -np.inf, 0
    for block in blocks:
        finite = _finite(block)
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        bad += block.size - int(np.isfinite(block).sum())
        parts.append(_averaged(finite, steps))
    shown = np.concatenate(parts)
    extent = float(np.percentile(np.abs(shown), 99.8)) or _extent(shown)
    picture = _cells(_colours(shown, extent), max(1, _LARGEST // max(shown.shape)))
    width = max(picture.width, 560)
    canvas = Image.new("RGB", (width + 2 * _MARGIN, picture.height + 2 * _MARGIN + 150), "white")
    draw = ImageDraw.Draw(canvas)
    subtitle = f"{shape[0]:,} x {shape[1]:,} · min {low:.3g} · max {high:.3g}"
    if bad:
        subtitle += f" · {bad:,} not finite"
    _heading(draw, title, subtitle, width)
    _framed(canvas, picture, (_MARGIN + (width - picture.width) // 2, _MARGIN + 86))
    note = "entries" if steps == [1, 1] else f"means of {steps[0]} x {steps[1]} entries"
    if beyond := np.mean(np.abs(shown) > extent):
        note += f" · {beyond:.1%} beyond the scale"
    _legend(canvas, (_MARGIN + (width - 420) // 2, _MARGIN + picture.height + 102), 420, extent, note)
    return canvas


def text_pattern(signs: np.ndarray, pattern: Pattern | None = None) -> str:
    """Signs as half-block characters, two rows a line, dark = positive.

    Args:
        signs: (R, C).
        pattern: if given, a second drawing to the right shows the cells whose sign differs from it, and dots elsewhere.
    """
    lines = _half_blocks(np.asarray(signs) > 0, " ")
    if pattern is not None:
        wrong = _half_blocks(np.sign(signs) != pattern.signs, "·")
        lines = [f"{left}   {right}" for left, right in zip(lines, wrong, strict=True)]
    return "\n".join(lines)


def save_png(image: Image.Image, path: Path | str) -> None:
    """Write a PNG so that `path` never holds half a picture.

    Raises:
        UsageError: if it cannot be written there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}.", "Check the folder and the free space."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _averaged(values: np.ndarray, steps: list[int]) -> np.ndarray:
    """Means over stretches of `steps` rows and columns; the last stretch of a side may be shorter."""
    for axis, step in enumerate(steps):
        starts = np.arange(0, values.shape[axis], step)
        lengths = np.diff(np.append(starts, values.shape[axis])).reshape((-1, 1) if axis == 0 else (1, -1))
        values = np.add.reduceat(values, starts, axis=axis, dtype=np.float64) / lengths if step > 1 else values
    return values


def _finite(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    values = values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
    return values if np.isfinite(values).all() else np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)


def _extent(*arrays: np.ndarray) -> float:
    """Largest magnitude: the end of the colour scale. 1 where all is 0."""
    return max(float(np.max(np.abs(array))) for array in arrays) or 1.0


def _colours(values: np.ndarray, extent: float) -> np.ndarray:
    """Diverging colours, uint8 (R, C, 3): -extent is orange, 0 white, +extent blue; beyond, the end colours."""
    place = np.clip(np.asarray(values, dtype=np.float64) / extent, -1.0, 1.0)
    stops = np.linspace(-1.0, 1.0, len(_STOPS))
    return np.stack([np.interp(place, stops, _STOPS[:, band]) for band in range(3)], axis=-1).round().astype(np.uint8)


def _cells(colours: np.ndarray, scale: int, wrong: np.ndarray | None = None) -> Image.Image:
    """One square of scale x scale pixels a cell; wrong cells get a thin red outline if there is room."""
    picture = Image.fromarray(colours).resize(
        (colours.shape[1] * scale, colours.shape[0] * scale), Image.Resampling.NEAREST
    )
    if wrong is not None and scale >= 4:
        draw = ImageDraw.Draw(picture)
        for row, column in np.argwhere(wrong).tolist():
            x, y = column * scale, row * scale
            draw.rectangle((x, y, x + scale - 1, y + scale - 1), outline=RED)
    return picture


def _framed(canvas: Image.Image, picture: Image.Image, place: tuple[int, int]) -> None:
    x, y = place
    canvas.paste(picture, place)
    ImageDraw.Draw(canvas).rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=RULE)


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _write(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, fill: Any, width: int) -> None:
    """One line of text in `width` pixels: shortened if need be, with ? for what the font cannot draw."""
    line = "".join(c if " " <= c <= "~" or c in _GLYPHS else "?" for c in text[:1000])
    font = _font(size)
    if draw.textlength(line, font=font) > width:
        while line and draw.textlength(line + "…", font=font) > width:
            line = line[: -max(1, len(line) // 20)]
        line += "…"
    draw.text(place, line, font=font, fill=fill)


def _heading(draw: ImageDraw.ImageDraw, title: str, subtitle: str, width: int) -> None:
    _write(draw, (_MARGIN, _MARGIN - 6), title, 32, INK, width)
    _write(draw, (_MARGIN, _MARGIN + 35), subtitle, 18, MUTED, width)


def _legend(canvas: Image.Image, place: tuple[int, int], width: int, extent: float, note: str) -> None:
    """A colour bar with its ends, 0 and a note."""
    left, top = place
    bar = _colours(np.linspace(-1.0, 1.0, width)[None, :].repeat(10, axis=0), 1.0)
    _framed(canvas, Image.fromarray(bar), place)
    draw = ImageDraw.Draw(canvas)
    font = _font(15)
    for text, x, anchor in (
        (f"-{extent:.2g}", left, "la"),
        ("0", left + width // 2, "ma"),
        (f"+{extent:.2g}", left + width, "ra"),
    ):
        draw.text((x, top + 17), text, font=font, fill=MUTED, anchor=anchor)
    draw.text((left + width // 2, top + 37), note, font=font, fill=MUTED, anchor="ma")


def _half_blocks(full: np.ndarray, empty: str) -> list[str]:
    """Text lines for a bool grid (R, C), two rows a line; a last odd row is drawn in upper halves."""
    padded = np.pad(full, ((0, len(full) % 2), (0, 0)))
    marks = np.array([empty, "▄", "▀", "█"])
    return [
        "".join(marks[2 * upper + lower]) for upper, lower in zip(padded[::2].astype(int), padded[1::2], strict=True)
    ]
