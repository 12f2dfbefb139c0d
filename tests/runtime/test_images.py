"""Crops of images: against numbers from the reference's code, and against its rules."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.runtime.images import choose_tiling, image_crops, image_grid


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _picture(height: int, width: int) -> np.ndarray:
    row, column = np.mgrid[:height, :width]
    channels = [(row * 7 + column * 3) % 256, (row * column) % 251, (column * 11 + row) % 256]
    return np.stack(channels, -1).astype(np.uint8)


def _patches(crops: np.ndarray, patch: int) -> np.ndarray:
    """(n, side, side, 3) to (n, patches, pixels), as the vision tower reads them."""
    count, side = len(crops), crops.shape[1] // patch
    split = crops.reshape(count, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return split.reshape(count, side * side, -1)


# Size, grid, crops, and CRC-32 of the pooled indices and of the patches, from
# `image_to_patches_and_grids` of the reference at Molmo2's settings.
REFERENCE = [
    ((1, 1), (14, 14, 14, 14), 2, 3668662780, 498404653),
    ((97, 89), (14, 14, 14, 14), 2, 3668662780, 3917467860),
    ((113, 113), (14, 14, 14, 14), 2, 3668662780, 1494593908),
    ((112, 300), (14, 14, 14, 14), 2, 3668662780, 2563723451),
    ((378, 378), (14, 14, 14, 14), 2, 3668662780, 2235114288),
    ((379, 377), (14, 14, 23, 14), 3, 19375617, 575414203),
    ((480, 640), (14, 14, 23, 23), 5, 2586997070, 2912891945),
    ((640, 480), (14, 14, 23, 23), 5, 2586997070, 1165557939),
    ((1080, 1920), (14, 14, 23, 42), 9, 1135788100, 4110877812),
    ((756, 4001), (14, 14, 14, 71), 8, 3682374638, 2981722653),
    ((4001, 37), (14, 14, 14, 14), 2, 3668662780, 4166127269),
    ((1512, 1512), (14, 14, 23, 23), 5, 2586997070, 15583694),
]


@pytest.mark.parametrize(("size", "grid", "count", "indices", "pixels"), REFERENCE)
def test_equals_the_reference_at_molmo2s_settings(size, grid, count, indices, pixels):
    made = image_crops(_picture(*size), (378, 378), 14)
    assert image_grid(_picture(*size), (378, 378), 14) == made.grid
    assert made.grid == grid
    assert made.crops.shape == (count, 378, 378, 3)
    assert made.crops.dtype == np.uint8
    assert made.pooled_patches.dtype == np.int32
    assert len(made.pooled_patches) == grid[0] * grid[1] + grid[2] * grid[3]
    assert zlib.crc32(made.pooled_patches.astype("<i4").tobytes()) == indices
    assert zlib.crc32(_patches(made.crops, 14).tobytes()) == pixels


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(
        pixels, (height, width), mode="bilinear", align_corners=False, antialias=False
    )
    return resized.round().to(torch.uint8)[0].permute(1, 2, 0).numpy()


@st.composite
def _settings(draw: st.DrawFn) -> tuple[int, int, int, tuple[int, int], int]:
    """Patches of a crop's side, patch size, crops, margins, pool."""
    side = draw(st.integers(2, 9))
    before = draw(st.integers(0, side - 1))
    after = draw(st.integers(0, side - 1 - before))
    return (
        side,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 9)),
        (before, after),
        draw(st.integers(1, 3)),
    )


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 120), st.integers(1, 120), _settings())
@example(1, 1, (2, 1, 1, (0, 0), 1))
@example(8, 8, (8, 1, 8, (4, 3), 2))  # exactly the margins and one window
@example(7, 30, (8, 1, 8, (4, 3), 2))  # nothing is left beside the margins
def test_every_token_shows_its_part_of_the_picture(height, width, sizes):
    side, patch, max_crops, margins, pool = sizes
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    made = image_crops(
        image, (side * patch,) * 2, patch, max_crops=max_crops, overlap_margins=margins, pool=pool
    )
    rows, columns, high_rows, high_columns = made.grid
    assert made.grid == image_grid(
        image, (side * patch,) * 2, patch, max_crops=max_crops, overlap_margins=margins, pool=pool
    )
    np.testing.assert_array_equal(made.crops[0], _resized(image, side * patch, side * patch))
    of_crops = _patches(made.crops, patch).reshape(-1, patch * patch * 3)
    whole = made.pooled_patches[: rows * columns]
    assert sorted(whole[whole >= 0]) == list(range(side * side))

    window = side - sum(margins)
    tiles = [
        (r, c)
        for r in range(1, max_crops + 1)
        for c in range(1, max_crops // r + 1)
        if r * c == len(made.crops) - 1
        and -(-(r * window + sum(margins)) // pool) == high_rows
        and -(-(c * window + sum(margins)) // pool) == high_columns
    ]
    assert tiles
    shown = [_shown(image, tile, window, sum(margins), patch, pool) for tile in tiles]
    tokens = made.pooled_patches[rows * columns :]
    got = np.where((tokens >= 0)[..., None], of_crops[tokens], 0)
    assert any(expected.shape == got.shape and (expected == got).all() for expected in shown)
    used = tokens[tokens >= 0]
    assert len(set(used)) == len(used)
    assert used.min() >= side * side


def _shown(image, tile, window, margin, patch, pool) -> np.ndarray:
    """Pixels (tokens, pool * pool, patch * patch * 3) of the canvas, 0 beyond its edges."""
    high, wide = (count * window + margin for count in tile)
    canvas = _resized(image, high * patch, wide * patch)
    blocks = canvas.reshape(high, patch, wide, patch, 3).transpose(0, 2, 1, 3, 4)
    blocks = blocks.reshape(high, wide, -1)
    short = [-high % pool, -wide % pool]
    padding = [(n // 2, n - n // 2) for n in short]
    blocks = np.pad(blocks, [*padding, (0, 0)])
    r, c = blocks.shape[0] // pool, blocks.shape[1] // pool
    grouped = blocks.reshape(r, pool, c, pool, -1).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(r * c, pool * pool, -1)


@pytest.mark.parametrize(
    ("image", "max_crops", "tiling"),
    [
        ((266, 266), 8, (1, 1)),
        ((267, 266), 8, (2, 1)),  # one pixel more takes one more crop
        ((266, 267), 8, (1, 2)),
        ((532, 532), 8, (2, 2)),
        ((5000, 5000), 8, (2, 2)),  # 2 x 3 and 2 x 4 shrink as much
        ((500, 900), 1, (1, 1)),
        ((-10, -10), 8, (1, 1)),  # smaller than the margins
        ((-10, 300), 8, (1, 1)),
        ((0, 0), 8, (1, 1)),
        ((0, 900), 8, (1, 4)),
    ],
)
def test_tiling(image, max_crops, tiling):
    assert choose_tiling(image, 266, max_crops) == tiling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_margins": (14, 13)}, r"overlap_margins are \[14, 13\] patches, a crop has 27"),
        ({"overlap_margins": (-1, 4)}, "overlap_margins"),
        ({"max_crops": 0}, "max_crops is 0"),
        ({"pool": 0}, "pool is 0"),
        ({"size": (378, 392)}, "378 x 392 pixels in patches of 14"),
        ({"size": (380, 380)}, "380 x 380 pixels"),
    ],
)
def test_sizes_that_do_not_go_together(settings, message):
    size = settings.pop("size", (378, 378))
    with pytest.raises(InputError, match=message):
        image_crops(_picture(20, 20), size, 14, **settings)
    with pytest.raises(InputError, match=message):
        image_grid(_picture(20, 20), size, 14, **settings)


@pytest.mark.parametrize("image", [np.zeros((2, 4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_refuses_what_is_no_image(image):
    with pytest.raises(InputError, match=r"^image: got uint8 of shape") as error:
        image_crops(image, (378, 378), 14)
    assert error.value.allowed == "uint8 (height, width, 3) in RGB order, no side 0"
