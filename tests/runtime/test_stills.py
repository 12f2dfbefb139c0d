"""Pixels of JPEG and WebP files, against Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stts_export.runtime.video import read_video

# FFmpeg and libjpeg differ in how they round the transform of 8 x 8 pixels.
JPEG_MAX, JPEG_MEAN = 3, 0.08

SIZES = [(1, 1), (2, 3), (3, 4), (5, 6), (33, 17), (127, 5), (128, 64), (129, 65), (257, 300)]


def _picture(height: int, width: int) -> np.ndarray:
    """Smooth colours, as a photograph has."""
    rng = np.random.default_rng(1)
    total = np.zeros((height, width, 3))
    for step, weight in ((32, 0.7), (8, 0.3)):
        noise = rng.integers(0, 256, (height // step + 2, width // step + 2, 3), dtype=np.uint8)
        layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        total += weight * np.asarray(layer)
    return total.clip(0, 255).astype(np.uint8)


def _difference(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB")).astype(int)
    got = read_video(path, max_frames=1)
    assert got.is_image
    return np.abs(got.frames[0] - expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:0", "progressive": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_jpeg(tmp_path: Path, size: tuple[int, int], options: dict[str, Any]):
    path = tmp_path / "picture.jpg"
    Image.fromarray(_picture(*size)).save(path, quality=90, **options)
    difference = _difference(path)
    assert difference.max() <= JPEG_MAX
    assert difference.mean() <= (JPEG_MEAN if difference.size > 100 else 1)


@pytest.mark.parametrize("size", [(16, 16), (144, 64)])
def test_jpeg_with_colours_of_every_second_row(tmp_path: Path, size: tuple[int, int]):
    """No encoder here writes such files: the head of one with every second column is changed."""
    path = tmp_path / "picture.jpg"
    Image.fromarray(_picture(*size)).save(path, quality=90, subsampling="4:2:2")
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    assert content[frame + 11] == 0x21
    content[frame + 11] = 0x12
    path.write_bytes(content)
    difference = _difference(path)
    assert difference.max() <= JPEG_MAX
    assert difference.mean() <= JPEG_MEAN


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [False, True])
def test_webp_is_equal(tmp_path: Path, size: tuple[int, int], alpha: bool):
    path = tmp_path / "picture.webp"
    pixels = _picture(*size)
    if alpha:
        pixels = np.dstack([pixels, pixels[..., 0] // 2 + 100])
    Image.fromarray(pixels).save(path, quality=80)
    assert _difference(path).max() == 0


@pytest.mark.parametrize("name", ["picture.png", "picture.bmp", "lossless.webp", "picture.tif"])
def test_formats_without_loss_are_equal(tmp_path: Path, name: str):
    Image.fromarray(_picture(40, 31)).save(tmp_path / name, lossless=True)
    assert _difference(tmp_path / name).max() == 0


def test_gray_jpeg(tmp_path: Path):
    path = tmp_path / "picture.jpg"
    Image.fromarray(_picture(40, 31)[..., 0]).save(path, quality=90)
    assert _difference(path).max() <= 1
