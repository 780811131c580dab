"""Images to sign patterns and back: the Y of the pattern metric, read from a QR code, a text or a small bitmap.

A pattern is a grid of signs Y, one for each entry of an LM-head patch; dark is +1 (paper, "Target metrics"). zxing-cpp
finds a pictured QR code and samples its modules. Where these differ in a few cells from a redrawing of the payload with
the same version, level and mask, a clean drawing is taken as drawn, a photograph as redrawn. The grid must decode.
"""

from __future__ import annotations

import contextlib
import io
import math
import stat
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import qrcode
import zxingcpp
from PIL import Image, ImageFilter, ImageOps
from qrcode.exceptions import DataOverflowError

from dpg_cli.errors import UsageError

MAX_PIXELS, MAX_SIDE = 40_000_000, 50_000  # zxing-cpp reads sides up to 65,535, our border included
MAX_BYTES = 64 * 2**20
QUIET_ZONE = 4  # modules of white that the QR standard asks for around a code
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM")
LEVELS = {level: getattr(qrcode.constants, f"ERROR_CORRECT_{level}") for level in "LMQH"}
CAPACITY = {"L": 2953, "M": 2331, "Q": 1663, "H": 1273}  # bytes in version 40

_FINDER = np.pad(np.pad(np.ones((3, 3), bool), 1), 1, constant_values=True)
_SLACK = 4  # of 49 cells: codes with rounded corners are still codes
_REDRAW_NEAR = 0.05  # share of cells: further away, the redrawing encodes the payload in another way and says nothing
_CLEAN = 0.999  # share of cells that must lie in the outer quarters of the contrast for a picture to count as clean


@dataclass(frozen=True, eq=False)  # arrays do not compare to one truth value
class Pattern:
    """A grid of signs.

    Args:
        signs: int8 (R, C) in {-1, +1}, dark = +1; kept as a read-only copy.
        kind: whether it is a QR code.
        payload: what the QR code says; None for a bitmap.
        source: where it came from, in a few words.
    """

    signs: np.ndarray
    kind: Literal["qr", "bitmap"]
    payload: str | None
    source: str

    def __post_init__(self) -> None:
        signs = np.array(self.signs, dtype=np.int8)
        signs.setflags(write=False)
        object.__setattr__(self, "signs", signs)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.signs.shape[0], self.signs.shape[1]


def pattern_from_text(text: str, *, version: int = 0, error_correction: str = "L") -> Pattern:
    """The QR code of a text, without border.

    Args:
        text: payload; letters beyond ASCII are stored as UTF-8.
        version: 1 to 40; 0 takes the smallest that fits.
        error_correction: L, M, Q or H.

    Raises:
        UsageError: for an empty or too long text, or an unknown version or level.
    """
    if not text:
        raise UsageError("The text for the QR code is empty.", "Give at least one character.")
    if error_correction not in LEVELS:
        raise UsageError(f"There is no error-correction level {error_correction!r}.", "Choose L, M, Q or H.")
    if not 0 <= version <= 40:
        raise UsageError(f"There is no QR version {version}.", "Choose 1 to 40, or 0 for the smallest that fits.")
    code = qrcode.QRCode(error_correction=LEVELS[error_correction], border=0)
    try:
        code.add_data(data := text.encode())
        needed = code.best_fit(start=1)
    except UnicodeEncodeError:
        raise UsageError("The text for the QR code is not valid Unicode.", "Remove its stray surrogates.") from None
    except (DataOverflowError, ValueError):  # qrcode 8 raises the latter past version 40
        cause = f"The text of {len(data)} bytes is too long for any QR code at level {error_correction}."
        remedy = f"Version 40 holds {CAPACITY[error_correction]} bytes there; shorten the text"
        remedy += "." if error_correction == "L" else " or choose level L."
        raise UsageError(cause, remedy) from None
    if version and needed > version:
        cause = f"The text of {len(data)} bytes does not fit in QR version {version} at level {error_correction}."
        raise UsageError(cause, f"It needs version {needed}, of {17 + 4 * needed} modules a side; or shorten the text.")
    code.version = version or needed
    code.make(fit=False)
    source = f"QR code of a text, version {code.version}, level {error_correction}"
    return Pattern(np.where(code.get_matrix(), 1, -1), "qr", text, source)


def pattern_from_rows(rows: Sequence[str]) -> Pattern:
    """A bitmap drawn in text.

    Args:
        rows: R strings of C characters, # for +1 and . for -1.

    Raises:
        UsageError: if a row is empty, has another length or another character.
    """
    widths = {len(row) for row in rows}
    if not rows or len(widths) != 1 or widths == {0} or set("".join(rows)) - {"#", "."}:
        raise UsageError(
            "The rows of a bitmap must be of one length and hold # and . alone.", 'For example: rows = ["##.", "..#"].'
        )
    signs = np.array([[1 if cell == "#" else -1 for cell in row] for row in rows], dtype=np.int8)
    return Pattern(signs, "bitmap", None, f"a {signs.shape[0]} x {signs.shape[1]} bitmap")


def pattern_from_image(path: Path | str, *, max_rows: int, max_cols: int) -> Pattern:
    """The pattern in a picture: a QR code of any size, turn or polarity, else a two-coloured bitmap.

    A code comes out upright and dark on light. A bitmap's darker colour is +1; one whose cells are all squares of f x f
    pixels is reduced to an entry a cell.

    Args:
        path: PNG, JPEG, GIF, WebP, BMP or PPM.
        max_rows, max_cols: size of the LM head, in token ids and hidden dimensions.

    Raises:
        UsageError: for a file that is no readable picture, or a picture that holds no usable pattern.
    """
    name = str(path) if str(path).isprintable() else repr(str(path))
    picture = _load(Path(path), name)
    colours = picture.getcolors(2)  # None if there are more
    for grey in _candidates(picture.convert("L"), clean=colours is not None):
        found = _read(grey)
        if len(found) > 1:
            raise UsageError(f"{name} shows {len(found)} QR codes.", "Crop the picture to the one that is meant.")
        if found:
            dark = _modules(found[0], grey, name)
            source = f"QR code from a picture, version {(len(dark) - 17) // 4}, level {found[0].ec_level}"
            pattern = Pattern(np.where(dark, 1, -1), "qr", found[0].text, source)
            check_fits(pattern, max_rows, max_cols, (0, 0))
            return pattern
    return _bitmap(picture, colours, name, max_rows, max_cols)


def check_fits(pattern: Pattern, rows: int, cols: int, origin: tuple[int, int], matrix: str = "head") -> None:
    """Refuse a pattern that would reach past its matrix.

    Args:
        pattern: the pattern.
        rows, cols: size of the matrix; for a head, token ids and hidden dimensions.
        origin: row and column of the patch's upper-left corner.
        matrix: its name; "head" is the LM head.

    Raises:
        UsageError: if it does not fit there.
    """
    (height, width), (row, col) = pattern.shape, origin
    if row >= 0 and col >= 0 and row + height <= rows and col + width <= cols:
        return
    larger = "head" if matrix == "head" else "matrix"
    remedy = f"Use a smaller pattern (for a QR code a shorter text) or a target with a larger {larger}."
    if height <= rows and width <= cols:
        remedy = f"The origin (--patch-origin) can be at most {rows - height},{cols - width}."
    where = f"({row}, {col}) in {'an LM head' if matrix == 'head' else matrix} of {rows}x{cols}"
    raise UsageError(f"The {height}x{width} pattern does not fit at {where}.", remedy)


def decode_qr(signs: np.ndarray) -> str | None:
    """What a scanner reads in signs (R, C), drawn black on white where positive with a quiet zone; None if nothing."""
    dark = np.asarray(signs) > 0
    if dark.ndim != 2 or dark.size == 0:
        return None
    modules = np.where(np.pad(dark, QUIET_ZONE), 0, 255).astype(np.uint8)
    found = _read(Image.fromarray(modules.repeat(8, axis=0).repeat(8, axis=1)))
    return found[0].text if len(found) == 1 else None


def pixel_accuracy(signs: np.ndarray, pattern: Pattern) -> float:
    """Share of entries of `signs` (R, C), any real values, whose sign equals the pattern's; a sign of 0 is wrong."""
    if np.shape(signs) != pattern.shape:
        raise ValueError(f"signs of shape {np.shape(signs)} for a pattern of shape {pattern.shape}")
    return float(np.mean(np.sign(signs) == pattern.signs))


def _load(path: Path, name: str) -> Image.Image:
    """The picture as RGB on white. Pillow's many exceptions (it has no common base for them) become one line each."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
            raise UsageError(f"{name} is {kind}.", "Name a picture file.")
        if status.st_size > MAX_BYTES:
            raise UsageError(f"{name} is larger than {MAX_BYTES >> 20} MB.", "Scale the picture down.")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UsageError(f"{name} cannot be read: {getattr(error, 'strerror', error)}.", "Check the path.") from None
    Image.init()  # registers the formats that Pillow does not load by itself
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            enormous = picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE
        except Image.DecompressionBombError:
            enormous = True
        except Exception:
            raise UsageError(f"{name} is no readable picture.", "Give a PNG, JPEG, GIF, WebP or BMP file.") from None
        if enormous:
            limit = f"{MAX_PIXELS // 10**6} megapixels or a side longer than {MAX_SIDE} pixels"
            raise UsageError(f"{name} has more than {limit}.", "Scale the picture down.")
        try:
            picture.load()
            return _on_white(ImageOps.exif_transpose(picture))
        except Exception:
            raise UsageError(f"{name} is damaged or cut short.", "Save or download the picture again.") from None


def _on_white(picture: Image.Image) -> Image.Image:
    """8-bit RGB; transparent parts become white, deep greys are stretched from their darkest to their lightest."""
    if picture.mode.startswith(("I", "F")):
        deep = np.nan_to_num(np.asarray(picture, dtype=float))
        return Image.fromarray(np.uint8(255 * ((deep - deep.min()) / max(np.ptp(deep), 1e-9)))).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _candidates(grey: Image.Image, *, clean: bool) -> Iterator[Image.Image]:
    """The picture, also with more border; then (if it is no clean drawing) versions in which noise is smoothed away."""
    yield grey
    yield ImageOps.expand(grey, 8 + min(grey.size) // 10, fill=255)
    if not clean:
        small = grey.reduce(-(-max(grey.size) // 2000))
        yield from (small.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 2))
        yield from (small.reduce(factor) for factor in (2, 4))


def _read(grey: Image.Image) -> list[Any]:
    """The readable QR codes (model 2) in a grey picture, as zxing-cpp barcodes."""
    kind, plain = zxingcpp.BarcodeFormat.QRCode, zxingcpp.TextMode.Plain
    found = zxingcpp.read_barcodes(np.asarray(grey), formats=kind, text_mode=plain)
    # Micro and rectangular QR codes come along; their versions are not plain numbers.
    return [code for code in found if code.valid and str(code.extra.get("Version", "")).isdigit()]


def _modules(code: Any, grey: Image.Image, name: str) -> np.ndarray:
    """Dark modules, bool (n, n), upright and unmirrored, of a code found in a grey picture."""
    size = 17 + 4 * int(code.extra["Version"])
    drawn = np.asarray(code.to_image(scale=1, add_quiet_zones=False)) < 128
    if drawn.shape == (size, size):
        means = _cell_means(grey, code.position, size)
        if means[drawn].mean() > means[~drawn].mean():  # light on dark
            means = 1.0 - means
        clean = np.mean(np.abs(means - 0.5) > 0.25) >= _CLEAN
        for redrawn in _redraw(code):
            # The format bits beside the upper-left finder tell a mirrored code, which is drawn transposed.
            if np.sum(drawn[8, :9] != redrawn[8, :9]) > np.sum(drawn.T[8, :9] != redrawn[8, :9]):
                drawn, means = drawn.T, means.T
            if np.mean(drawn != redrawn) <= _REDRAW_NEAR:
                drawn = np.where(clean & (np.where(drawn, 1.0 - means, means) > 0.75), drawn, redrawn)
                break
        corners = drawn[:7, :7], drawn[:7, -7:], drawn[-7:, :7]
        if max(np.sum(corner != _FINDER) for corner in corners) <= _SLACK and decode_qr(drawn) == code.text:
            return drawn
    raise UsageError(f"{name} shows a QR code whose modules cannot be told apart.", "Give a sharper or larger picture.")


def _redraw(code: Any) -> Iterator[np.ndarray]:
    """Grids, bool (n, n), of the payload with the code's version, level and mask: in mixed segments, and in one."""
    level, version, mask = LEVELS[code.extra["ECLevel"]], int(code.extra["Version"]), int(code.extra["DataMask"])
    for optimize in (20, 0):
        again = qrcode.QRCode(version, error_correction=level, border=0, mask_pattern=mask)
        again.add_data(code.bytes, optimize=optimize)
        with contextlib.suppress(DataOverflowError):  # the original packs its payload more tightly
            again.make(fit=False)
            yield np.array(again.get_matrix(), dtype=bool)


def _cell_means(grey: Image.Image, position: Any, size: int) -> np.ndarray:
    """Brightness of the middle of each cell, float (n, n), 0 darkest and 1 lightest, by the code's perspective."""
    side = 8 * size
    corners = (position.top_left, position.top_right, position.bottom_right, position.bottom_left)
    equations, values = [], []
    for (u, v), at in zip(((0, 0), (side, 0), (side, side), (0, side)), corners, strict=True):
        equations += [[u, v, 1, 0, 0, 0, -u * at.x, -v * at.x], [0, 0, 0, u, v, 1, -u * at.y, -v * at.y]]
        values += [at.x, at.y]
    warp = np.linalg.lstsq(np.array(equations, float), np.array(values, float), rcond=None)[0].tolist()
    flat = grey.transform((side, side), Image.Transform.PERSPECTIVE, warp, Image.Resampling.BILINEAR)
    means = np.asarray(flat, dtype=float).reshape(size, 8, size, 8)[:, 2:6, :, 2:6].mean(axis=(1, 3))
    low, high = np.percentile(means, (5, 95))
    return np.clip((means - low) / max(high - low, 1.0), 0.0, 1.0)


def _bitmap(picture: Image.Image, colours: list[Any] | None, name: str, max_rows: int, max_cols: int) -> Pattern:
    """A two-coloured picture as a pattern, reduced to its cells; anything else is refused."""
    wanted = f"a bitmap must be two-coloured and at most {max_rows}x{max_cols}"
    if colours is not None and len(colours) == 1:
        raise UsageError(f"{name} is all one colour and shows no pattern.", f"Give a QR code or a bitmap: {wanted}.")
    refusal = f"No readable QR code was found in {name}"
    remedy = f"Give a sharper picture with a white border; {wanted}."
    if colours is None:
        raise UsageError(f"{refusal}, and it has more than two colours.", remedy)
    grey = np.asarray(picture.convert("L"))
    dark = grey < grey.max()
    if not dark.any():
        raise UsageError(f"The two colours of {name} are equally bright.", "Use black and white.")
    # The largest f for which all cells are squares of f x f pixels.
    edges = [np.flatnonzero(np.diff(dark, axis=axis).any(axis=1 - axis)) + 1 for axis in (0, 1)]
    cell = math.gcd(*dark.shape, *np.concatenate(edges).tolist())
    rows, columns = (dark := dark[::cell, ::cell]).shape
    if rows > max_rows or columns > max_cols:
        raise UsageError(f"{refusal}, and as a bitmap its {rows}x{columns} cells are too many.", remedy)
    return Pattern(np.where(dark, 1, -1), "bitmap", None, f"a {rows} x {columns} bitmap")
