"""The small interface behind which all sources are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stts_export.live.events import NoticeKind


@dataclass(frozen=True)
class Arrival:
    """A frame that a source gave."""

    pts: float | None
    """Seconds on the source's own clock; None when the frame has no time."""
    duration: float | None
    """Seconds for which it is on screen; None when the source does not say."""
    is_first: bool
    """First one of a connection: its time has nothing to do with those before."""
    rgb: Callable[[], NDArray[np.uint8]]
    """Makes the pixels, (height, width, 3), upright; only called for frames that are sampled, at
    once or when the next frame has come."""


class Reporter(Protocol):
    """Where a source reports what happens to it."""

    def notice(self, kind: NoticeKind, message: str) -> None:
        """Say what happened; without credentials."""

    def count(self, **counts: int) -> None:
        """Add to fields of `Counters`: `damaged`, `reconnects`."""


class Source(Protocol):
    """A video, read once from one thread."""

    name: str
    """For messages and events: where it comes from, without credentials."""
    is_live: bool
    """It goes on whether its frames are taken or not, as a camera does."""

    def arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        """Yield frames until the source ends; reconnect where that makes sense.

        Args:
            stop: when set, the iterator ends soon: all waiting is done on it.
            report: gets notices and counts.

        Raises:
            SttsError: the source cannot be opened, or is lost and did not come back in time.
        """
