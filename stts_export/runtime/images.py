"""Images as the model was trained on them: the whole picture, and overlapping crops of it.

The picture is resized twice: to one crop, and to a canvas of several crops that overlap by a
margin. Every token of the image stands for a square of patches of either; patches in a margin
belong to one of the crops that have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.resize import check_frames, resize_frames


@dataclass(frozen=True)
class ImageCrops:
    """One image for the vision tower and the connector."""

    crops: NDArray[np.uint8]
    """(n, height, width, 3) at the model's size: the whole image, then the canvas's crops, row by
    row."""
    pooled_patches: NDArray[np.int32]
    """(N, pool * pool) indices into n * patches, patches row by row within a crop: what each
    token stands for; -1 = nothing."""
    grid: tuple[int, int, int, int]
    """Rows and columns of tokens of the whole image, then of the canvas: N = their products'
    sum."""


def image_crops(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    patch_size: int,
    *,
    max_crops: int = 8,
    overlap_margins: tuple[int, int] = (4, 4),
    pool: int = 2,
) -> ImageCrops:
    """Cut an image into crops.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: (height, width) of the model's input in pixels, equal.
        patch_size: side of a patch in pixels; divides the size.
        max_crops: upper limit of the canvas's crops.
        overlap_margins: patches at the left (or top) and right (or bottom) of a crop that its
            neighbour has too.
        pool: side of the square of patches that a token stands for.

    Raises:
        InputError: not an image, or sizes that do not go together.
    """
    check_frames(image, dimensions=(3,), where="image")
    side = _patches(size, patch_size, max_crops, overlap_margins, pool)
    margin = sum(overlap_margins)
    window = side - margin
    rows, columns = _tiling(image.shape, patch_size, window, margin, max_crops)
    canvas_patches = (rows * window + margin, columns * window + margin)
    canvas = resize_frames(
        image,
        (canvas_patches[0] * patch_size, canvas_patches[1] * patch_size),
        reuse=False,
    )
    crops = np.empty((1 + rows * columns, *size, 3), dtype=np.uint8)
    crops[0] = resize_frames(image, size, reuse=False)
    step = window * patch_size
    for row in range(rows):
        for column in range(columns):
            top, left = row * step, column * step
            crops[1 + row * columns + column] = canvas[top : top + size[0], left : left + size[1]]
    whole = np.arange(side * side).reshape(side, side)
    of_canvas = _canvas_patches((rows, columns), side, overlap_margins) + side * side
    pooled = [_pooled(patches, pool) for patches in (whole, of_canvas)]
    return ImageCrops(
        crops,
        np.concatenate([tokens.reshape(-1, pool * pool) for tokens in pooled]).astype(np.int32),
        (*pooled[0].shape[:2], *pooled[1].shape[:2]),
    )


def image_grid(
    image: NDArray[np.uint8],
    size: tuple[int, int],
    patch_size: int,
    *,
    max_crops: int = 8,
    overlap_margins: tuple[int, int] = (4, 4),
    pool: int = 2,
) -> tuple[int, int, int, int]:
    """Return the grid that `image_crops` will give, without its work.

    Args:
        image: as for `image_crops`, and so are all others.
        size: of the model's input.
        patch_size: side of a patch.
        max_crops: upper limit of crops.
        overlap_margins: of a crop.
        pool: side of a token's square.

    Raises:
        InputError: what `image_crops` would refuse.
    """
    check_frames(image, dimensions=(3,), where="image")
    side = _patches(size, patch_size, max_crops, overlap_margins, pool)
    margin = sum(overlap_margins)
    window = side - margin
    rows, columns = _tiling(image.shape, patch_size, window, margin, max_crops)
    whole = -(-side // pool)
    return (
        whole,
        whole,
        -(-(rows * window + margin) // pool),
        -(-(columns * window + margin) // pool),
    )


def _tiling(
    shape: tuple[int, ...], patch_size: int, window: int, margin: int, max_crops: int
) -> tuple[int, int]:
    """Return the (rows, columns) of crops of a picture; window and margin in patches."""
    margin *= patch_size
    inner = shape[0] - margin, shape[1] - margin
    return choose_tiling(inner, window * patch_size, max_crops)


def choose_tiling(image: tuple[int, int], window: int, max_crops: int) -> tuple[int, int]:
    """Return the (rows, columns) of crops that suit an image.

    Of the tilings that need no shrinking the one that needs the least enlargement, else the one
    that needs the least shrinking; smaller ones on a tie.

    Args:
        image: (height, width) in pixels, less the margins; may be negative for small images.
        window: side of a crop without its margins, in pixels.
        max_crops: upper limit of rows * columns.
    """
    candidates = [
        (rows, columns)
        for rows in range(1, max_crops + 1)
        for columns in range(1, max_crops // rows + 1)
    ]
    candidates.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    # In float32 as the reference: ties and near ties depend on it.
    canvas = np.array(candidates, dtype=np.float32) * np.float32(window)
    with np.errstate(divide="ignore"):
        scale = (canvas / np.array(image, dtype=np.float32)).min(axis=1)
    if (scale < 1).all():
        return candidates[int(scale.argmax())]
    return candidates[int(np.where(scale < 1, np.float32(10e9), scale).argmin())]


def _patches(
    size: tuple[int, int],
    patch_size: int,
    max_crops: int,
    overlap_margins: tuple[int, int],
    pool: int,
) -> int:
    """Return the patches along a side of a crop, checked against the other sizes."""
    height, width = size
    if height != width or patch_size < 1 or height < 1 or height % patch_size:
        raise InputError(
            f"a model input of {height} x {width} pixels in patches of {patch_size}",
            where="image_crops",
            allowed="a square of whole patches",
        )
    if max_crops < 1 or pool < 1:
        raise InputError(
            f"max_crops is {max_crops}, pool is {pool}", where="image_crops", allowed="1 or more"
        )
    side = height // patch_size
    if min(overlap_margins) < 0 or sum(overlap_margins) >= side:
        raise InputError(
            f"the overlap_margins are {list(overlap_margins)} patches, a crop has {side}",
            where="image_crops",
            allowed="margins that leave some patches between them",
            fix="set overlap_margins in the checkpoint's preprocessor_config.json",
        )
    return side


def _canvas_patches(
    tiling: tuple[int, int], side: int, overlap_margins: tuple[int, int]
) -> NDArray[np.intp]:
    """Return which patch of the crops each patch of the canvas is taken from."""
    along = [_owners(count, side, overlap_margins) for count in tiling]
    crop_row, patch_row = along[0]
    crop_column, patch_column = along[1]
    crop = crop_row[:, None] * tiling[1] + crop_column
    patches: NDArray[np.intp] = crop * side * side + patch_row[:, None] * side + patch_column
    return patches


def _owners(
    count: int, side: int, overlap_margins: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the crop that owns each patch along one axis of the canvas, and its index there."""
    before, after = overlap_margins
    crop, patch = np.divmod(np.arange(count * side), side)
    owned = ((crop == 0) | (patch >= before)) & ((crop == count - 1) | (patch < side - after))
    return crop[owned], patch[owned]


def _pooled(patches: NDArray[np.intp], pool: int) -> NDArray[np.intp]:
    """Group (rows, columns) into squares, (r, c, pool * pool); the edges get -1 where short."""
    missing = [-length % pool for length in patches.shape]
    padded = np.pad(
        patches, [(short // 2, short - short // 2) for short in missing], constant_values=-1
    )
    rows, columns = (length // pool for length in padded.shape)
    squares: NDArray[np.intp] = padded.reshape(rows, pool, columns, pool).transpose(0, 2, 1, 3)
    return squares.reshape(rows, columns, pool * pool)
