"""From a source's frames, or pushed ones, to samples in the inbox."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stts_export.live.answering import Meter
from stts_export.live.grid import LONGEST_STILL, MAX_JUMP, MAX_STILL, Grid, Moment, StreamClock
from stts_export.live.queues import Inbox
from stts_export.live.sample import Sample
from stts_export.live.sources.base import Reporter
from stts_export.runtime.resize import resize_frames


class Incoming:
    """A frame whose pixels are made when it is sampled, once.

    Args:
        rgb: makes them: uint8 (height, width, 3), or (1, height, width, 3) on a GPU.
        arrived: when it came, by the monotonic clock.
        pts: seconds on the source's own clock; None without a time.
    """

    def __init__(self, rgb: Callable[[], Any], arrived: float, pts: float | None) -> None:
        self._rgb = rgb
        self._sized: tuple[Any, tuple[int, int]] | None = None
        self.arrived = arrived
        self.pts = pts if pts is not None and math.isfinite(pts) else None
        self.offset: float | None = None
        """`pts` minus the stream time."""

    def sized(self, size: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
        """Pixels at a size, and the source's (height, width)."""
        if self._sized is None:
            rgb = self._rgb()
            if isinstance(rgb, np.ndarray):
                self._sized = resize_frames(rgb, size), (rgb.shape[0], rgb.shape[1])
            else:
                self._sized = rgb, size
        return self._sized


class Reading:
    """Clock, grid and resize of one stream.

    Args:
        inbox: gets the samples.
        report: gets notices and counts.
        meter: gets the time of resizing.
        size: (height, width) of the model's frames.
        fps: samples per second.
        is_live: the source goes on whether its frames are taken or not.
        is_pushed: a caller brings the frames; its times are what they are.
    """

    def __init__(
        self,
        inbox: Inbox,
        report: Reporter,
        meter: Meter | None,
        *,
        size: tuple[int, int],
        fps: float,
        is_live: bool,
        is_pushed: bool,
    ) -> None:
        self._inbox = inbox
        self._report = report
        self._meter = meter
        self._size = size
        self._longest_still = LONGEST_STILL if is_live else MAX_STILL
        jump = math.inf if is_pushed else MAX_JUMP if is_live else MAX_STILL
        self._clock = StreamClock(is_live, self._repaired, jump)
        self._grid: Grid[Incoming] = Grid(1 / fps, self._longest_still, waits=not is_live)
        self._is_repaired = False

    def add(
        self,
        frame: Incoming,
        duration: float | None,
        *,
        is_first: bool = False,
        timeout: float | None = None,
    ) -> bool:
        """Place a frame on the grid.

        Args:
            frame: what came.
            duration: seconds on screen; None when unknown.
            is_first: first one of a connection.
            timeout: seconds to wait for room; None: as long as it takes.

        Returns:
            False when one of its samples found no room.
        """
        self._report.count(decoded=1)
        before = self._clock.last
        now = self._clock.time(frame.pts, frame.arrived, is_first, duration)
        frame.offset = None if frame.pts is None else frame.pts - now
        if before is not None and now - before > self._longest_still:
            self._report.notice("gap", f"no frame for {now - before:.1f} s")
        until = None if timeout is None else time.monotonic() + timeout
        moments = self._grid.add(now, duration, frame)
        fits = [self._sample(moment, until) for moment in moments]
        return all(fits)

    def finish(self, timeout: float | None = None) -> None:
        """Sample what is left up to the end of the source.

        Args:
            timeout: seconds to wait for room; None: as long as it takes.
        """
        until = None if timeout is None else time.monotonic() + timeout
        for moment in self._grid.finish():
            self._sample(moment, until)

    def _sample(self, moment: Moment[Incoming], until: float | None) -> bool:
        self._report.count(sampled=1)
        due, started = time.monotonic(), time.perf_counter()
        pixels, size = moment.frame.sized(self._size)
        if self._meter is not None:
            self._meter.stage("resize", time.perf_counter() - started)
        sample = Sample(moment.time, moment.index, pixels, due, size, moment.frame.offset)
        timeout = None if until is None else max(0.0, until - time.monotonic())
        return self._inbox.put(sample, timeout)

    def _repaired(self, what: str) -> None:
        self._report.count(repaired_times=1)
        if not self._is_repaired:
            self._is_repaired = True
            told = f"{what}; such times are replaced, and counted from now on"
            self._report.notice("timestamps", told)
