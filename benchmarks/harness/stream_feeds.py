"""Frames for streams, on time: a camera that streams read, and a feed that pushes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from threading import Event

import numpy as np
from numpy.typing import NDArray

from stts_export.live.events import LiveAnswer, LiveEnd, LiveEvent
from stts_export.live.sources.base import Arrival, Reporter
from stts_export.live.stream import LiveStream

_PATIENCE = 120.0
"""Seconds without the answer that is waited for after which a run is given up."""
_POLL = 0.001
_SAME_TIME = 1e-6


class Camera:
    """A live source in this process: a clip over and over, on time whether it is taken or not.

    Args:
        name: of the source.
        clip: (T, height, width, 3) at the model's size.
        rate: frames a second.
        offset: of its first frame, in seconds, so that cameras are not in step.
    """

    is_live = True

    def __init__(
        self, name: str, clip: NDArray[np.uint8], rate: float, offset: float = 0.0
    ) -> None:
        self.name = name
        self._clip = clip
        self._rate = rate
        self._offset = offset

    def arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        """Yield frames until told to stop; one that is late is not left out."""
        started = time.monotonic() + self._offset
        number = 0
        while not stop.wait(max(0.0, started + number / self._rate - time.monotonic())):
            frame = self._clip[number % len(self._clip)]
            pixels = partial(np.asarray, frame)
            yield Arrival(number / self._rate, 1 / self._rate, number == 0, pixels)
            number += 1


class Feed:
    """Pushes a clip over and over into a stream, and reads its answers.

    Args:
        live: an entered stream without a source.
        clip: (T, height, width, 3) at the model's size.
    """

    def __init__(self, live: LiveStream, clip: NDArray[np.uint8]) -> None:
        self.live = live
        self.pushed = 0
        self._clip = clip
        self._step = 1 / live.plan.fps

    @property
    def newest(self) -> float:
        """Stream time of the newest frame."""
        return (self.pushed - 1) * self._step

    def push(self) -> None:
        """Push the next frame."""
        self.live.push(self._clip[self.pushed % len(self._clip)], self.pushed * self._step)
        self.pushed += 1

    def fill(self) -> None:
        """Push until the window is full and a question has fallen due, as fast as frames are taken.

        What is measured afterwards has a whole window; what is asked meanwhile is answered.
        """
        every = self.live.plan.every or 1
        while self.pushed <= self.live.plan.window or (self.pushed - 1) % every:
            self.push()
            given_up = time.monotonic() + _PATIENCE
            while self.live.counters.encoded < self.pushed:
                if self.live.is_over or time.monotonic() > given_up:
                    raise RuntimeError(f"{self.live.name} takes no frames: {self.events()}")
                time.sleep(_POLL)
        self.answer()

    def ask_in_real_time(self) -> LiveAnswer:
        """Push frames at the stream's rate until a question falls due; return its answer."""
        started = time.monotonic()
        for number in range(self.live.plan.every or 1):
            time.sleep(max(0.0, started + (number + 1) * self._step - time.monotonic()))
            self.push()
        return self.answer()

    def answer(self) -> LiveAnswer:
        """Wait for the answer about the newest frame; earlier ones are passed over."""
        while (event := self.live.get(_PATIENCE)) is not None:
            if isinstance(event, LiveAnswer) and abs(event.end - self.newest) < _SAME_TIME:
                return event
            _check(event)
        raise RuntimeError(f"{self.live.name}: no answer about {self.newest:g} s")

    def events(self) -> list[LiveEvent]:
        """Events that are there."""
        return waiting_events(self.live)


def waiting_events(live: LiveStream) -> list[LiveEvent]:
    """Fetch the events that are there, without waiting.

    Raises:
        RuntimeError: the stream has failed.
    """
    events = []
    while (event := live.get(0.0)) is not None:
        _check(event)
        events.append(event)
    return events


def _check(event: LiveEvent) -> None:
    if isinstance(event, LiveEnd) and event.error is not None:
        raise RuntimeError(f"{event.stream} has failed") from event.error
