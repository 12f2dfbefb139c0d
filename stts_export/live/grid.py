"""From the frames of a source to samples on a fixed grid.

Stream time counts from the first frame. A sample shows what is on screen at its moment, as in the
model's own sampling of files (`runtime.sampling`), and carries that moment, not the time at which
the frame appeared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

MAX_JUMP = 10.0
"""Seconds between two frames of a live source, beyond what the wall clock says, from which on its
times are taken to have jumped."""
MAX_STILL = 3600.0
"""The same for recordings, in which a frame may stay for long: it is sampled all the while."""
MAX_STEP_BACK = 1.0
"""Seconds by which a time may be too early without the clock being taken to have been set back."""
LONGEST_STILL = 2.0
"""Seconds that a live frame counts as being on screen: in a longer gap nothing is sampled."""
_FIRST_GUESS = 1 / 25
"""Seconds between frames where nothing is known yet, FFmpeg's own assumption."""
_LEAST_STEP = 1e-3
_SLACK = 1e-4
"""Seconds by which rounded times may miss a grid point."""

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class Moment(Generic[Frame]):
    """A sample."""

    time: float
    """Seconds after the stream's first frame."""
    index: int | None
    """Of the grid point; None for the end of the stream."""
    frame: Frame


class StreamClock:
    """Makes stream times of a source's own: from 0 and ascending, whatever the source says.

    A time that is missing is the end of the frame before, where that is known. Else it is replaced,
    as are times that step back or jump and the first one of a new connection: by the wall clock for
    a live source, by the usual step between frames for a file.

    Args:
        is_live: times of the source advance with the wall clock.
        on_repair: called with what was wrong.
        max_jump: seconds between two frames, beyond what is expected, that count as a jump.
    """

    def __init__(
        self, is_live: bool, on_repair: Callable[[str], None], max_jump: float = MAX_JUMP
    ) -> None:
        self._is_live = is_live
        self._on_repair = on_repair
        self._max_jump = max_jump
        self._offset: float | None = None
        """Stream time minus source time."""
        self.last: float | None = None
        """Stream time of the newest frame."""
        self._last_wall = 0.0
        self._step = _FIRST_GUESS
        self._duration: float | None = None
        """Of the newest frame, in seconds."""

    def time(
        self, pts: float | None, wall: float, is_first: bool, duration: float | None = None
    ) -> float:
        """Return the stream time of a frame.

        Args:
            pts: seconds on the source's clock, None when there is no time.
            wall: when it arrived, by a monotonic clock.
            is_first: first one of a connection.
            duration: seconds for which it is on screen, where that is known.
        """
        if pts is not None and not math.isfinite(pts):
            pts = None
        if self.last is None:
            time = 0.0
            self._anchor(pts, time)
        else:
            went_by = wall - self._last_wall
            step = went_by if self._is_live else self._duration or self._step
            guess = self.last + max(step, _LEAST_STEP)
            if is_first:
                time = guess
                self._anchor(pts, time)
            else:
                time = self._next(pts, self.last, guess)
        self.last, self._last_wall, self._duration = time, wall, duration
        return time

    def _next(self, pts: float | None, last: float, guess: float) -> float:
        if pts is None or self._offset is None:
            time = guess if self._duration is None else last + self._duration
            if pts is None:
                self._on_repair("a frame has no time")
            else:  # none had a time before
                self._anchor(pts, time)
            return time
        time = pts + self._offset
        if -MAX_STEP_BACK < time - last <= 0:
            self._on_repair(f"the time of a frame is {last - time:.3f} s too early")
            return last + _LEAST_STEP
        if time <= last or time > guess + self._max_jump:
            self._on_repair(f"the time of a frame jumps by {time - last:.3f} s")
            self._anchor(pts, guess)
            return guess
        if time - last < 1:
            self._step = time - last
        return time

    def _anchor(self, pts: float | None, time: float) -> None:
        self._offset = None if pts is None else time - pts


class Grid(Generic[Frame]):
    """Takes frames in order and gives those on screen at multiples of a step.

    Args:
        step: seconds.
        longest_still: seconds that a frame counts as being on screen when the next one is late.
        waits: for the next frame, whatever a frame says about its duration: some files err.
    """

    def __init__(
        self, step: float, longest_still: float = LONGEST_STILL, *, waits: bool = False
    ) -> None:
        self._step = step
        self._longest_still = longest_still
        self._waits = waits
        self._next = 0
        """The next grid point."""
        self._shown: tuple[float, float, Frame] | None = None
        """The frame on screen, since when, and until when as far as is known."""

    def add(self, time: float, duration: float | None, frame: Frame) -> list[Moment[Frame]]:
        """Add a frame; while it is known to stay, its samples do not wait for the next one.

        Args:
            time: when it appears, later than the frame before.
            duration: for how long, None when unknown.
            frame: what to hand on.
        """
        moments: list[Moment[Frame]] = []
        if self._shown is not None:
            since, _, shown = self._shown
            moments += self._before(min(time, since + self._longest_still), shown)
        # Nothing was on screen at what is left before it; its own moment is its own.
        self._next = max(self._next, math.ceil((time - _SLACK) / self._step))
        until = time + min(duration or 0.0, self._longest_still)
        self._shown = time, until, frame
        known = time if self._waits else until
        return moments + self._before(max(known, time + 2 * _SLACK), frame)

    def finish(self) -> list[Moment[Frame]]:
        """End the stream, and sample its end too, as the model's own sampling of files does."""
        if self._shown is None:
            return []
        _, until, frame = self._shown
        moments = self._before(until, frame)
        if until > (self._next - 1) * self._step + _SLACK:
            moments.append(Moment(until, None, frame))
        self._shown = None
        return moments

    def _before(self, time: float, frame: Frame) -> list[Moment[Frame]]:
        moments = []
        while self._next * self._step < time - _SLACK:
            moments.append(Moment(self._next * self._step, self._next, frame))
            self._next += 1
        return moments
