"""What all sources that decode with FFmpeg do with a frame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from av.video.frame import VideoFrame

from stts_export.live.sources.base import Arrival, Reporter
from stts_export.runtime.video import oriented


@dataclass(frozen=True)
class Shown:
    """When a frame is on screen, on the source's own clock."""

    start: float | None
    """Seconds; None when the frame has no time."""
    duration: float | None
    """Seconds; None when the source does not say."""

    @staticmethod
    def of(frame: VideoFrame, time_base: Fraction) -> Shown:
        """Take times from a frame; its own time base is missing where a decoder is emptied.

        Args:
            frame: as decoded.
            time_base: seconds of a tick in its stream.
        """
        return Shown(
            None if frame.pts is None else float(frame.pts * time_base),
            float(frame.duration * time_base) if frame.duration else None,
        )

    @property
    def end(self) -> float | None:
        """Seconds; its start where the source does not say how long it is."""
        return None if self.start is None else self.start + (self.duration or 0.0)


class Extent:
    """How much of a source was decoded."""

    def __init__(self) -> None:
        self.frames = 0
        self.first, self.end = math.inf, -math.inf
        """Start of the earliest frame and end of the latest, in seconds."""

    def add(self, shown: Shown) -> None:
        """Count a frame; times may jump back where recordings were put together."""
        self.frames += 1
        if shown.start is not None and shown.end is not None:
            self.first = min(self.first, shown.start)
            self.end = max(self.end, shown.end)


def arrival(frame: VideoFrame, shown: Shown, *, is_first: bool) -> Arrival:
    """Describe a decoded frame; its pixels are converted when they are asked for."""
    return Arrival(shown.start, shown.duration, is_first, lambda: oriented(frame))


class Damage:
    """Counts packets that cannot be decoded, and gives a notice of the first."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._found = False

    def found(self) -> None:
        """Count one more."""
        self._report.count(damaged=1)
        if not self._found:
            self._found = True
            self._report.notice(
                "damaged", "a packet cannot be decoded and is left out; later ones are only counted"
            )


class FrameSize:
    """Gives a notice when frames have another size than those before."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._size: tuple[int, int] | None = None

    def seen(self, frame: VideoFrame) -> None:
        """Compare a frame with the one before."""
        size = frame.width, frame.height
        if self._size is not None and self._size != size:
            now, before = (f"{width}x{height}" for width, height in (size, self._size))
            self._report.notice("resolution", f"frames are {now} now, after {before}")
        self._size = size
