"""Frames at the model's input size, equal to the resize that checkpoints were trained with.

Bilinear between pixel centres, aspect ratio not kept, no antialias, rounded half to even: what
`torch.nn.functional.interpolate` gives in fp32 on one thread, as in a data loader's worker, bit for
bit. With more threads torch itself differs by one level in about one value of 100 000.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError

if TYPE_CHECKING:
    from stts_export.engines.cuda import DeviceArray

_CHANNELS = 3
_SHAPES = {3: "(height, width, 3)", 4: "(T, height, width, 3)"}


_BAND = 16
"""Rows that are resized at a time where weights are not kept."""


class _Plan(NamedTuple):
    """What some rows of a result need; columns count bytes of an RGB row, not pixels."""

    target: slice
    """These rows."""
    rows: tuple[NDArray[np.intp], NDArray[np.intp]]
    columns: tuple[NDArray[np.intp], NDArray[np.intp]]
    weights: tuple[NDArray[np.float64], ...]
    """(rows, width * 3) per corner, in `_CORNERS` order; values are exact in float32."""


# (row, column) of the neighbours in the order in which torch adds them up.
_CORNERS = ((0, 1), (0, 0), (1, 0), (1, 1))


def resize_frames(
    frames: NDArray[np.uint8], size: tuple[int, int], *, reuse: bool = True
) -> NDArray[np.uint8]:
    """Resize RGB frames.

    Args:
        frames: (T, H, W, 3) or (H, W, 3) uint8.
        size: (height, width) of the result in pixels.
        reuse: keep the weights for the next call with the same sizes; they take 32 times the
            memory of a resized frame. Else they are made for a band of rows at a time.

    Returns:
        Frames of that size in the same layout; the input itself when it has that size already.

    Raises:
        InputError: not uint8 RGB frames, or a side is not positive.
    """
    check_frames(frames, dimensions=(3, 4))
    height, width = size
    if height < 1 or width < 1:
        raise InputError(f"the size is {size}", where="resize", allowed="positive sides")
    source = (frames.shape[-3], frames.shape[-2])
    if source == (height, width):
        return frames
    plans = (_whole_plan(source, size),) if reuse else _plans(source, size, _BAND)
    batch = frames.reshape(-1, source[0], source[1] * _CHANNELS)
    resized = np.empty((len(batch), height, width * _CHANNELS), dtype=np.uint8)
    for plan in plans:
        for frame, result in zip(batch, resized, strict=True):
            result[plan.target] = _resize(frame, plan)
    return resized.reshape(*frames.shape[:-3], height, width, _CHANNELS)


def check_frames(
    frames: NDArray[Any] | DeviceArray,
    *,
    dimensions: tuple[int, ...] = (4,),
    where: str = "frames",
) -> None:
    """Refuse anything but RGB frames.

    Args:
        frames: what was given.
        dimensions: of these, 4 for (T, H, W, 3) and 3 for (H, W, 3), those that are allowed.
        where: what it was given as.

    Raises:
        InputError: not uint8, of another shape, or empty.
    """
    is_rgb = frames.ndim in dimensions and frames.shape[-1] == _CHANNELS
    if frames.dtype != np.uint8 or not is_rgb or frames.size == 0:
        shapes = " or ".join(_SHAPES[number] for number in sorted(dimensions))
        raise InputError(
            f"got {frames.dtype} of shape {frames.shape}",
            where=where,
            allowed=f"uint8 {shapes} in RGB order, no side 0",
        )


def _resize(frame: NDArray[np.uint8], plan: _Plan) -> NDArray[np.float32]:
    lines = [frame.take(rows, axis=0) for rows in plan.rows]
    total = np.zeros(plan.weights[0].shape, dtype=np.float32)
    # torch adds with fused multiply-add: the product is exact, only each sum is rounded to
    # float32. A product of 24 and 8 bits is exact in float64. Values next to .5 depend on it.
    for weight, (row, column) in zip(plan.weights, _CORNERS, strict=True):
        pixels = lines[row].take(plan.columns[column], axis=1)
        total = (weight * pixels + total).astype(np.float32)
    return np.rint(total)


def _plans(source: tuple[int, int], size: tuple[int, int], band: int) -> Iterator[_Plan]:
    """Yield what every `band` rows of the result need."""
    rows, row_weights = _taps(source[0], size[0])
    pixels, column_weights = _taps(source[1], size[1])
    first, second = (
        (index[:, None] * _CHANNELS + np.arange(_CHANNELS)).reshape(-1) for index in pixels
    )
    across = [np.repeat(weights, _CHANNELS) for weights in column_weights]
    for top in range(0, size[0], band):
        part = slice(top, top + band)
        weights = tuple(
            np.multiply.outer(row_weights[row][part], across[column]).astype(np.float64)
            for row, column in _CORNERS
        )
        yield _Plan(part, (rows[0][part], rows[1][part]), (first, second), weights)


@lru_cache(maxsize=8)
def _whole_plan(source: tuple[int, int], size: tuple[int, int]) -> _Plan:
    return next(_plans(source, size, size[0]))


def _taps(
    source: int, size: int
) -> tuple[
    tuple[NDArray[np.intp], NDArray[np.intp]], tuple[NDArray[np.float32], NDArray[np.float32]]
]:
    """Indices and weights of the two source pixels on either side of every target pixel."""
    if source == size:
        index = np.arange(size)
        return (index, index), (np.ones(size, np.float32), np.zeros(size, np.float32))
    scale = np.float64(np.float32(source) / np.float32(size))
    centres = (np.arange(size) + 0.5) * scale - 0.5
    position = np.maximum(centres, 0).astype(np.float32)
    index = np.minimum(position.astype(np.intp), source - 1)
    second = np.clip(position - index.astype(np.float32), 0, 1).astype(np.float32)
    return (index, np.minimum(index + 1, source - 1)), (np.float32(1) - second, second)
