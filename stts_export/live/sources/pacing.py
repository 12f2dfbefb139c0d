"""Recorded frames at the pace at which they were recorded."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from threading import Event

from stts_export.live.sources.base import Arrival

_LONGEST_WAIT = 60.0
"""Seconds; a jump of the times beyond it is not waited for."""


def paced(arrivals: Iterator[Arrival], stop: Event) -> Iterator[Arrival]:
    """Hold every frame back until its time has come on the wall clock.

    A frame without a time comes at once. Where times jump back, or far ahead, the pace starts anew
    from there.

    Args:
        arrivals: frames in the order of display.
        stop: ends the wait, and with it the iterator.
    """
    pace = _Pace()
    for arrival in arrivals:
        wait = 0.0 if arrival.pts is None else pace.wait(arrival.pts)
        if stop.wait(wait) if wait > 0 else stop.is_set():
            return
        yield arrival


class _Pace:
    def __init__(self) -> None:
        self._offset = -math.inf  # of the wall clock from the source's
        self._last = math.inf

    def wait(self, pts: float) -> float:
        """Seconds until a time has come."""
        now = time.monotonic()
        wait = pts + self._offset - now
        if pts < self._last or wait > _LONGEST_WAIT:
            self._offset, wait = now - pts, 0.0
        self._last = pts
        return wait
