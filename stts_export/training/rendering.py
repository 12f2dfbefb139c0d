"""Drawing synthetic clips: frames at any size and time, H.264 files, and what each window shows.

Objects are drawn in image coordinates. The camera moves over what is behind them only: each shot's
background is drawn once on a canvas that is larger than a frame, and frames are cut out of it.

Axes: T frames of a clip, W windows of a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.training.clips import COLOURS, DIRECTIONS, FPS, SHAPES, Clip, Thing
from stts_export.training.examples import WindowContents

Frames = NDArray[np.uint8]
"""RGB frames, (T, height, width, 3)."""

# One thread, so that a seed gives the same file on every machine.
_H264 = {"crf": "20", "preset": "veryfast", "threads": "1"}
# Grey levels of everything that is not an object: far below white, and hardly coloured.
_DARKEST, _BRIGHTEST = 35.0, 150.0
# A window shows an object that covers this share of it.
_LEAST_SHARE = 0.1

_Canvas = NDArray[np.float32]


def frame_times(clip: Clip, times: Sequence[float]) -> list[float]:
    """Return the start of the file frame that is on screen at each sampled time, in seconds."""
    last = clip.frame_count - 1
    return [min(last, int(time * FPS + 1e-6)) / FPS for time in times]


def render(clip: Clip, times: Sequence[float], size: int) -> Frames:
    """Draw a clip.

    Args:
        clip: what to draw.
        times: (T,) seconds from 0 to the clip's duration.
        size: height and width in pixels.

    Returns:
        (T, size, size, 3) uint8 RGB.

    Raises:
        InputError: a time before or after the clip.
    """
    outside = [time for time in times if not 0 <= time <= clip.duration]
    if outside:
        raise InputError(
            f"{outside[0]} s is no time of the clip",
            where="render",
            allowed=f"0 to {clip.duration:g} s",
        )
    backgrounds: dict[int, _Background] = {}
    frames = np.empty((len(times), size, size, 3), dtype=np.uint8)
    for index, time in enumerate(times):
        shot = clip.shot_at(time)
        if shot not in backgrounds:
            backgrounds[shot] = _Background(clip, shot, size)
        canvas = backgrounds[shot].at(time)
        for thing in clip.things:
            place = _place(thing, time)
            if place is not None:
                _paint(canvas, thing.shape, thing.rgb, place, thing.radius, size)
        frames[index] = np.clip(np.rint(canvas, out=canvas), 0, 255, out=canvas)
    return frames


def degrade(frames: Frames, rng: np.random.Generator) -> Frames:
    """Add what a camera and an encoder leave in frames: a change of exposure, and noise."""
    gain = np.float32(rng.uniform(0.93, 1.07))
    offset = np.float32(rng.uniform(-6, 6))
    noise = rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(rng.uniform(0.5, 4))
    return np.clip(np.round(frames * gain + offset + noise), 0, 255).astype(np.uint8)


def window_contents(
    clip: Clip, times: Sequence[float], window_grid: tuple[int, int]
) -> WindowContents:
    """Say what the windows of a clip's frames show.

    A window shows the object that covers most of it, if that is at least a tenth of the window.
    An object that is split more finely is shown by the window with the largest part of it.

    Args:
        clip: the clip.
        times: (T,) seconds.
        window_grid: rows and columns of windows.

    Returns:
        (T, W) int64 each.
    """
    rows, columns = window_grid
    fine = 6 * rows * columns // np.gcd(rows, columns)
    areas = np.zeros((len(times), len(clip.things) + 1, rows * columns), np.float32)
    areas[:, 0] = _LEAST_SHARE
    for frame, time in enumerate(times):
        for index, thing in enumerate(clip.things, start=1):
            place = _place(thing, time)
            drawn = None if place is None else _coverage(thing.shape, place, thing.radius, fine)
            if drawn is not None:
                plane = np.zeros((fine, fine), np.float32)
                plane[drawn[0], drawn[1]] = drawn[2]
                tiles = plane.reshape(rows, fine // rows, columns, fine // columns)
                shares = tiles.mean((1, 3)).reshape(-1)
                largest = shares.argmax()
                shares[largest] = max(shares[largest], 1.01 * _LEAST_SHARE)
                areas[frame, index] = shares
    winner = areas.argmax(1)
    names, moves = list(COLOURS), list(DIRECTIONS.values())
    colour = np.array([0, *(names.index(thing.colour) + 1 for thing in clip.things)])
    shape = np.array([0, *(SHAPES.index(thing.shape) + 1 for thing in clip.things)])
    signs = [(int(np.sign(thing.vx)), int(np.sign(thing.vy))) for thing in clip.things]
    motion = np.array([0, *(moves.index(sign) + 1 if sign in moves else 0 for sign in signs)])
    return WindowContents(colour[winner], shape[winner], motion[winner])


def write_mp4(clip: Clip, path: Path, *, size: int = 240) -> None:
    """Write the clip as an H.264 file of size x size pixels (even) at `FPS` frames a second."""
    frames = render(clip, [index / FPS for index in range(clip.frame_count)], size)
    rng = np.random.default_rng((clip.seed, 11))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_H264)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            grain = 2 * rng.standard_normal((size, size, 1), dtype=np.float32)
            grainy = np.clip(np.rint(frame + grain), 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grainy, format="rgb24")))
        container.mux(stream.encode())


class _Background:
    """What is behind the objects of one shot: a grey slope, and dull shapes with sharp edges.

    Args:
        clip: the clip.
        shot: index of the shot.
        size: of a frame, in pixels.
    """

    def __init__(self, clip: Clip, shot: int, size: int) -> None:
        self._shot = clip.shots[shot]
        self._size = size
        self._shake = clip.shake
        rng = np.random.default_rng((clip.seed, 5))
        self._rate, self._phase = rng.uniform(0.7, 1.6, 2), rng.uniform(0, 1, 2)
        end = clip.shots[shot + 1].start if shot + 1 < len(clip.shots) else clip.duration
        way = np.array(self._shot.pan) * (end - self._shot.start)
        self._low = np.minimum(0.0, way) - clip.shake
        extent = 1.0 + np.abs(way) + 2 * clip.shake
        self._canvas = self._draw(np.random.default_rng((clip.seed, 7, shot)), extent)

    def at(self, time: float) -> _Canvas:
        """Return a copy of what the camera sees at a time of the shot, (size, size, 3)."""
        swing = self._shake * np.sin(2 * np.pi * (self._rate * time + self._phase))
        seen = np.array(self._shot.pan) * (time - self._shot.start) + swing - self._low
        x, y = np.maximum(0.0, seen * self._size)
        left, top, size = int(x), int(y), self._size
        view = self._canvas[top : top + size + 1, left : left + size + 1]
        right, down = np.float32(x - left), np.float32(y - top)
        if right or down:
            view = view[:-1] + down * (view[1:] - view[:-1])
            return view[:, :-1] + right * (view[:, 1:] - view[:, :-1])
        return view[:-1, :-1].copy()

    def _draw(self, rng: np.random.Generator, extent: NDArray[np.float64]) -> _Canvas:
        size = self._size
        # One pixel for the neighbour that `at` blends with, one for rounding.
        width, height = (int(length * size) + 2 for length in extent)
        base = rng.uniform(60, 105)
        slope_x, slope_y = rng.uniform(-25, 25, 2)
        x = (np.arange(width, dtype=np.float32) + 0.5) / width - 0.5
        y = (np.arange(height, dtype=np.float32) + 0.5) / height - 0.5
        grey = np.float32(base) + np.float32(slope_x) * x + np.float32(slope_y) * y[:, None]
        canvas = grey[..., None] + rng.uniform(-6, 6, 3).astype(np.float32)
        for _ in range(round(self._shot.clutter * float(extent.prod()))):
            step = rng.uniform(18, 45) * (1 if rng.random() < 0.5 else -1)
            level = np.clip(base + step, _DARKEST, _BRIGHTEST)
            dull = tuple(float(value) for value in level + rng.uniform(-9, 9, 3))
            place = (float(rng.uniform(0, extent[0])), float(rng.uniform(0, extent[1])))
            shape = rng.integers(2 * len(SHAPES))
            if shape < len(SHAPES):
                _paint(canvas, SHAPES[shape], dull, place, float(rng.uniform(0.05, 0.13)), size)
            else:
                half = rng.uniform(0.03, 0.17, 2)
                low = np.maximum(0, np.rint((place - half) * size)).astype(int)
                high = np.rint((place + half) * size).astype(int)
                canvas[low[1] : high[1], low[0] : high[0]] = dull
        return canvas


def _place(thing: Thing, time: float) -> tuple[float, float] | None:
    """Return the centre of a thing, or None while it is not on screen."""
    if not thing.start <= time < thing.end:
        return None
    since = time - thing.start
    return thing.x + thing.vx * since, thing.y + thing.vy * since


def _paint(
    canvas: _Canvas,
    shape: str,
    rgb: tuple[float, ...],
    place: tuple[float, float],
    radius: float,
    size: int,
) -> None:
    """Draw a shape over a canvas (height, width, 3) of `size` pixels per unit of length."""
    drawn = _coverage(shape, place, radius, size, canvas.shape[:2])
    if drawn is not None:
        rows, columns, cover = drawn
        patch = canvas[rows, columns]
        patch += cover[..., None] * (np.array(rgb, np.float32) - patch)


def _coverage(
    shape: str,
    place: tuple[float, float],
    radius: float,
    size: int,
    limits: tuple[int, ...] | None = None,
) -> tuple[slice, slice, NDArray[np.float32]] | None:
    """Return (rows, columns, coverage 0..1) of a shape on a canvas, or None if it is outside.

    The canvas has `size` pixels per unit of length, and `limits` rows and columns; without them it
    is one square unit.
    """
    height, width = limits or (size, size)
    x, y = place[0] * size, place[1] * size
    radius *= size
    reach = 1.15 * radius + 1
    top, bottom = max(0, int(y - reach)), min(height, int(y + reach) + 1)
    left, right = max(0, int(x - reach)), min(width, int(x + reach) + 1)
    if top >= bottom or left >= right:
        return None
    dy = ((np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)) / radius)[:, None]
    dx = ((np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / radius)[None, :]
    cover = np.clip(0.5 - _distance(shape, dx, dy) * radius, 0.0, 1.0)
    return slice(top, bottom), slice(left, right), cover.astype(np.float32)


def _distance(shape: str, dx: NDArray[np.float32], dy: NDArray[np.float32]) -> NDArray[np.float32]:
    """Signed distance (negative inside) in units of the radius; dx, dy likewise."""
    if shape == "circle":
        return np.hypot(dx, dy) - np.float32(1.0)
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - np.float32(0.9)
    # Upright triangle: base at +0.85, apex at -1.0, half the base 1.05.
    slope = np.float32(1.05 / 1.85)
    side = (np.abs(dx) - slope * (dy + np.float32(1.0))) / np.hypot(np.float32(1.0), slope)
    return np.maximum(side, dy - np.float32(0.85))
