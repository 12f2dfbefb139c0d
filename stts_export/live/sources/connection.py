"""One connection to a source: opened, decoded, and judged when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from threading import Event
from typing import Any

import av
import av.error
from av.codec.context import Flags
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stts_export.live.sources import failures
from stts_export.live.sources.failures import LostError, UnusableError
from stts_export.live.sources.frames import Damage, Extent, Shown
from stts_export.live.sources.hardware import unusable

Opener = Callable[..., InputContainer]
"""`av.open`, or what a test puts in its place."""

_UNTIMED = frozenset({"mpjpeg", "mjpeg", "h264", "hevc", "m4v", "mpegvideo", "obu"})
"""Formats without times; FFmpeg counts frames at a rate that it assumes."""
_PLAYLISTS = ("hls", "dash")
_IDLE = 0.005
"""Seconds between two looks at a device that has nothing yet."""
_NEAR_END, _NEAR_SHARE = 1.5, 0.05
"""A recording may end this many seconds, or this share of it, before its stated end."""


@dataclass(frozen=True)
class Address:
    """What FFmpeg opens."""

    url: str = field(repr=False)
    name: str
    """For messages, without credentials."""
    format: str | None = None
    """FFmpeg's name of the format; found out when None."""
    options: Mapping[str, str] = field(default_factory=dict)
    may_be_garbled: bool = False
    """What cannot be understood may be the rest of a broken handshake, or what came through of a
    stream, and is no reason to give up."""
    is_device: bool = False


@dataclass(frozen=True)
class Patience:
    """How long a connection waits, in seconds."""

    connect: float
    """For each of the two steps of opening."""
    read: float
    """Between frames."""


class Connection:
    """An open source; closes it as a context manager.

    Args:
        address: what to open.
        patience: how long to wait.
        acceleration: a GPU's decoder.
        opener: `av.open`.

    Raises:
        MissingDependencyError: the GPU's decoder is insisted on and does not take what comes.
        LostError: it does not answer, or the connection failed.
        UnusableError: it answers with something that is no video.
        InputError: trying again cannot help: wrong credentials, or a codec that nothing decodes.
    """

    def __init__(
        self,
        address: Address,
        patience: Patience,
        acceleration: HWAccel | None = None,
        opener: Opener = av.open,
    ) -> None:
        self._address = address
        self._patience = patience
        self._began, self._is_open = time.monotonic(), False
        try:
            self._container = opener(
                address.url,
                format=address.format,
                options=dict(address.options),
                timeout=(patience.connect, patience.read),
                hwaccel=acceleration,
                metadata_errors="ignore",
            )
        except (av.FFmpegError, OSError) as error:
            raise self._failure(error, patience.connect) from None
        except RuntimeError:
            if acceleration is None:
                raise
            raise unusable(address.name, "it does not decode what comes") from None
        try:
            self.stream = _choose_stream(self._container, address.name)
        except BaseException:
            self._container.close()
            raise
        self._time_base = self.stream.time_base or Fraction(1, av.time_base)
        self.stream.thread_type = "SLICE"  # threads by frame hold a frame back each
        if not self.stream.codec_context.has_b_frames:
            self.stream.codec_context.flags |= Flags.low_delay
        self._is_open = True

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    @property
    def duration(self) -> float | None:
        """Seconds that the source states for all of it; None for one that goes on."""
        stated = self._container.duration
        return stated / av.time_base if stated is not None and stated > 0 else None

    @property
    def is_sized(self) -> bool:
        """Whether the source states how many bytes it sends, so that their end is its end."""
        is_list = self._container.format.name in _PLAYLISTS  # has the size of the list itself
        return not is_list and self._container.size > 0

    def describe(self) -> str:
        """What is sent: size, codec, frames per second."""
        codec = self.stream.codec_context
        rate = self.stream.average_rate or self.stream.guessed_rate
        at = f" at {float(rate):.3g} frames a second" if rate else ""
        return f"{codec.width}x{codec.height} {codec.name}{at}"

    def resume_after(self, seconds: float) -> None:
        """Go on near a time, where the source allows it; otherwise at its start."""
        try:
            self._container.seek(round(seconds * av.time_base))
        except (av.FFmpegError, OSError):
            return

    def reaches_end(self, extent: Extent) -> bool:
        """Whether a source that stopped was at its end.

        Args:
            extent: of what came.
        """
        whole, start = self.duration, self._container.start_time
        if whole is None:
            return self.is_sized
        if not extent.frames:
            return False
        first = extent.first if start is None else start / av.time_base
        return whole - (extent.end - first) <= max(_NEAR_END, _NEAR_SHARE * whole)

    def frames(self, stop: Event, damage: Damage) -> Iterator[tuple[VideoFrame, Shown]]:
        """Decode frames until the source stops or `stop` is set.

        Raises:
            LostError: reading failed, or no frame came in time.
            UnusableError: the server has nothing there any more.
            InputError: the server asks for other credentials.
        """
        last = time.monotonic()
        try:
            for packet in self._packets(stop):
                if stop.is_set():
                    return
                if packet is not None and packet.stream.index == self.stream.index:
                    for frame in self._decode(packet, damage):
                        yield frame, self._shown(frame)
                        last = time.monotonic()
                if time.monotonic() - last > self._patience.read:
                    raise LostError("no frame came", self._patience.read)
        except (av.FFmpegError, OSError) as error:
            raise self._failure(error, self._patience.read) from None

    def _shown(self, frame: VideoFrame) -> Shown:
        if self._container.format.name in _UNTIMED:
            return Shown(None, None)
        return Shown.of(frame, self._time_base)

    def _failure(self, error: Exception, seconds: float) -> Exception:
        address = self._address
        if address.is_device:
            return failures.of_device(error, address.name)
        is_nonsense = isinstance(error, av.error.InvalidDataError)
        if is_nonsense and self._is_open:
            return LostError("what comes cannot be understood any more")
        if is_nonsense and address.may_be_garbled:
            waited = time.monotonic() - self._began >= seconds  # RTSP takes silence for nonsense
            if waited:
                return LostError("nothing came", seconds)
            return LostError("what comes cannot be understood")
        return failures.of_network(error, address.name, seconds)

    def _packets(self, stop: Event) -> Iterator[Packet[Any] | None]:
        """Yield packets of all streams; None when a device has nothing yet.

        Those of sound come too: a stream whose video stopped must not go unnoticed.
        """
        while True:
            try:
                yield from self._container.demux()
            except BlockingIOError:
                yield None
                stop.wait(_IDLE)
            else:
                return

    def _decode(self, packet: Packet[Any], damage: Damage) -> list[VideoFrame]:
        """Decode a packet, an empty one to get what is left; nothing when it is damaged."""
        if packet.is_corrupt:
            damage.found()
            return []
        try:
            return self.stream.codec_context.decode(packet)
        except av.FFmpegError:
            damage.found()
            return []


def _choose_stream(container: InputContainer, where: str) -> VideoStream:
    """First video stream that is no cover picture and can be decoded."""
    form = container.format.name
    if form == "tty":  # FFmpeg would draw a text file as video
        raise UnusableError(failures.not_a_video(where))
    if form == "image2" or form.endswith("_pipe"):
        raise UnusableError(failures.still_image(where))
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic
    ]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams}))
        raise UnusableError(failures.no_video_stream(where, kinds))
    decoded = [stream for stream in streams if stream.codec_context is not None]
    if not decoded:
        raise failures.unsupported_codec(where)
    return decoded[0]
