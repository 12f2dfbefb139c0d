"""Video and picture files that appear only when they are complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream
from numpy.typing import NDArray

from stts_export.errors import InputError, MissingDependencyError

_TICKS = 90_000
"""Clock ticks per second."""
_ENCODER: Final = "libx264"
_WRITABLE = "name a file in an existing folder that you may write to, with space on the disk"
_PADDING = 24
"""Gray level of the pixel that makes a side even."""


class VideoWriter:
    """An H.264 stream that grows frame by frame; all frames take the first one's size.

    Args:
        container: an open file; its closing is the caller's.
    """

    def __init__(self, container: OutputContainer) -> None:
        self.container = container
        self.stream: VideoStream | None = None
        self.ticks = -1

    def write(self, page: NDArray[np.uint8], seconds: float) -> None:
        """Add a frame, (height, width, 3) RGB, that appears at a time and stays until the next."""
        stream = self.stream = self.stream or self._start(page)
        if page.shape[:2] != (stream.height, stream.width):
            padded = np.full((stream.height, stream.width, 3), _PADDING, dtype=np.uint8)
            height, width = min(page.shape[0], stream.height), min(page.shape[1], stream.width)
            padded[:height, :width] = page[:height, :width]
            page = padded
        frame = av.VideoFrame.from_ndarray(page, format="rgb24")
        self.ticks = max(self.ticks + 1, round(seconds * _TICKS))
        frame.pts, frame.time_base = self.ticks, Fraction(1, _TICKS)
        self.container.mux(stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self.stream is not None:
            self.container.mux(self.stream.encode())

    def _start(self, page: NDArray[np.uint8]) -> VideoStream:
        try:
            stream = self.container.add_stream(_ENCODER, rate=30)
        except UnknownCodecError:
            raise MissingDependencyError(
                f"this environment's FFmpeg lacks the H.264 encoder {_ENCODER}",
                where="overlay",
                fix="pip install --force-reinstall --only-binary av av",
            ) from None
        # 4:2:0 needs even sides.
        stream.height, stream.width = (side + side % 2 for side in page.shape[:2])
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, _TICKS)
        stream.options = {"crf": "18", "preset": "veryfast"}
        return stream


def png_bytes(image: NDArray[np.uint8]) -> bytes:
    """Encode (height, width, 3) RGB."""
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt = "rgb24"
    encoder.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def check_writable(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse, before any work, a name that could not be written in the end.

    Raises:
        InputError: `path` has another suffix, or its folder cannot be written to.
    """
    if path.suffix.lower() not in suffixes:
        raise InputError(
            f"the name ends in {path.suffix!r}",
            where=str(path),
            allowed=f"a name in {' or '.join(suffixes)}",
        )
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InputError("cannot be written", where=str(path), fix=_WRITABLE)


def check_not_source(path: Path, source: str | os.PathLike[str]) -> None:
    """Refuse to write over the file that is read.

    Raises:
        InputError: both names are the same file.
    """
    try:
        same = path.samefile(source)
    except OSError:
        same = False  # one of them does not exist
    if same:
        raise InputError(
            f"is the input {os.fspath(source)} and would be overwritten",
            where=str(path),
            fix="name another file",
        )


@contextmanager
def finished_file(path: Path, suffix: str) -> Iterator[Path]:
    """Yield a name to write to; the file gets its own name when all went well.

    Raises:
        InputError: `path` does not end in `suffix`, or cannot be written.
    """
    check_writable(path, (suffix,))
    partial = path.with_name(f".{path.stem}.partial-{os.getpid()}{suffix}")
    try:
        yield partial
        partial.replace(path)
    except (OSError, av.FFmpegError) as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix=_WRITABLE,
        ) from None
    finally:
        if partial.exists():
            partial.unlink()
