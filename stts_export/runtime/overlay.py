"""Pictures of what was pruned: a video and a contact sheet with removed windows darkened."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.drawing import (
    FAINT,
    PAPER,
    FrameLabel,
    draw_windows,
    label_strip,
    text_block,
)
from stts_export.runtime.resize import check_frames
from stts_export.runtime.video import Progress, play
from stts_export.runtime.writing import VideoWriter, check_not_source, finished_file, png_bytes

Source = str | os.PathLike[str] | NDArray[np.uint8]
"""A video file, or frames."""

_MAX_VIDEO_FRAMES = 3600
"""Frames of a picture video; longer ones show evenly chosen frames at their own times."""
_MAX_TILES = 64
_TILE_WIDTH, SHOWN_WIDTH = 252, 480
_GAP = 8
_MIN_TEXT_SCALE = 2


def write_overlay(
    out_path: str | os.PathLike[str],
    source: Source,
    keep: NDArray[np.bool_],
    window_grid: tuple[int, int],
    timestamps: Sequence[float] | NDArray[np.float64],
    *,
    scores: NDArray[np.float32] | None = None,
    title: str | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write an H.264 video that shows which windows of each sampled frame were kept.

    With a file as source, all of it is shown, each frame with the mask of the sample in force. With
    frames as source, each is shown until the next one's time.

    Args:
        out_path: the .mp4 to write; appears when complete.
        source: the video file, or the sampled frames: uint8 (T, height, width, 3) RGB at any size.
        keep: (T, W) True for windows that stay, row by row.
        window_grid: (rows, columns) of windows.
        timestamps: (T,) seconds of the sampled frames.
        scores: (T, W); marks each window after the first frame with its score, relative to the
            clip's lowest and highest.
        title: text above the frames.
        on_progress: called after every written frame.

    Raises:
        InputError: the shapes do not fit, the source cannot be read, or `out_path` is the source,
            does not end in .mp4 or cannot be written.
    """
    if not isinstance(source, np.ndarray):
        check_not_source(Path(out_path), source)
    masks = _Masks.checked(keep, window_grid, timestamps, scores)
    with finished_file(Path(out_path), ".mp4") as partial:
        total, moments = _moments(source, masks)
        with av.open(str(partial.absolute()), "w", options={"movflags": "faststart"}) as container:
            writer = VideoWriter(container)
            for done, (seconds, frame, place) in enumerate(moments, 1):
                writer.write(_page(_zoomed(frame), masks, place, title), seconds)
                if on_progress:
                    on_progress(done, total)
            writer.finish()


def write_contact_sheet(
    out_path: str | os.PathLike[str],
    frames: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    window_grid: tuple[int, int],
    timestamps: Sequence[float] | NDArray[np.float64],
    *,
    frame_size: tuple[int, int] | None = None,
    scores: NDArray[np.float32] | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG with the sampled frames side by side, removed windows darkened.

    Of more than 64 frames, 64 are shown, evenly chosen.

    Args:
        out_path: the .png to write; appears when complete.
        frames: uint8 (T, height, width, 3) RGB at any size.
        keep: (T, W) True for windows that stay, row by row.
        window_grid: (rows, columns) of windows.
        timestamps: (T,) seconds of the frames.
        frame_size: (height, width) whose shape the frames are shown in, for frames that were
            squeezed to the model's size.
        scores: (T, W); marks each window after the first frame with its score, relative to the
            clip's lowest and highest.
        title: text above the frames.

    Raises:
        InputError: the shapes do not fit, or `out_path` does not end in .png or cannot be written.
    """
    masks = _Masks.checked(keep, window_grid, timestamps, scores)
    _check_count(frames, masks)
    height, width = frame_size or frames.shape[1:3]
    tile_size = (max(1, round(_TILE_WIDTH * height / width)), _TILE_WIDTH)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MAX_TILES)).astype(int))
    tiles = [_page(scaled(frames[place], tile_size), masks, int(place)) for place in shown]
    sheet = _tiled(tiles)
    kept, total = int(keep.sum()), keep.size
    summary = f"{kept}/{total} windows kept in {len(frames)} frames"
    if len(shown) < len(frames):
        summary += f", {len(shown)} shown"
    parts = [text_block(summary, sheet.shape[1], 2, FAINT), sheet]
    if title:
        parts.insert(0, text_block(title, sheet.shape[1], 2))
    with finished_file(Path(out_path), ".png") as partial:
        partial.write_bytes(png_bytes(np.concatenate(parts)))


@dataclass(frozen=True)
class _Masks:
    """What was kept, when."""

    keep: NDArray[np.bool_]
    """(T, rows, columns)"""
    timestamps: NDArray[np.float64]
    scores: NDArray[np.float32] | None
    """(T, rows, columns), 0..1 after the first frame."""

    @staticmethod
    def checked(
        keep: NDArray[np.bool_],
        window_grid: tuple[int, int],
        timestamps: Sequence[float] | NDArray[np.float64],
        scores: NDArray[np.float32] | None,
    ) -> _Masks:
        times = np.asarray(timestamps, dtype=np.float64)
        expected = (len(times), window_grid[0] * window_grid[1])
        for name, values in (("keep", keep), ("scores", scores)):
            if values is not None and values.shape != expected:
                raise InputError(
                    f"{name} has the shape {values.shape}",
                    where="overlay",
                    allowed=f"{expected}: a row per timestamp, a column per window of the "
                    f"{window_grid[0]}x{window_grid[1]} grid",
                )
        shape = (len(times), *window_grid)
        if scores is not None:
            # The first frame's scores have no meaning: nothing comes before it.
            used = scores[1:] if len(times) > 1 else scores
            span = max(float(used.max() - used.min()), 1e-12)
            scores = ((scores - used.min()) / span).astype(np.float32).reshape(shape)
        return _Masks(keep.reshape(shape), times, scores)

    def in_force(self, seconds: float) -> int:
        """Place of the last sample at or before a moment."""
        place = int(np.searchsorted(self.timestamps, seconds + 1e-6, side="right")) - 1
        return max(place, 0)


def _moments(
    source: Source, masks: _Masks
) -> tuple[int, Iterator[tuple[float, NDArray[np.uint8], int]]]:
    """Number of frames to show; the second at which each appears, the frame, the mask's place."""
    if not isinstance(source, np.ndarray):
        total, frames = play(source, max_frames=_MAX_VIDEO_FRAMES)
        return total, ((seconds, frame, masks.in_force(seconds)) for seconds, frame in frames)
    _check_count(source, masks)
    times = (masks.timestamps - masks.timestamps[0]).tolist()
    last = len(times) - 1
    # The last frame stays for as long as the others do; a video has no other way to say it.
    times.append(times[-1] + (times[-1] / last if times[-1] > 0 else 1.0))
    places = [*range(last + 1), last]
    return len(times), zip(times, (source[place] for place in places), places, strict=True)


def _check_count(frames: NDArray[np.uint8], masks: _Masks) -> None:
    check_frames(frames)
    if len(frames) != len(masks.timestamps):
        raise InputError(
            f"there are {len(frames)} frames and {len(masks.timestamps)} timestamps",
            where="overlay",
            allowed="one timestamp per frame",
        )


def page(
    frame: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    seconds: float,
    scores: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Return a frame with its windows and a label below.

    Args:
        frame: (height, width, 3) RGB.
        keep: (rows, columns) True for windows that stay.
        seconds: the frame's time.
        scores: (rows, columns) in 0..1.
    """
    label = FrameLabel(seconds, int(keep.sum()), keep.size)
    width = frame.shape[1]
    strip = label_strip(label, width, text_scale(width))
    return np.concatenate([draw_windows(frame, keep, scores), strip])


def text_scale(width: int) -> int:
    """Pixels per pixel of a glyph, for text on a page of this width."""
    return max(_MIN_TEXT_SCALE, round(width / 400)) if width > _TILE_WIDTH else 1


def _page(
    frame: NDArray[np.uint8], masks: _Masks, place: int, title: str | None = None
) -> NDArray[np.uint8]:
    """One frame with its windows, a label below and a title above."""
    scores = masks.scores[place] if masks.scores is not None and place > 0 else None
    drawn = page(frame, masks.keep[place], float(masks.timestamps[place]), scores)
    if not title:
        return drawn
    width = frame.shape[1]
    return np.concatenate([text_block(title, width, text_scale(width)), drawn])


def _zoomed(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge a small frame by a whole number."""
    zoom = max(1, round(SHOWN_WIDTH / frame.shape[1]))
    return frame.repeat(zoom, axis=0).repeat(zoom, axis=1)


def scaled(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a frame at another (height, width)."""
    smaller = size[1] < frame.shape[1]
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
        width=size[1], height=size[0], interpolation="AREA" if smaller else "BILINEAR"
    )
    return np.asarray(picture.to_ndarray(format="rgb24"), dtype=np.uint8)


def _tiled(tiles: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Lay tiles of one size out in a page that is a little wider than high."""
    height, width = tiles[0].shape[:2]
    columns = min(len(tiles), math.ceil(math.sqrt(len(tiles) * 1.5 * height / width)))
    rows = math.ceil(len(tiles) / columns)
    size = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, 3)
    page = np.full(size, PAPER, dtype=np.uint8)
    for place, tile in enumerate(tiles):
        top = _GAP + place // columns * (height + _GAP)
        left = _GAP + place % columns * (width + _GAP)
        page[top : top + height, left : left + width] = tile
    return page
