"""Patterns: QR codes come back module for module however they are pictured; bad files give one clear line."""

from __future__ import annotations

import io
import os
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import qrcode
import zxingcpp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from dpg_cli.errors import UsageError
from dpg_cli.patterns import pattern as patterns
from dpg_cli.patterns.pattern import (
    LEVELS,
    Pattern,
    check_fits,
    decode_qr,
    pattern_from_image,
    pattern_from_text,
    pixel_accuracy,
)

SIXTY_SEVEN = np.array([list(row) for row in ("####...", "...###.", ".#####.", "...###.", ".#.###.", "...####")]) == "#"
PAYLOAD = "HTTPS://EXAMPLE.ORG/7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


def matrix(text: str, version: int, level: str = "L", mask: int | None = None) -> np.ndarray:
    """The module grid as the `qrcode` package itself draws it, bool, dark = True."""
    code = qrcode.QRCode(version=version, error_correction=LEVELS[level], border=0, mask_pattern=mask)
    code.add_data(text)
    code.make(fit=False)
    return np.array(code.get_matrix(), dtype=bool)


def draw(dark: np.ndarray, scale: int = 6, border: int = 4) -> Image.Image:
    pixels = np.where(np.pad(dark, border), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def read(
    folder: Path, picture: Image.Image, ending: str = "png", rows: int = 512, cols: int = 96, **save: int
) -> Pattern:
    picture.save(folder / f"p.{ending}", **save)
    return pattern_from_image(folder / f"p.{ending}", max_rows=rows, max_cols=cols)


def assert_same(pattern: Pattern, dark: np.ndarray, payload: str = PAYLOAD) -> None:
    assert pattern.kind == "qr"
    assert pattern.payload == payload
    np.testing.assert_array_equal(pattern.signs, np.where(dark, 1, -1))


def refusal(path: Path | str, rows: int = 512, cols: int = 96) -> str:
    """The one-line message with which a file is refused; any warning or other exception fails the test."""
    with warnings.catch_warnings(), pytest.raises(UsageError) as caught:
        warnings.simplefilter("error")
        pattern_from_image(path, max_rows=rows, max_cols=cols)
    assert caught.value.remedy
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def message_of(function: Callable[..., object], *args: object, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        function(*args, **options)
    assert caught.value.remedy
    return str(caught.value)


# --- from text


@pytest.mark.parametrize("level", "LMQH")
@pytest.mark.parametrize("version", range(1, 7))
def test_text_equals_qrcode_and_decodes(version: int, level: str) -> None:
    text = f"V{version}{level}"
    pattern = pattern_from_text(text, version=version, error_correction=level)
    assert pattern.shape == (17 + 4 * version,) * 2
    assert_same(pattern, matrix(text, version, level), text)
    assert decode_qr(pattern.signs) == text
    assert pixel_accuracy(pattern.signs, pattern) == 1.0


def test_version_zero_takes_the_smallest() -> None:
    # Version 1-L holds 17 bytes; version 40-L holds 2,953.
    assert [pattern_from_text("a" * n).shape[0] for n in (1, 17, 18, 2953)] == [21, 21, 25, 177]
    assert "2953 bytes" in message_of(pattern_from_text, "a" * 2954)


@pytest.mark.parametrize("level", "LMQH")
def test_stated_capacities_are_qrcodes(level: str) -> None:
    most = patterns.CAPACITY[level]
    assert pattern_from_text("a" * most, version=40, error_correction=level).shape == (177, 177)
    message = message_of(pattern_from_text, "a" * (most + 1), error_correction=level)
    assert f"Version 40 holds {most} bytes" in message


def test_text_refusals() -> None:
    assert "empty" in message_of(pattern_from_text, "")
    assert "needs version 2, of 25 modules" in message_of(pattern_from_text, "a" * 18, version=1)
    assert "QR version 41" in message_of(pattern_from_text, "a", version=41)
    assert "QR version -1" in message_of(pattern_from_text, "a", version=-1)
    assert "'Z'" in message_of(pattern_from_text, "a", error_correction="Z")
    assert "Unicode" in message_of(pattern_from_text, "\ud800")


@pytest.mark.parametrize("text", ["Grüße", "日本", "€", "😀", " a b ", "\n\tx", "a\\b", "0123456789" * 4 + "abc"])
def test_unusual_texts_survive(text: str, folder: Path) -> None:
    pattern = pattern_from_text(text)
    assert decode_qr(pattern.signs) == text
    assert_same(read(folder, draw(pattern.signs > 0)), pattern.signs > 0, text)


# --- from pictures of QR codes


@pytest.mark.parametrize("level", "LMQH")
@pytest.mark.parametrize("version", range(1, 7))
def test_picture_gives_the_drawn_grid(version: int, level: str, folder: Path) -> None:
    text = f"V{version}{level}"
    for mask in (None, version, 7):  # the drawn mask counts, not the one that we would choose
        dark = matrix(text, version, level, mask)
        pattern = read(folder, draw(dark))
        assert_same(pattern, dark, text)
        assert f"version {version}, level {level}" in pattern.source


@pytest.mark.parametrize("border", range(11))
def test_any_border(border: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    for scale in (1, 3, 8):
        assert_same(read(folder, draw(dark, scale, border)), dark)
        assert_same(read(folder, draw(~np.pad(dark, border), scale, 0)), dark)


@pytest.mark.parametrize("scale", range(1, 21))
def test_any_scale(scale: int, folder: Path) -> None:
    for version in (2, 5):
        dark = matrix(PAYLOAD, version)
        assert_same(read(folder, draw(dark, scale)), dark)


def test_turned_mirrored_and_inverted_pictures_give_the_upright_grid(folder: Path) -> None:
    dark = matrix(PAYLOAD, 3)
    for turn in Image.Transpose:  # quarter turns and mirror images
        assert_same(read(folder, draw(dark).transpose(turn)), dark)
        assert_same(read(folder, draw(~np.pad(dark, 4), border=0).transpose(turn)), dark)


@pytest.mark.parametrize("quality", [20, 50, 90])
def test_jpeg(quality: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    assert_same(read(folder, draw(dark, 5).convert("RGB"), "jpg", quality=quality), dark)
    assert_same(read(folder, draw(dark, 5).convert("CMYK"), "jpg", quality=quality), dark)


@pytest.mark.parametrize("radius", [1, 2, 3, 4])  # pixels, at 8 pixels a module
def test_blur(radius: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    assert_same(read(folder, draw(dark, 8).filter(ImageFilter.GaussianBlur(radius))), dark)


def photograph(dark: np.ndarray, seed: int) -> Image.Image:
    """A slanted, unevenly lit, blurred and noisy picture of a code on a desk."""
    rng = np.random.default_rng(seed)
    desk = Image.new("L", (480, 480), 255)
    flat = draw(dark, 8).rotate(float(rng.uniform(-15, 15)), Image.Resampling.BICUBIC, expand=True, fillcolor=255)
    desk.paste(flat, ((480 - flat.width) // 2, (480 - flat.height) // 2))
    across, down = rng.uniform(-4e-4, 4e-4, 2)  # the far edge up to a fifth smaller
    warp = (1 + 240 * across, 0, 0, 0, 1 + 240 * down, 0, across, down)
    slanted = desk.transform(desk.size, Image.Transform.PERSPECTIVE, warp, Image.Resampling.BICUBIC, fillcolor=255)
    light = np.linspace(0.6, 1.0, 480)[None, :]
    pixels = np.asarray(slanted.filter(ImageFilter.GaussianBlur(1)), float) * 0.8 * light + 20
    return Image.fromarray(np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("seed", range(8))
def test_photographs(seed: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2 + seed % 3)
    assert_same(read(folder, photograph(dark, seed), "jpg", quality=70), dark)


@pytest.mark.parametrize(("scale", "sigma"), [(3, 30), (4, 70), (8, 90), (12, 90)])
def test_noise_is_smoothed_away(scale: int, sigma: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    for seed in range(4):
        pixels = np.asarray(draw(dark, scale), float) * 0.7 + 30
        noisy = np.clip(pixels + np.random.default_rng(seed).normal(0, sigma, pixels.shape), 0, 255)
        assert_same(read(folder, Image.fromarray(noisy.astype(np.uint8))), dark)


@pytest.mark.parametrize("bend", [-0.06, 0.03, 0.06, 0.1])
def test_lens_distortion(bend: float, folder: Path) -> None:
    """Straight lines become curves, so that cells are sampled beside their middle."""
    dark = matrix(PAYLOAD, 3, "H")
    flat = np.asarray(draw(dark, 8))
    y, x = np.mgrid[: len(flat), : len(flat)] / (len(flat) / 2) - 1
    source = [((axis * (1 + bend * (x**2 + y**2)) + 1) * len(flat) / 2).round().astype(int) for axis in (y, x)]
    inside = np.all([(axis >= 0) & (axis < len(flat)) for axis in source], axis=0)
    bent = np.full_like(flat, 255)
    bent[inside] = flat[source[0][inside], source[1][inside]]
    assert_same(read(folder, Image.fromarray(bent).filter(ImageFilter.GaussianBlur(1))), dark)


def test_another_way_to_pack_the_payload(folder: Path) -> None:
    text = "A" * 25 + "b" * 10 + "0123456789" * 3
    code = qrcode.QRCode(version=6, border=0)
    code.add_data(text, optimize=0)  # all as bytes, while the package would mix three modes by itself
    code.make(fit=False)
    dark = np.array(code.get_matrix(), dtype=bool)
    assert (dark != matrix(text, 6, "M")).any()
    for radius in (1, 4):
        assert_same(read(folder, draw(dark, 8).filter(ImageFilter.GaussianBlur(radius))), dark, text)


def test_plainly_drawn_damage_is_kept_but_must_decode(folder: Path) -> None:
    dark = matrix(PAYLOAD, 4, "H")
    damaged = dark.copy()
    damaged[14:17, 14:17] ^= True
    assert_same(read(folder, draw(damaged)), damaged)
    assert_same(read(folder, ImageOps.invert(draw(damaged))), damaged)
    assert_same(read(folder, ImageOps.mirror(draw(damaged))), damaged)
    damaged[9:24, 9:24] ^= True  # beyond repair: no readable code, and too large as a bitmap
    assert "No readable QR code" in refused(folder, draw(damaged), rows=30, cols=30)


def test_modes_and_formats(folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    grey = draw(dark)
    clear = Image.merge("LA", (Image.new("L", grey.size, 0), grey.point(lambda v: 255 - v)))  # black ink on nothing
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 100)  # 16 bits a pixel, of which few are used
    brown = Image.composite(Image.new("RGB", grey.size, "#fff0d0"), Image.new("RGB", grey.size, "#502000"), grey)
    for picture in (clear, clear.convert("RGBA"), deep, brown, brown.quantize(2), grey.convert("1")):
        assert_same(read(folder, picture), dark)
    for ending in ("gif", "webp", "bmp", "ppm"):
        assert_same(read(folder, brown, ending), dark)


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L", "16 bits", "webp", "gif"])
def test_what_is_transparent_is_white(kind: str, folder: Path) -> None:
    """Ink on nothing, in every way that a picture can have of nothing: an alpha channel, a colour, a palette's entry."""
    dark = np.kron(np.array([[1, 0, 1], [0, 1, 0], [1, 1, 0]], bool), np.ones((4, 4), bool))
    black, ink, alpha = np.zeros(dark.shape, np.uint8), np.where(dark, 0, 9).astype(np.uint8), np.uint8(255) * dark
    palette = Image.fromarray(dark.astype(np.uint8), "P")
    palette.putpalette([0] * 768)
    rgba = Image.fromarray(np.dstack([black, black, black, alpha]), "RGBA")
    picture, options = {
        "RGBA": (rgba, {}),
        "LA": (Image.fromarray(np.dstack([black, alpha]), "LA"), {}),
        "P": (palette, {"transparency": 0}),
        "RGB": (Image.fromarray(np.dstack([ink, black, black]), "RGB"), {"transparency": (9, 0, 0)}),
        "L": (Image.fromarray(ink, "L"), {"transparency": 9}),
        "16 bits": (Image.fromarray(ink.astype(np.uint16)), {"transparency": 9}),
        "webp": (rgba, {"lossless": True, "exact": True}),
        "gif": (palette, {"transparency": 0}),
    }[kind]
    path = folder / f"clear.{kind if kind in ('webp', 'gif') else 'png'}"
    picture.save(path, **options)
    assert (pattern_from_image(path, max_rows=9, max_cols=9).signs == np.where(dark[::4, ::4], 1, -1)).all()


def test_phone_pictures_of_several_frames(folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    draw(dark).convert("RGB").save(folder / "p.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (50, 50))])
    assert_same(pattern_from_image(folder / "p.jpg", max_rows=512, max_cols=96), dark)


@pytest.mark.parametrize("cut", [0, 4, 6])  # pixels, at 8 pixels a module
def test_a_code_cut_at_its_corners(cut: int, folder: Path) -> None:
    dark = matrix(PAYLOAD, 2)
    slanted = draw(dark, 8, 0).rotate(20, Image.Resampling.BICUBIC, expand=True, fillcolor=255)
    assert_same(read(folder, ImageOps.crop(slanted, cut)), dark)


def test_micro_qr_codes_are_none(folder: Path) -> None:
    micro = zxingcpp.create_barcode("123", zxingcpp.BarcodeFormat.MicroQRCode)
    picture = Image.fromarray(np.array(micro.to_image(scale=5, add_quiet_zones=True)))
    assert read(folder, picture).kind == "bitmap"
    assert "No readable QR code" in refused(folder, picture.filter(ImageFilter.GaussianBlur(1)))


def test_code_among_other_things(folder: Path) -> None:
    page = Image.new("RGB", (600, 800), "white")
    ImageDraw.Draw(page).text((40, 40), "An invoice, due today", fill="black", font_size=30)
    page.paste(draw(matrix(PAYLOAD, 2)), (210, 400))
    assert_same(read(folder, page), matrix(PAYLOAD, 2))


# --- bitmaps


@pytest.mark.parametrize("magnified", [1, 2, 9, 40])
def test_bitmap(magnified: int, folder: Path) -> None:
    pattern = read(folder, draw(SIXTY_SEVEN, magnified, 0))
    assert (pattern.kind, pattern.payload, pattern.shape) == ("bitmap", None, (6, 7))
    np.testing.assert_array_equal(pattern.signs, np.where(SIXTY_SEVEN, 1, -1))
    assert pattern.signs.dtype == np.int8
    assert not pattern.signs.flags.writeable


def test_bitmap_darker_colour_is_plus_one(folder: Path) -> None:
    picture = Image.new("RGB", (7, 6), (250, 200, 40))
    picture.paste((20, 40, 160), mask=Image.fromarray(SIXTY_SEVEN))
    np.testing.assert_array_equal(read(folder, picture).signs, np.where(SIXTY_SEVEN, 1, -1))


def test_bitmap_follows_the_turn_noted_by_the_camera(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise by 90°
    draw(SIXTY_SEVEN, 3, 0).save(folder / "turned.png", exif=exif)
    pattern = pattern_from_image(folder / "turned.png", max_rows=512, max_cols=96)
    np.testing.assert_array_equal(pattern.signs, np.where(np.rot90(SIXTY_SEVEN, -1), 1, -1))


def test_bitmap_must_fit(folder: Path) -> None:
    assert read(folder, draw(SIXTY_SEVEN, 9, 0), rows=6, cols=7).shape == (6, 7)
    assert "6x7 cells are too many" in refused(folder, draw(SIXTY_SEVEN, 9, 0), rows=5, cols=7)
    assert "at most 6x6" in refused(folder, draw(SIXTY_SEVEN, 9, 0), rows=6, cols=6)


# --- refusals


def refused(folder: Path, picture: Image.Image, rows: int = 512, cols: int = 96) -> str:
    picture.save(folder / "refused.png")
    return refusal(folder / "refused.png", rows, cols)


def test_picture_refusals(folder: Path) -> None:
    page = Image.new("L", (400, 200), 255)
    page.paste(draw(matrix("A", 1)), (0, 0))
    page.paste(draw(matrix("B", 1)), (200, 0))
    assert "shows 2 QR codes" in refused(folder, page)
    assert "25x25 pattern does not fit" in refused(folder, draw(matrix(PAYLOAD, 2)), rows=512, cols=24)
    assert "all one colour" in refused(folder, Image.new("L", (30, 30), 255))
    assert "all one colour" in refused(folder, Image.new("RGBA", (30, 30), (0, 0, 0, 0)))
    gradient = Image.linear_gradient("L")
    assert "more than two colours" in refused(folder, gradient)
    assert "two-coloured and at most 512x96" in refused(folder, gradient)
    alike = Image.new("RGB", (4, 4), (0, 0, 250))
    alike.putpixel((1, 1), (95, 0, 0))
    assert "equally bright" in refused(folder, alike)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG header that claims a size, and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes((1, 0, 0, 0, 0))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_file_refusals(folder: Path) -> None:
    assert "No such file" in refusal(folder / "none.png")
    assert "is a folder" in refusal(folder)
    assert "cannot be read" in refusal("a\0b.png")
    assert "no ordinary file" in refusal("/dev/zero")
    os.mkfifo(folder / "pipe")
    assert "no ordinary file" in refusal(folder / "pipe")  # opening it would wait for ever
    for number, data in enumerate((b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a")):
        path = folder / f"not-a-picture-{number}\n.png"
        path.write_bytes(data)
        assert "no readable picture" in refusal(path)


@pytest.mark.parametrize("size", [(8000, 5001), (10_000, 10_000), (50_000, 50_000), (2**31 - 1, 2**31 - 1)])
def test_enormous_pictures_are_refused_by_their_header(size: tuple[int, int], folder: Path) -> None:
    (folder / "bomb.png").write_bytes(png_of_size(*size))
    assert "more than 40 megapixels" in refusal(folder / "bomb.png")


def test_a_picture_at_the_limit_is_read(folder: Path) -> None:
    page = Image.new("1", (8000, 5000), 1)
    page.paste(draw(matrix(PAYLOAD, 2), 20), (3000, 2000))
    assert_same(read(folder, page), matrix(PAYLOAD, 2))


def test_large_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(SIXTY_SEVEN).save(folder / "heavy.png")
    monkeypatch.setattr(patterns, "MAX_BYTES", 50)
    assert "larger than" in refusal(folder / "heavy.png")


def encoded(ending: str) -> bytes:
    buffer = io.BytesIO()
    draw(matrix(PAYLOAD, 2), 3).convert("RGB").save(buffer, ending)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_truncated_files(ending: str, folder: Path) -> None:
    data = encoded(ending)
    path = folder / "truncated"
    for share in (0.02, 0.3, 0.6):
        path.write_bytes(data[: int(len(data) * share)])
        assert any(words in refusal(path) for words in ("damaged or cut short", "no readable picture"))


def outcome(path: Path, data: bytes) -> Pattern | None:
    """What reading gives: a pattern, or None for a well-formed refusal. Anything else is raised."""
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return pattern_from_image(path, max_rows=512, max_cols=96)
        except UsageError as error:
            assert error.remedy
            assert len(str(error).splitlines()) == 1
            return None


fuzz = settings(max_examples=250, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MAGIC = st.sampled_from([b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"RIFF", b"P4 "])


@fuzz
@given(magic=MAGIC, noise=st.binary(max_size=300))
def test_random_bytes_are_refused(magic: bytes, noise: bytes, folder: Path) -> None:
    assert outcome(folder / "noise", magic + b"\xfe" + noise) is None


@fuzz
@given(ending=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF"]), data=st.data())
def test_damaged_pictures_never_raise_anything_else(ending: str, data: st.DataObject, folder: Path) -> None:
    content = bytearray(encoded(ending))
    for place in data.draw(st.lists(st.integers(0, len(content) * 8 - 1), max_size=6)):
        content[place // 8] ^= 1 << place % 8
    kept = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    pattern = outcome(folder / "damaged", bytes(content[:kept]))
    if pattern is not None and pattern.kind == "qr":
        assert decode_qr(pattern.signs) == pattern.payload


# --- the rest


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=60), st.sampled_from("LMQH")
)
def test_any_text_decodes(text: str, level: str) -> None:
    assert decode_qr(pattern_from_text(text, error_correction=level).signs) == text


def test_decode_needs_dark_on_light() -> None:
    pattern = pattern_from_text(PAYLOAD)
    noise = np.sign(np.random.default_rng(0).normal(size=(21, 21)))
    assert decode_qr(pattern.signs * 0.003) == PAYLOAD
    assert [decode_qr(a) for a in (-pattern.signs, noise, 0 * noise, np.zeros((0, 3)), np.zeros(4))] == [None] * 5
    assert decode_qr(np.where(SIXTY_SEVEN, 1, -1)) is None


def test_pixel_accuracy_counts_zero_as_wrong() -> None:
    pattern = Pattern(np.array([[1, -1], [-1, 1]]), "bitmap", None, "four cells")
    assert pixel_accuracy(pattern.signs, pattern) == 1.0
    assert pixel_accuracy(np.array([[0.2, -3], [0, -1]]), pattern) == 0.5
    assert pixel_accuracy(np.zeros((2, 2)), pattern) == 0.0
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        pixel_accuracy(np.zeros((3, 2)), pattern)


def test_check_fits() -> None:
    pattern = pattern_from_text("A")
    check_fits(pattern, 21, 21, (0, 0))
    check_fits(pattern, 512, 96, (491, 75))
    for origin in ((492, 75), (491, 76), (-1, 0)):
        message = message_of(check_fits, pattern, 512, 96, origin)
        assert f"21x21 pattern does not fit at ({origin[0]}, {origin[1]}) in an LM head of 512x96" in message
        assert "at most 491,75" in message
    assert "larger head" in message_of(check_fits, pattern, 20, 96, (0, 0))


@pytest.mark.parametrize("size", [(1, 1), (1, 50_000), (50_000, 800), (50_001, 1), (8_000_000, 1), (3, 2)])
def test_extreme_shapes_are_refused(size: tuple[int, int], folder: Path) -> None:
    line = np.arange(size[0] * size[1], dtype=np.uint32).reshape(size[::-1]) * 7 % 251
    assert refused(folder, Image.fromarray(line.astype(np.uint8)))
