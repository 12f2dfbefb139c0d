"""Frames of a video file, at the moments that the model sees."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from stts_export.runtime.demux import UnreliableTimesError, VideoFile
from stts_export.runtime.exif import is_mirrored
from stts_export.runtime.frame_index import FrameIndex
from stts_export.runtime.resize import resize_frames
from stts_export.runtime.sampling import sample_times
from stts_export.runtime.stills import still_rgb

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (frames done, frames in all)."""
# Files that may hold a single picture in a format for moving ones.
_PICTURE_SUFFIXES = frozenset({".gif", ".apng", ".png", ".avif"})


@dataclass(frozen=True)
class VideoClip:
    """The sampled frames of a video file, or an image as its only frame."""

    frames: NDArray[np.uint8]
    """(T, height, width, 3) RGB, upright."""
    timestamps: NDArray[np.float64]
    """(T,) target times in seconds after the first frame: what the prompt prints."""
    fps: float
    """Frame rate of the file; 0 for an image."""
    duration: float
    """Seconds from the start of the first frame to the end of the last; 0 for an image."""
    source: str
    """The file."""
    source_size: tuple[int, int]
    """(height, width) of the file's frames, upright."""
    is_image: bool = False
    """An image: its frame has the file's size, and nothing may be removed from it."""


def read_video(
    path: str | os.PathLike[str],
    *,
    max_frames: int,
    max_fps: float = 2.0,
    size: tuple[int, int] | None = None,
    on_progress: Progress | None = None,
) -> VideoClip:
    """Sample a video file as the model was trained: uniformly, the last frame included.

    The frame for a target time is the one on screen at that time. Memory stays bounded by the
    sampled frames when `size` is given: each is resized as soon as it is decoded.

    Args:
        path: an image or video file; anything that FFmpeg decodes.
        max_frames: upper limit of the number of samples T.
        max_fps: upper limit of samples per second.
        size: (height, width) of a video's frames in pixels; None keeps the file's, as images do.
        on_progress: called after every sampled frame.

    Raises:
        InputError: the file is missing, is no video, has no frames, ends before its stated
            duration, is a picture that is damaged or cut off, or has a codec that is not
            supported; or a limit is not positive.
    """
    file = VideoFile(Path(path))
    if file.is_image:
        frame = file.picture()
        mirrored = is_mirrored(file.path.read_bytes())
        return _image(file, oriented(frame, mirrored=mirrored, rgb=still_rgb(frame, file.codec)))
    packets = file.index_packets()
    if packets is not None:
        try:
            return _read(file, packets, (max_frames, max_fps), size, on_progress)
        except UnreliableTimesError as error:
            _log.info("%s: %s; reading it by decoding every frame", path, error)
    return _read(file, file.index_frames(), (max_frames, max_fps), size, on_progress)


def play(
    path: str | os.PathLike[str], *, max_frames: int | None = None
) -> tuple[int, Iterator[tuple[float, NDArray[np.uint8]]]]:
    """Decode a whole video.

    Args:
        path: an image or video file.
        max_frames: when there are more frames, leave out all but every second, third, ...

    Returns:
        The number of frames to come, and an iterator over them: seconds after the first frame's
        start, and (height, width, 3) RGB, upright.

    Raises:
        InputError: as `read_video`.
    """
    file = VideoFile(Path(path))
    index = file.index_packets() or file.index_frames()
    starts = (index.starts - index.starts[0]).tolist()
    step = -(-len(starts) // max_frames) if max_frames else 1
    shown = itertools.islice(zip(starts, file.decode(), strict=False), 0, None, step)
    return -(-len(starts) // step), ((start, oriented(frame)) for start, frame in shown)


def oriented(
    frame: VideoFrame, *, mirrored: bool = False, rgb: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Return (height, width, 3) RGB, turned and mirrored as the file asks for.

    Args:
        frame: as decoded.
        mirrored: what EXIF says. PyAV cannot hand over the matrix of a frame that comes with EXIF,
            only its angle.
        rgb: its pixels as stored, (height, width, 3); FFmpeg converts them when None.
    """
    if rgb is None:
        rgb = np.asarray(frame.to_ndarray(format="rgb24", channel_last=True), dtype=np.uint8)
    a, b, c, d = _display_matrix(frame, mirrored)
    right, down = a, d
    if abs(b) > abs(a):
        rgb, right, down = rgb.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


def _display_matrix(frame: VideoFrame, mirrored: bool) -> tuple[float, float, float, float]:
    """(a, b, c, d): a pixel at column p and row q is shown at column a p + c q, row b p + d q."""
    try:
        side_data = cast("Mapping[SideDataType, bytes]", frame.side_data)
    except ValueError:  # PyAV does not know every kind of side data
        angle = math.radians(frame.rotation)  # counterclockwise
        flip = -1 if mirrored else 1  # rows, before the turn
        cos, sin = math.cos(angle), math.sin(angle)
        return cos, -sin, flip * sin, flip * cos
    if SideDataType.DISPLAYMATRIX not in side_data:
        return 1, 0, 0, 1
    # Three rows of three: (a, b, u), (c, d, v), (x, y, w).
    matrix = np.frombuffer(bytes(side_data[SideDataType.DISPLAYMATRIX]), dtype=np.int32)
    return matrix[0], matrix[1], matrix[3], matrix[4]


def _read(
    file: VideoFile,
    index: FrameIndex,
    limits: tuple[int, float],
    size: tuple[int, int] | None,
    on_progress: Progress | None,
) -> VideoClip:
    times = sample_times(index.duration, *limits)
    # Several samples can fall on one frame.
    keys, ends = np.unique(index.shown_at(times), return_index=True)
    ends = np.append(ends[1:], len(times))
    done = 0
    for frame, end in zip(file.frames_of(index, keys), ends, strict=True):
        image = oriented(frame)
        if done == 0:
            source_size = image.shape[0], image.shape[1]
            frames = np.empty((len(times), *(size or source_size), 3), dtype=np.uint8)
        frames[done:end] = resize_frames(image, (frames.shape[1], frames.shape[2]))
        done = int(end)
        if on_progress:
            on_progress(done, len(times))
    if len(index.keys) == 1 and file.path.suffix.lower() in _PICTURE_SUFFIXES:
        return _image(file, image)
    rate = float(file.rate) if file.rate else len(index.keys) / (index.duration or 1.0)
    return VideoClip(frames, times, rate, index.duration, str(file.path), source_size)


def _image(file: VideoFile, image: NDArray[np.uint8]) -> VideoClip:
    size = image.shape[0], image.shape[1]
    return VideoClip(image[None], np.zeros(1), 0.0, 0.0, str(file.path), size, is_image=True)
