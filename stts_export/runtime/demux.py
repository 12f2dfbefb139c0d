"""Video files as packets: opening, the times of all frames, decoding no more than is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.completeness import (
    Statement,
    check_complete,
    check_picture,
    is_mp4,
    matroska_ends_early,
)
from stts_export.runtime.frame_index import FrameIndex, PacketInfo

_UNSTATED_RATE = Fraction(25)
"""Frames per second of a stream that does not say, as FFmpeg assumes."""


class UnreliableTimesError(Exception):
    """The times of a stream's packets are not those of its frames."""


class VideoFile:
    """A file with one chosen video stream; every pass over it opens it anew.

    Args:
        path: an image or video file on this machine.

    Raises:
        InputError: there is no such file, it cannot be read as a video, it has no video stream,
            the stream's codec is not supported, or it is a picture that is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_is_file(path)
        with self._open() as container:
            stream = _choose_stream(container, path)
            self.format: str = container.format.name
            self.codec: str = stream.codec_context.name
            self.rate = stream.average_rate or stream.guessed_rate
            """Frames per second, where the file states a rate."""
            self._number = stream.index
            self.time_base = stream.time_base or Fraction(1, av.time_base)
            """Seconds of a tick."""
            self._frame_ticks = 1 / ((self.rate or _UNSTATED_RATE) * self.time_base)
            self._stated = Statement(
                stream.frames,
                float((stream.duration or 0) * self.time_base),
                (container.duration or 0) / av.time_base,
            )

        if self.is_image or self.format == "gif":
            check_picture(path)

    @property
    def is_image(self) -> bool:
        """Whether the container holds a still image."""
        return self.format == "image2" or self.format.endswith("_pipe")

    def index_packets(self) -> FrameIndex | None:
        """Index the frames by their packets, without decoding.

        Returns:
            The index; None when packets do not carry the times of their frames.

        Raises:
            InputError: there is no frame, or the file ends well before its stated duration.
        """
        packets: list[PacketInfo] = []
        last_of_any = 0.0
        with self._open() as container:
            for packet in _packets(container.demux()):
                info = PacketInfo.of(packet)
                if info.pts is not None:
                    end = (info.pts + info.length) * packet.time_base
                    last_of_any = max(last_of_any, float(end))
                if packet.stream_index == self._number:
                    packets.append(info)
        while packets and packets[-1].is_corrupt:
            packets.pop()
        if not any(packet.is_shown for packet in packets):
            raise _no_frames(self.path)
        index = FrameIndex.from_packets(packets, self.time_base, round(self._frame_ticks))
        if index is not None:
            self._check_complete(index, len(packets), last_of_any)
        return index

    def index_frames(self) -> FrameIndex:
        """Index the frames by decoding all of them, for streams without usable times.

        Raises:
            InputError: no frame can be decoded, or decoding ends well before the stated duration.
        """
        pts = [frame.pts for frame in self.decode()]
        if not pts:
            raise _no_frames(self.path)
        known = [value for value in pts if value is not None]
        tail = round(self._frame_ticks)
        if len(known) < len(pts):
            counted = [round(place * self._frame_ticks) for place in range(len(pts))]
            return FrameIndex.from_frames(counted, self.time_base, tail)
        index = FrameIndex.from_frames(known, self.time_base, tail)
        self._check_complete(index, len(pts), index.end)
        return index

    def _check_complete(self, index: FrameIndex, frames: int, file_seconds: float) -> None:
        check_complete(
            self.path,
            self._stated,
            frames=frames,
            seconds=index.duration,
            file_seconds=file_seconds,
        )

    def picture(self) -> VideoFrame:
        """Decode a still image.

        Raises:
            InputError: it cannot be decoded, or only in part.
        """
        with self._open() as container:
            stream = _video_stream(container, self._number)
            if self.codec == "mjpeg":
                # Without it what cannot be decoded is grey. Others have an error for it, and that
                # of TIFF takes some sound files for damaged with this option.
                stream.codec_context.options = {"err_detect": "explode"}
            for packet in _packets(container.demux(stream)):
                for frame in _decode(stream, packet):
                    return frame
            for frame in _decode(stream, None):
                return frame
        raise _no_picture(self.path)

    def decode(self, on_damaged: Callable[[], None] | None = None) -> Iterator[VideoFrame]:
        """Decode all frames in the order of display, without those that cannot be decoded.

        Args:
            on_damaged: called for every packet that cannot be decoded.
        """
        with self._open() as container:
            stream = _video_stream(container, self._number)
            for packet in _packets(container.demux(stream)):
                yield from _decode(stream, packet, on_damaged)
            yield from _decode(stream, None)

    def check_decoded(self, frames: int, first: float, end: float) -> None:
        """Compare what was decoded with what the file states.

        Args:
            frames: the number of frames.
            first: start of the first one in seconds.
            end: end of the last one.

        Raises:
            InputError: no frame was decoded, or the file ends well before its stated duration.
        """
        if frames == 0:
            raise _no_frames(self.path)
        if end <= first:  # no frame has a time
            return
        # Other files state how long their longest stream is, which may be that of the sound.
        if self._stated.seconds or matroska_ends_early(self.path):
            check_complete(
                self.path, self._stated, frames=frames, seconds=end - first, file_seconds=end
            )

    def frames_of(self, index: FrameIndex, keys: NDArray[np.int64]) -> Iterator[VideoFrame]:
        """Decode certain frames; groups of pictures without any are read over, not decoded.

        Args:
            index: the file's index.
            keys: (K,) keys from the index, ascending, without repetitions.

        Yields:
            One frame per key.

        Raises:
            UnreliableTimesError: decoded frames do not have the times that the packets promised.
        """
        by_packets = index.packet_pts is not None
        decoded = self._decode_near(index, keys) if by_packets else self.decode()
        wanted, last = keys.tolist(), None
        for place, frame in enumerate(decoded):
            key = frame.pts if by_packets else place
            if key is None or (last is not None and key < last) or key > wanted[0]:
                raise UnreliableTimesError(f"frame {key} comes after {last} and before {wanted[0]}")
            last = key
            if key == wanted[0]:
                yield frame
                wanted.pop(0)
                if not wanted:
                    return
        raise UnreliableTimesError(f"frame {wanted[0]} is missing")

    def _decode_near(self, index: FrameIndex, keys: NDArray[np.int64]) -> Iterator[VideoFrame]:
        needed = index.packets_for(keys)
        with self._open() as container:
            stream = _video_stream(container, self._number)
            before = False
            for packet, wanted in zip(_packets(container.demux(stream)), needed, strict=False):
                if wanted:
                    yield from _decode(stream, packet)
                elif before:
                    yield from _decode(stream, None)
                    stream.codec_context.flush_buffers()
                before = bool(wanted)
            yield from _decode(stream, None)

    def _open(self) -> InputContainer:
        # Playlists must not reach out for other places; "%" in a name is no pattern.
        options = {"protocol_whitelist": "file"}
        if "%" in self.path.name:
            options["pattern_type"] = "none"
        try:
            # An absolute path cannot be taken for a URL.
            return av.open(os.path.abspath(self.path), options=options, metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            raise _open_error(self.path, error) from None


def _packets(packets: Iterator[Packet[Any]]) -> Iterator[Packet[Any]]:
    """Yield the packets that hold data; a file that is cut off may end with an error."""
    try:
        yield from (packet for packet in packets if packet.size)
    except av.FFmpegError:
        return


def _decode(
    stream: VideoStream,
    packet: Packet[Any] | None,
    on_damaged: Callable[[], None] | None = None,
) -> list[VideoFrame]:
    """Decode a packet, None to get what is left; nothing when the packet is damaged."""
    try:
        return stream.codec_context.decode(packet)
    except av.FFmpegError:
        if on_damaged is not None:
            on_damaged()
        return []


def _video_stream(container: InputContainer, number: int) -> VideoStream:
    stream = container.streams[number]
    assert isinstance(stream, VideoStream)
    stream.thread_type = "AUTO"
    return stream


def _choose_stream(container: InputContainer, path: Path) -> VideoStream:
    """First video stream that is neither the cover of a piece of music nor a tile of a picture."""
    if container.format.name == "tty":  # FFmpeg would draw a text file as video
        raise _not_a_video(path)
    parts = Disposition.attached_pic | Disposition.dependent
    streams = [stream for stream in container.streams.video if not stream.disposition & parts]
    if not streams:
        kinds = {stream.type for stream in container.streams}
        names = ["parts of pictures" if kind == "video" else kind for kind in sorted(kinds)]
        raise InputError(
            f"has no video stream, only {', '.join(names) or 'nothing'}",
            where=str(path),
            allowed="an image or video file",
        )
    if streams[0].codec_context is None:
        raise InputError(
            "the video's codec is not supported",
            where=str(path),
            allowed="what FFmpeg decodes, such as H.264, HEVC, VP9 or AV1",
            fix=f"convert it: ffmpeg -i {path.name} -c:v libx264 OUT.mp4",
        )
    return streams[0]


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise InputError("is a folder", where=str(path), allowed="an image or video file")
    if not path.is_file():
        raise InputError("there is no such file", where=str(path))
    if path.stat().st_size == 0:
        raise InputError("the file is empty", where=str(path), fix="copy or download it again")


def _open_error(path: Path, error: OSError | av.FFmpegError) -> InputError:
    if isinstance(error, av.EOFError):
        return _no_frames(path)
    if not isinstance(error, av.InvalidDataError):
        return InputError(f"cannot be opened: {error.strerror}", where=str(path))
    if is_mp4(path):
        return InputError(
            "the file is cut off or was never finished: its index (moov) is missing, so none of "
            "it can be read",
            where=str(path),
            fix="copy or download it again",
        )
    return _not_a_video(path)


def _not_a_video(path: Path) -> InputError:
    return InputError(
        "is not a video or an image", where=str(path), allowed="a file that FFmpeg can read"
    )


def _no_picture(path: Path) -> InputError:
    return InputError(
        "the picture is damaged or cut off, or in a format that cannot be decoded",
        where=str(path),
        fix="copy or download it again, or save it as PNG",
    )


def _no_frames(path: Path) -> InputError:
    return InputError(
        "no frame can be decoded",
        where=str(path),
        fix=f"copy or download it again, or convert it: ffmpeg -i {path.name} -c:v libx264 OUT.mp4",
    )
