"""Pixels of JPEG and WebP pictures with the colours that Pillow gives, which models learnt from.

Both formats store colour at half the resolution in most files. FFmpeg repeats it for every pixel of
a block, libjpeg and libwebp interpolate; their integer rules are followed here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

_BAND = 128
"""Rows that are converted at a time; even. Bounds the memory of a large picture."""
_SMALLEST = 2
"""Columns of colour up to which libjpeg repeats them, where it halves columns."""

_Samples = NDArray[np.int32]


def still_rgb(frame: VideoFrame, codec: str) -> NDArray[np.uint8] | None:
    """Convert a still picture.

    Args:
        frame: as decoded.
        codec: the name of its decoder.

    Returns:
        (height, width, 3) RGB; None for a format that has nothing to interpolate, or that Pillow
        converts as FFmpeg does.
    """
    form = frame.format.name
    if codec == "mjpeg" and form in _JPEG:
        enlarge, to_rgb = _JPEG[form], _jpeg_rgb
    elif codec == "webp" and form in ("yuv420p", "yuva420p"):
        enlarge, to_rgb = _webp_enlarged, _webp_rgb
    else:
        return None
    light, *colours = (_plane(frame, number) for number in range(3))
    halved = [side > part for side, part in zip(light.shape, colours[0].shape, strict=True)]
    step = _BAND // 2 if halved[0] else _BAND
    rgb = np.empty((*light.shape, 3), dtype=np.uint8)
    for top in range(0, len(light), _BAND):
        part = light[top : top + _BAND]
        first = top // 2 if halved[0] else top
        # With a row above and one below, for the interpolation.
        rows = np.clip(np.arange(first - 1, first + step + 1), 0, len(colours[0]) - 1)
        near = (enlarge(plane[rows].astype(np.int32), part.shape) for plane in colours)
        rgb[top : top + _BAND] = to_rgb(part.astype(np.int32), *near)
    return rgb


def _plane(frame: VideoFrame, number: int) -> NDArray[np.uint8]:
    plane = frame.planes[number]
    rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width]


def _across(samples: _Samples) -> tuple[_Samples, _Samples]:
    """Every sample for each of its two columns, and the neighbour on that column's other side."""
    padded = np.pad(samples, ((0, 0), (1, 1)), mode="edge")
    near = np.repeat(samples, 2, axis=1)
    far = np.empty_like(near)
    far[:, 0::2], far[:, 1::2] = padded[:, :-2], padded[:, 2:]
    return near, far


def _down(samples: _Samples) -> tuple[_Samples, _Samples]:
    """As `_across`, for rows; the first and the last row are neighbours only."""
    near = np.repeat(samples[1:-1], 2, axis=0)
    far = np.empty_like(near)
    far[0::2], far[1::2] = samples[:-2], samples[2:]
    return near, far


# Of each: samples with a row above and below, and the (height, width) of what they become.


def _jpeg_444(samples: _Samples, shape: tuple[int, ...]) -> _Samples:
    return samples[1:-1][: shape[0]]


def _jpeg_422(samples: _Samples, shape: tuple[int, ...]) -> _Samples:
    near, far = _across(samples[1:-1][: shape[0]])
    if samples.shape[1] <= _SMALLEST:
        return near[:, : shape[1]]
    rounding = 1 + np.arange(near.shape[1]) % 2
    return ((3 * near + far + rounding) >> 2)[:, : shape[1]]


def _jpeg_440(samples: _Samples, shape: tuple[int, ...]) -> _Samples:
    near, far = _down(samples)
    rounding = 1 + np.arange(len(near))[:, None] % 2
    return ((3 * near + far + rounding) >> 2)[: shape[0]]


def _jpeg_420(samples: _Samples, shape: tuple[int, ...]) -> _Samples:
    near, far = _down(samples)
    if samples.shape[1] <= _SMALLEST:
        return np.repeat(near, 2, axis=1)[: shape[0], : shape[1]]
    near, far = _across((3 * near + far)[: shape[0]])
    rounding = 8 - np.arange(near.shape[1]) % 2
    return ((3 * near + far + rounding) >> 4)[:, : shape[1]]


_JPEG: dict[str, Callable[[_Samples, tuple[int, ...]], _Samples]] = {
    "yuvj444p": _jpeg_444,
    "yuvj422p": _jpeg_422,
    "yuvj440p": _jpeg_440,
    "yuvj420p": _jpeg_420,
}


def _jpeg_rgb(light: _Samples, blue: _Samples, red: _Samples) -> NDArray[np.uint8]:
    """By JFIF's factors, with 16 fractional bits."""
    blue, red, half = blue - 128, red - 128, 1 << 15
    channels = (
        light + ((91881 * red + half) >> 16),
        light + ((-22554 * blue - 46802 * red + half) >> 16),
        light + ((116130 * blue + half) >> 16),
    )
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def _webp_enlarged(samples: _Samples, shape: tuple[int, ...]) -> _Samples:
    """Weights of 9, 3, 3 and 1 sixteenths, rounded down twice."""
    near, far = _down(samples)
    own, beside = _across(near[: shape[0]])
    above, across = _across(far[: shape[0]])
    enlarged = (((own + 3 * beside + 3 * above + across + 8) >> 3) + own) >> 1
    return enlarged[:, : shape[1]]


def _webp_rgb(light: _Samples, blue: _Samples, red: _Samples) -> NDArray[np.uint8]:
    """By BT.601 of limited range, with 6 fractional bits."""
    light = (light * 19077) >> 8
    channels = (
        light + ((red * 26149) >> 8) - 14234,
        light - ((blue * 6419) >> 8) - ((red * 13320) >> 8) + 8708,
        light + ((blue * 33050) >> 8) - 17685,
    )
    return (np.stack(channels, axis=-1) >> 6).clip(0, 255).astype(np.uint8)
