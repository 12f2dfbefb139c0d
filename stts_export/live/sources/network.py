"""Networks and cameras: one loop that connects, gives frames, and connects again."""

from __future__ import annotations

import re
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from threading import Event

import av
from av.codec.hwaccel import HWAccel

from stts_export.errors import InputError
from stts_export.live.sources.base import Arrival, Reporter
from stts_export.live.sources.connection import (
    Address,
    Connection,
    Opener,
    Patience,
)
from stts_export.live.sources.failures import LostError, UnusableError
from stts_export.live.sources.frames import Damage, Extent, FrameSize, Shown, arrival
from stts_export.live.sources.hardware import HardwareDecoder
from stts_export.live.sources.hosts import look_up
from stts_export.live.sources.options import SourceOptions
from stts_export.live.sources.redaction import redacted

SCHEMES = ("rtsp", "rtsps", "http", "https", "udp")

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0
"""Seconds between tries."""
_SHORTEST_TRY = 0.2
"""Seconds; a try with less is not worth it."""
_LAST_PORT = 65535
_DEVICE_FORMAT = "video4linux2,v4l2"
_INDEXED = (".mp4", ".m4v", ".mov")
_RECORDINGS = (*_INDEXED, ".mkv", ".webm", ".avi")
_INDEX_FIX = (
    "; a server without byte ranges can only serve files with their index in front: "
    "ffmpeg -i IN.mp4 -c copy -movflags +faststart OUT.mp4"
)
_PLAYLISTS = (".m3u8", ".mpd")
_PLAYLIST_PATIENCE = 4
"""Times `read_timeout`: their frames come in pieces of 2 to 10 seconds."""
# What may be opened on behalf of an address; playlists and redirections must not reach files here.
_WEB = "http,https,tcp,tls,crypto,httpproxy,data"
_PROTOCOLS = {
    "rtsp": "rtsp,tcp,udp,rtp",
    "rtsps": "rtsps,tcp,tls,udp,rtp,srtp",
    "http": _WEB,
    "https": _WEB,
    "udp": "udp",
}


class ConnectedSource:
    """A source that can be lost and come back.

    Args:
        address: what to open.
        options: timeouts, and the decoder.
        opener: `av.open`.
    """

    is_live = True
    gave_up_fix = (
        "check that the source runs and that this machine reaches it; with a longer reconnect_for "
        "(--give-up-after) it has more time to come back"
    )

    def __init__(self, address: Address, options: SourceOptions, opener: Opener = av.open) -> None:
        self.name = address.name
        self.options = options
        self._address = address
        self._opener = opener

    def arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        """Yield frames; connect again when the source is lost.

        Waiting for the source is bounded by the options' timeouts; all other waiting ends with
        `stop`.

        Args:
            stop: when set, the iterator ends.
            report: gets notices and counts.

        Raises:
            InputError: the source cannot be opened, is nothing that can be watched, or gave no
                frame for `reconnect_for` seconds.
            MissingDependencyError: the GPU is to decode and cannot.
        """
        return _Watch(self, stop, report).arrivals()

    def connect(self, patience: Patience, acceleration: HWAccel | None, stop: Event) -> Connection:
        """Open a connection; raises what `Connection` does."""
        return Connection(self._address, patience, acceleration, self._opener)

    def resumes(self, connection: Connection) -> bool:
        """Whether the source is a recording, that goes on where it broke off."""
        return False

    def learn(self, connection: Connection) -> None:
        """Take from a connection that gives frames what the address did not tell."""


class NetworkSource(ConnectedSource):
    """RTSP, MPEG-TS over UDP, and what HTTP serves: files, HLS, MPEG-TS, MJPEG.

    Whether an HTTP address leads to a recording is guessed by its name until the first frame, so
    `is_live` may change there. The frames of playlists (.m3u8, .mpd) may be away for four times
    `read_timeout`.

    Args:
        url: with user and password where they are needed.
        options: how it is read.
        opener: `av.open`.

    Raises:
        InputError: the address names no host, or a port that is none.
    """

    def __init__(self, url: str, options: SourceOptions, opener: Opener = av.open) -> None:
        scheme, _, rest = url.partition("://")
        scheme, name = scheme.lower(), redacted(url)
        authority = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
        if not authority:
            raise InputError(
                "the address names no host", where=name, allowed=f"{scheme}://HOST/PATH"
            )
        if "@" not in rest.partition(authority)[2]:  # or it is the beginning of a password
            _check_port(authority, name)
        settings = {"protocol_whitelist": _PROTOCOLS[scheme]}
        if scheme in ("rtsp", "rtsps"):
            # No waiting for frames just to tell their rate. Not "nobuffer": it throws away what
            # was read for finding out about the stream, and with it all up to the next keyframe.
            settings |= {"rtsp_transport": options.transport, "fpsprobesize": "0"}
        elif scheme == "udp":
            settings |= {"overrun_nonfatal": "1"}
        self._is_web, self._is_playlist = scheme in ("http", "https"), False
        address = Address(
            f"{scheme}://{rest}", name, options=settings, may_be_garbled=not self._is_web
        )
        super().__init__(address, options, opener)
        if self._is_web:
            path = redacted(url).partition("?")[0].lower()
            self.is_live = not path.endswith(_RECORDINGS)
            self._is_playlist = path.endswith(_PLAYLISTS)
            if path.endswith(_INDEXED):
                self.gave_up_fix += _INDEX_FIX

    def connect(self, patience: Patience, acceleration: HWAccel | None, stop: Event) -> Connection:
        """Open a connection; raises what `Connection` does."""
        look_up(self._address.url, patience.connect, stop)
        if self._is_playlist:
            patience = replace(patience, read=_PLAYLIST_PATIENCE * patience.read)
        return super().connect(patience, acceleration, stop)

    def resumes(self, connection: Connection) -> bool:
        """Whether it is a file or a finished playlist."""
        return self._is_web and (connection.duration is not None or connection.is_sized)

    def learn(self, connection: Connection) -> None:
        """Find out whether it is a recording."""
        self.is_live = not self.resumes(connection)


class DeviceSource(ConnectedSource):
    """A camera of Video4Linux.

    Args:
        path: of the device, as /dev/video0.
        options: how it is read.
        opener: `av.open`.
    """

    def __init__(self, path: str, options: SourceOptions, opener: Opener = av.open) -> None:
        # Without blocking (AVFMT_FLAG_NONBLOCK): nothing could interrupt a read from a device.
        address = Address(path, path, _DEVICE_FORMAT, {"fflags": "+4"}, is_device=True)
        super().__init__(address, options, opener)


class _Watch:
    """One reading of a source, over all its connections."""

    def __init__(self, source: ConnectedSource, stop: Event, report: Reporter) -> None:
        self._source = source
        self._options = source.options
        self._stop = stop
        self._report = report
        self._size, self._damage = FrameSize(report), Damage(report)
        self._hardware = HardwareDecoder(source.options.decoder, report)
        self._connections = 0
        """That gave a frame."""
        self._last = time.monotonic()
        """When the last frame came, or the start."""
        self._pts: float | None = None
        """Time of the last frame that had one, on the source's clock."""
        self._stuck_at: float | None = None
        """`_pts` when a recording stopped before its end."""

    def arrivals(self) -> Iterator[Arrival]:
        self._last = time.monotonic()
        delay = _FIRST_DELAY
        while not self._stop.is_set():
            before = self._last
            reason = yield from self._try()
            if reason is None or self._stop.is_set():
                return
            if self._last > before:
                delay = _FIRST_DELAY
            self._wait(reason, delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _try(self) -> Generator[Arrival, None, LostError | None]:
        """Yield the frames of one connection; return why it was lost, None at the end."""
        try:
            return (yield from self._connection())
        except LostError as error:
            return error
        except UnusableError as error:
            if self._connections == 0 and not self._stop.is_set():
                raise error.error from None
            return LostError(error.error.message)

    def _connection(self) -> Generator[Arrival, None, LostError | None]:
        with self._source.connect(
            self._patience(), self._hardware.acceleration(self._source.name), self._stop
        ) as connection:
            self._hardware.check(connection.stream, self._source.name)
            goes_on = self._pts is not None and self._source.resumes(connection)
            if goes_on:
                connection.resume_after(self._pts or 0.0)
            extent = Extent()
            try:
                yield from self._frames(connection, extent, goes_on)
            except LostError:
                if connection.duration is None or not connection.reaches_end(extent):
                    raise
                return None
            return None if self._stop.is_set() else self._judge(connection, extent)

    def _frames(self, connection: Connection, extent: Extent, goes_on: bool) -> Iterator[Arrival]:
        is_new = True
        for frame, shown in connection.frames(self._stop, self._damage):
            extent.add(shown)
            if goes_on and _is_before(shown, self._pts):
                continue
            if is_new:
                self._welcome(connection)
            self._size.seen(frame)
            self._pts = self._pts if shown.start is None else shown.start
            yield arrival(frame, shown, is_first=is_new and not goes_on)
            self._last = time.monotonic()
            is_new = False

    def _welcome(self, connection: Connection) -> None:
        self._source.learn(connection)
        again = " again" if self._connections else ""
        self._report.notice("connected", f"frames come{again}: {connection.describe()}")
        if self._connections:
            self._report.count(reconnects=1)
        self._connections += 1

    def _judge(self, connection: Connection, extent: Extent) -> LostError | None:
        """Say why a connection that was closed was lost; None when the source is at its end."""
        if connection.reaches_end(extent):
            return None
        if self._source.resumes(connection) and self._pts is not None:
            if self._stuck_at == self._pts:
                self._report.notice("damaged", "the recording is cut off: it stops before its end")
                return None
            self._stuck_at = self._pts
        return LostError("the connection was closed")

    def _left(self) -> float:
        return self._options.reconnect_for - (time.monotonic() - self._last)

    def _patience(self) -> Patience:
        options = self._options
        if options.reconnect_for == 0:
            return Patience(options.connect_timeout, options.read_timeout)
        left = max(self._left(), _SHORTEST_TRY)
        # Opening takes two steps.
        return Patience(min(options.connect_timeout, left / 2), min(options.read_timeout, left))

    def _wait(self, reason: LostError, delay: float) -> None:
        left = self._left()
        if left < _SHORTEST_TRY:
            raise self._gave_up(reason)
        wait = min(delay, left / 2)
        self._report.notice(
            "reconnecting", f"{reason}; trying again in {wait:.1f} s, for another {left:.0f} s"
        )
        self._stop.wait(wait)

    def _gave_up(self, reason: LostError) -> InputError:
        seconds = time.monotonic() - self._last
        what = "is lost" if self._connections else "cannot be reached"
        why = str(reason)
        if self._options.reconnect_for:  # how long the last try waited says little
            why = f"{reason.reason}, tried for {seconds:.{0 if seconds >= 1 else 1}f} s"
        return InputError(f"{what}: {why}", where=self._source.name, fix=self._source.gave_up_fix)


def _check_port(authority: str, name: str) -> None:
    _, mark, port = authority.rpartition("]")[2].rpartition(":")
    if mark and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= _LAST_PORT):
        raise InputError(f"the port is {port!r}", where=name, allowed=f"1 to {_LAST_PORT}")


def _is_before(shown: Shown, pts: float | None) -> bool:
    return shown.start is not None and pts is not None and shown.start <= pts
