"""What tests of live video share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.live.grid import MAX_STILL, Grid, StreamClock
from stts_export.live.sources.base import Arrival, Reporter, Source


class Silent:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, str]] = []
        self.counts: dict[str, int] = {}

    def notice(self, kind: str, message: str) -> None:
        self.notices.append((kind, message))

    def count(self, **counts: int) -> None:
        for name, number in counts.items():
            self.counts[name] = self.counts.get(name, 0) + number


def sampled(source: Source, fps: float) -> tuple[list[float], NDArray[np.uint8]]:
    """Times and pixels of all samples of a source that ends."""
    clock = StreamClock(False, lambda _: None, MAX_STILL)
    grid: Grid[Any] = Grid(1 / fps, MAX_STILL, waits=True)
    moments = []
    for arrival in source.arrivals(threading.Event(), Silent()):
        now = clock.time(arrival.pts, 0.0, arrival.is_first, arrival.duration)
        moments += grid.add(now, arrival.duration, arrival.rgb())
    moments += grid.finish()
    return [moment.time for moment in moments], np.stack([moment.frame for moment in moments])


class ListSource:
    """Frames from a list, with times; fails in the end if told to.

    Args:
        frames: (height, width, 3) each.
        step: seconds between frames.
        is_live: as for a camera.
        error: raised after the last frame.
        wait: set to let frames through, one each time.
    """

    name = "listed"

    def __init__(
        self,
        frames: Any,
        step: float = 0.5,
        *,
        is_live: bool = False,
        error: Exception | None = None,
        wait: threading.Semaphore | None = None,
    ) -> None:
        self._frames = frames
        self._step = step
        self.is_live = is_live
        self._error = error
        self._wait = wait

    def arrivals(self, stop: threading.Event, report: Reporter) -> Iterator[Arrival]:
        for number, frame in enumerate(self._frames):
            while self._wait is not None and not self._wait.acquire(timeout=0.05):
                if stop.is_set():
                    return
            if stop.is_set():
                return
            rgb = functools.partial(np.asarray, frame)
            yield Arrival(number * self._step, self._step, number == 0, rgb)
        if self._error is not None:
            raise self._error
