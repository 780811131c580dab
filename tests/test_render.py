"""Pictures of the LM head: their pixels are measured, and the composed patch is scanned as a phone would scan it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zxingcpp
from PIL import Image

from dpg_cli.errors import UsageError
from dpg_cli.patterns.pattern import Pattern, decode_qr, pattern_from_image, pattern_from_text
from dpg_cli.patterns.render import RED, render_matrix, render_patch, save_png, text_pattern

PAYLOAD = "HTTPS://EXAMPLE.ORG/7"


def patch(pattern: Pattern, wrong: list[tuple[int, int]] | None = None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights before and after a change that shows the pattern except in the wrong cells."""
    rng = np.random.default_rng(seed)
    before = rng.normal(0, 0.05, pattern.shape)
    change = pattern.signs * rng.uniform(1e-4, 2e-3, pattern.shape)
    for cell in wrong or []:
        change[cell] *= -1
    return before, before + change


def scans(image: Image.Image) -> list[str]:
    return [code.text for code in zxingcpp.read_barcodes(image)]


def outlines(image: Image.Image) -> int:
    """Number of separate red rectangles, counted by their upper-left corners."""
    red = np.pad((np.asarray(image) == RED).all(axis=2), 1)
    return int((red[1:-1, 1:-1] & ~red[:-2, 1:-1] & ~red[1:-1, :-2] & red[2:, 1:-1] & red[1:-1, 2:]).sum())


@pytest.mark.parametrize("level", "LH")
@pytest.mark.parametrize("version", [1, 2, 5, 10, 40])
def test_patch_is_scanned_straight_from_the_picture(version: int, level: str, tmp_path: Path) -> None:
    text = f"V{version}{level}"
    pattern = pattern_from_text(text, version=version, error_correction=level)
    image = render_patch(*patch(pattern), pattern, title=text, subtitle="pixel accuracy 1.000")
    assert scans(image) == [text]
    assert scans(image.convert("L")) == [text]
    assert image.width >= 4 * 3 * (pattern.shape[1] + 8)  # at least 3 pixels a module
    save_png(image, tmp_path / "patch.png")
    again = pattern_from_image(tmp_path / "patch.png", max_rows=512, max_cols=512)
    np.testing.assert_array_equal(again.signs, pattern.signs)


def test_patch_has_the_width_of_a_readme() -> None:
    pattern = pattern_from_text("A")
    image = render_patch(*patch(pattern), pattern, title="A", subtitle="")
    assert 1100 <= image.width <= 1400
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert outlines(image) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6])
def test_patch_of_plain_signs_scans_once(scale: float) -> None:
    # The change panel then shows the code in pure blue and orange, which must not be read as a second code.
    pattern = pattern_from_text(PAYLOAD)
    image = render_patch(np.zeros(pattern.shape), scale * pattern.signs, pattern, title="", subtitle="")
    assert scans(image) == [PAYLOAD]


def test_wrong_cells_are_outlined_in_the_change_and_in_the_code() -> None:
    pattern = pattern_from_text("A", error_correction="H")
    wrong = [(8, 10), (12, 3), (20, 12)]
    before, after = patch(pattern, wrong)
    image = render_patch(before, after, pattern, title="A", subtitle="")
    assert outlines(image) == 2 * len(wrong)
    assert decode_qr(after - before) == "A"
    assert scans(image) == ["A"]


def test_unmoved_and_broken_cells_are_wrong_and_grey() -> None:
    pattern = pattern_from_text("A", error_correction="H")
    before, after = patch(pattern)
    after[8, 10] = before[8, 10]
    after[12, 3], after[20, 12] = np.nan, np.inf
    image = render_patch(before, after, pattern, title="A", subtitle="")
    assert outlines(image) == 6
    grey = (np.asarray(image) == 176).all(axis=2).sum()
    assert grey == 3 * (10 - 2) ** 2  # 290 // 29 = 10 pixels a cell, less the outline


def test_cells_lie_where_they_should() -> None:
    pattern = Pattern(np.array([[1, -1], [-1, -1]]), "bitmap", None, "four cells")
    image = render_patch(np.zeros((2, 2)), pattern.signs * 0.5, pattern, title="", subtitle="")
    pixels = np.asarray(image).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 140
    orange = pixels[..., 0] - pixels[..., 2] > 140
    half = 290 // 2
    # In the change panel, the third: blue upper left, orange elsewhere. (Colour bars add a little of both.)
    left, top = 36 + 2 * (290 + 24), 36 + 112
    assert blue[top : top + half, left : left + half].all()
    assert orange[top : top + half, left + half : left + 2 * half].all()
    assert orange[top + half : top + 2 * half, left : left + 2 * half].all()
    # In the code, the fourth: black upper left of a 2 x 2 drawing of 72-pixel cells with a cell of white around.
    black = (pixels[top : top + 290, left + 314 : left + 314 + 290] == 0).all(axis=2)
    assert black.sum() == 72**2
    assert black[1 + 72 : 1 + 2 * 72, 1 + 72 : 1 + 2 * 72].all()


@pytest.mark.parametrize("shape", [(1, 1), (6, 7), (1, 96), (300, 3), (512, 96)])
def test_patches_of_any_shape(shape: tuple[int, int]) -> None:
    pattern = Pattern(np.ones(shape), "bitmap", None, "all dark")
    image = render_patch(np.zeros(shape), np.zeros(shape), pattern, title="x" * 5000, subtitle="Grüße\n日本 \ud800 \0")
    assert image.width >= 1100
    assert image.height >= max(512, shape[0])


def test_patch_shapes_must_agree() -> None:
    pattern = pattern_from_text("A")
    with pytest.raises(ValueError, match=r"\(21, 20\)"):
        render_patch(np.zeros((21, 21)), np.zeros((21, 20)), pattern, title="", subtitle="")


def shown(image: Image.Image, rows: int, columns: int) -> np.ndarray:
    """The matrix part of a rendered matrix: it lies in the middle, 86 pixels below the margin."""
    left = (image.width - columns) // 2
    return np.asarray(image)[36 + 86 : 36 + 86 + rows, left : left + columns].astype(int)


def test_matrix_is_magnified_by_whole_pixels() -> None:
    values = np.zeros((512, 96))
    values[3, 5], values[500, 90] = 1.0, -1.0
    pixels = shown(render_matrix(values, title="Change"), 1024, 192)
    coloured = np.argwhere((pixels != 255).any(axis=2))
    assert sorted(map(tuple, (coloured // 2).tolist())) == [(3, 5)] * 4 + [(500, 90)] * 4
    assert pixels[6, 10, 2] > pixels[6, 10, 0]  # blue: positive
    assert pixels[1000, 180, 0] > pixels[1000, 180, 2]  # orange: negative


def test_large_matrix_is_averaged_by_area() -> None:
    # 50257 = 1196 x 42 + 25 rows, so that the last stretch is shorter; constant columns must stay constant.
    values = np.broadcast_to(np.linspace(-1, 1, 768, dtype=np.float32), (50257, 768))
    image = render_matrix(values, title="A whole GPT-2 head")
    assert image.width <= 1300
    assert image.height <= 1500
    pixels = shown(image, 1197, 768)
    assert (pixels == pixels[0]).all()
    assert pixels[0, 0, 0] > pixels[0, 0, 2] + 100
    assert pixels[0, -1, 2] > pixels[0, -1, 0] + 100
    assert pixels[0, 383:385].min() > 245
    # Noise of opposite signs cancels where stretches are averaged, and the mean remains.
    tall = np.where(np.arange(4800)[:, None] % 2, 3.0, -1.0) * np.ones((1, 4))
    flat = shown(render_matrix(tall, title=""), 1200, 4)
    assert (flat == flat[0, 0]).all()
    assert flat[0, 0, 2] > flat[0, 0, 0]


@pytest.mark.parametrize("values", [np.zeros((3, 4)), np.full((5, 5), np.nan), np.ones((1, 1), np.int64), np.eye(2000)])
def test_odd_matrices(values: np.ndarray) -> None:
    assert render_matrix(values, title="odd").width >= 560


def test_matrix_needs_two_axes() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        render_matrix(np.zeros(3), title="")


def test_text_pattern() -> None:
    signs = np.array([[1, -1, 1, -1], [1, 1, -1, -1], [1, -1, 0.5, -1]])
    assert text_pattern(signs) == "█▄▀ \n▀ ▀ "
    pattern = Pattern(np.array([[1, -1, 1, 1], [1, 1, 1, -1], [-1, -1, 1, -1]]), "bitmap", None, "")
    assert text_pattern(signs, pattern) == "█▄▀    ··▄▀\n▀ ▀    ▀···"


def test_text_pattern_holds_the_whole_code() -> None:
    pattern = pattern_from_text(PAYLOAD)
    lines = text_pattern(pattern.signs, pattern).split("\n")
    size = pattern.shape[1]
    assert {len(line) for line in lines} == {2 * size + 3}
    assert {line[size:] for line in lines} == {"   " + "·" * size}
    upper = np.array([[c in "▀█" for c in line[:size]] for line in lines])
    lower = np.array([[c in "▄█" for c in line[:size]] for line in lines])
    grid = np.stack([upper, lower], axis=1).reshape(-1, size)[:size]
    np.testing.assert_array_equal(np.where(grid, 1, -1), pattern.signs)


def test_save_png_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    save_png(Image.new("RGB", (3, 2), RED), path)
    kept = path.read_bytes()

    def fail(self: Image.Image, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        save_png(Image.new("RGB", (9, 9)), path)
    assert path.read_bytes() == kept
    assert list(tmp_path.iterdir()) == [path]


def test_save_png_refusals(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for target in (tmp_path / "none" / "a.png", tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(UsageError, match="cannot be written"):
            save_png(image, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]
