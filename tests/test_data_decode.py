"""From encoded bytes to RGB pixels."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ExifTags, Image

from kdcli.data.decode import decode_image, pack_pixels, unpack_pixels
from kdcli.errors import BadDataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image: Image.Image, kind: str = "PNG", **options: Any) -> np.ndarray:
    decoded = decode_image(encoded(image, kind, **options), "x.png")
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def test_rgb_comes_back_as_it_is() -> None:
    np.testing.assert_array_equal(pixels(Image.fromarray(COLOURS)), COLOURS)


def test_gray_and_black_and_white_become_three_equal_channels() -> None:
    gray = Image.fromarray(COLOURS[..., 0])
    np.testing.assert_array_equal(pixels(gray), np.stack([COLOURS[..., 0]] * 3, -1))
    assert set(np.unique(pixels(gray.convert("1")))) == {0, 255}


def test_palette_colours_are_looked_up() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(palette).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_palette_entries_lie_on_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert pixels(palette, transparency=0).tolist() == [[[255, 255, 255], [200, 100, 50]]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(palette, transparency=b"\x00\xff").tolist()[0][0] == [255, 255, 255]


def test_alpha_is_composited_on_white() -> None:
    layer = Image.new("RGBA", (1, 3))
    for row, alpha in enumerate((0, 255, 51)):
        layer.putpixel((0, row), (100, 0, 200, alpha))
    found = pixels(layer)[:, 0].astype(int)
    expected = np.array([255 + (np.array([100, 0, 200]) - 255) * alpha / 255 for alpha in (0, 255, 51)])
    assert np.abs(found - expected).max() <= 1
    assert pixels(Image.new("LA", (1, 1), (9, 0)))[0, 0].tolist() == [255, 255, 255]


def test_cmyk_jpeg_is_converted() -> None:
    assert (
        np.abs(
            pixels(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")[0, 0].astype(int) - [255, 0, 0]
        ).max()
        < 4
    )


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    levels = np.array([[0, 128, 257, 32896, 65535]], np.uint16)
    assert pixels(Image.fromarray(levels), kind)[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_float_pixels_are_refused_because_nobody_knows_their_range() -> None:
    with pytest.raises(BadDataError, match=r"x\.png: float pixels"):
        pixels(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    turn = {  # what a camera that writes this orientation has stored
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turn[orientation]))
    np.testing.assert_array_equal(pixels(stored, exif=exif)[..., 0], upright)


def test_broken_exif_does_not_cost_a_good_image() -> None:
    found = pixels(Image.new("RGB", (4, 4), "white"), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert found.shape == (4, 4, 3)


def test_a_truncated_jpeg_names_the_file_and_the_reason() -> None:
    whole = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
    with pytest.raises(BadDataError, match=r"cat/1\.jpg: .*truncated") as raised:
        decode_image(whole[: len(whole) // 2], "cat/1.jpg")
    assert "--bad-images drop" in raised.value.hint


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty file"), (b"no image at all", "not an image")])
def test_what_is_no_image_is_refused_without_internals(data: bytes, reason: str) -> None:
    with pytest.raises(BadDataError, match=f"x: {reason}") as raised:
        decode_image(data, "x")
    assert "BytesIO" not in raised.value.message


def test_a_large_image_is_no_warning_and_a_bomb_is_bad_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (40, 40)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(data, "x").size == (40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadDataError, match=r"x: .*exceeds limit"):
        decode_image(data, "x")


@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
def test_damaged_files_decode_or_are_bad_data_never_anything_else(junk: bytes, cut: int, kind: str) -> None:
    whole = encoded(Image.fromarray(COLOURS), kind)
    try:
        image = decode_image(whole[:cut] + junk, "x")
    except BadDataError:
        return
    assert image.mode == "RGB"


@pytest.mark.parametrize("array", [COLOURS, COLOURS[..., 0], COLOURS[:, ::2]])
def test_packed_pixels_come_back(array: np.ndarray) -> None:
    found = np.asarray(unpack_pixels(pack_pixels(array), "x"))
    expected = array if array.ndim == 3 else np.stack([array] * 3, -1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "damage", [b"", b"kd-raw L 2 2\nabc", b"kd-raw L 2\nabcd", b"kd-raw Q 2 2\nabcd", b"\xff" * 9]
)
def test_damaged_packed_pixels_are_bad_data(damage: bytes) -> None:
    with pytest.raises(BadDataError, match="x: "):
        unpack_pixels(damage, "x")


def test_the_module_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, kdcli.data.sources, kdcli.data.views; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
