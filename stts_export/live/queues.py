"""What the threads of a stream hand each other: samples, work for the answering thread, events.

All are bounded. Under the policy "newest" whoever brings something never waits and the oldest is
given up, which is counted; under "wait" whoever brings something waits for room.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stts_export.live.events import LiveAnswer, LiveEnd, LiveEvent
from stts_export.live.frames import LowerFrame
from stts_export.live.sample import Sample
from stts_export.live.settings import Policy
from stts_export.runtime.prompt import Conversation

_EVENTS = 256
"""Events that wait for whoever reads them."""


@dataclass(frozen=True)
class Ask:
    """A question for now."""

    prompt: Conversation
    arrived: float


@dataclass(frozen=True)
class Question:
    """A question with the frames it is about, but for those that are in the cache already."""

    prompt: Conversation
    arrived: float
    frames: Sequence[LowerFrame]
    size: tuple[int, int]
    """(height, width) of the source's frames."""
    offset: float | None
    """Time on the source's own clock minus that of the stream, of the newest frame."""
    drop_before: float
    """Segments that begin at or before this time leave."""
    is_due: bool
    """By the clock, not by a caller: a newer one replaces it."""


@dataclass(frozen=True)
class Piece:
    """Frames that become a segment of the cache for good."""

    frames: Sequence[LowerFrame]
    drop_before: float
    """Segments that begin at or before this time leave."""


class Inbox:
    """Samples and questions on their way to the thread that runs `vision_lower`, in order.

    Args:
        size: most samples that wait.
        policy: what happens when there are more.
        on_drop: called with how many were dropped.
    """

    def __init__(self, size: int, policy: Policy, on_drop: Callable[[int], None]) -> None:
        self._items: deque[Sample | Ask] = deque()
        self._samples = 0
        self._size = size
        self._policy = policy
        self._on_drop = on_drop
        self._changed = threading.Condition()
        self._is_closed = False
        self.is_finished = False
        """Nothing more will come."""

    def __len__(self) -> int:
        """Return how many samples wait."""
        return self._samples

    def put(self, sample: Sample, timeout: float | None = None) -> bool:
        """Add a sample; under "wait" wait for room.

        Args:
            sample: what to add.
            timeout: seconds to wait at most; None: as long as it takes.

        Returns:
            False when there was no room in time, or nothing is taken any more.
        """
        with self._changed:
            if self._policy == "wait":
                room = self._changed.wait_for(
                    lambda: self._is_closed or self._samples < self._size, timeout
                )
                if not room:
                    self._on_drop(1)
                    return False
            if self._is_closed or self.is_finished:
                return False
            if self._samples == self._size:
                self._items.remove(next(i for i in self._items if isinstance(i, Sample)))
                self._samples -= 1
                self._on_drop(1)
            self._items.append(sample)
            self._samples += 1
            self._changed.notify_all()
            return True

    def ask(self, ask: Ask) -> bool:
        """Add a question about what was added before; False when nothing is taken any more."""
        with self._changed:
            if self._is_closed or self.is_finished:
                return False
            self._items.append(ask)
            self._changed.notify_all()
            return True

    def finish(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self.is_finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will be taken."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._samples = 0
            self._changed.notify_all()

    def take(self, most: int) -> list[Sample] | Ask | None:
        """Wait for the next question, or samples before it; None when all is done.

        Args:
            most: samples at a time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._items or self.is_finished or self._is_closed)
            taken: list[Sample] = []
            while self._items and len(taken) < most:
                item = self._items[0]
                if isinstance(item, Ask):
                    if taken:
                        break
                    self._items.popleft()
                    return item
                taken.append(item)
                self._items.popleft()
            self._samples -= len(taken)
            self._changed.notify_all()
            return taken or None


class Desk:
    """Work for the answering thread, in order.

    Args:
        policy: "newest" lets a question that is due replace one that waits, unless segments came
            in between; "wait" makes it wait.
        pieces: most segments that wait; whoever brings one more waits under both policies, so
            that its frames pile up where they are dropped and counted.
        on_skip: called with a question that was replaced.
    """

    def __init__(self, policy: Policy, pieces: int, on_skip: Callable[[Question], None]) -> None:
        self._work: deque[Piece | Question] = deque()
        self._policy = policy
        self._pieces = pieces
        self._on_skip = on_skip
        self._changed = threading.Condition()
        self._is_finished = self._is_closed = False

    def put(self, work: Piece | Question) -> bool:
        """Add work; False when nothing is taken any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._has_room(work))
            if self._is_closed:
                return False
            if _waits(work):
                self._replace_older()
            self._work.append(work)
            self._changed.notify_all()
            return True

    def take(self) -> Piece | Question | None:
        """Wait for work; None when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._work or self._is_finished or self._is_closed)
            if self._is_closed or not self._work:
                return None
            work = self._work.popleft()
            self._changed.notify_all()
            return work

    def finish(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self._is_finished = True
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing more will be taken."""
        with self._changed:
            self._is_closed = True
            self._work.clear()
            self._changed.notify_all()

    def _replace_older(self) -> None:
        """Give up the newest question that is due, where no segment came after it."""
        for older in reversed(self._work):
            if isinstance(older, Piece):
                return
            if older.is_due:
                self._work.remove(older)
                self._on_skip(older)
                return

    def _has_room(self, work: Piece | Question) -> bool:
        if isinstance(work, Piece):
            return sum(isinstance(entry, Piece) for entry in self._work) < self._pieces
        return self._policy == "newest" or not any(map(_waits, self._work))


def _waits(work: Piece | Question) -> bool:
    return isinstance(work, Question) and work.is_due


_SOMETHING = threading.Condition()
"""Notified of every event of any stream, for whoever waits for several."""


class EventQueue:
    """Events on their way to whoever reads them.

    Args:
        policy: "newest" gives up the oldest, "wait" makes the stream wait.
        on_drop: called with how many were given up.
    """

    def __init__(self, policy: Policy, on_drop: Callable[[int], None]) -> None:
        self._events: deque[LiveEvent] = deque()
        self._policy = policy
        self._on_drop = on_drop
        self._is_closed = False
        self.is_over = False
        """The stream's end was fetched."""

    def put(self, event: LiveEvent) -> None:
        """Add an event."""
        with _SOMETHING:
            if self._policy == "wait" and isinstance(event, LiveAnswer):
                _SOMETHING.wait_for(lambda: self._is_closed or len(self._events) < _EVENTS)
            is_full = len(self._events) >= _EVENTS and not isinstance(event, LiveEnd)
            if is_full and self._policy == "newest":
                self._events.popleft()
                self._on_drop(1)
            self._events.append(event)
            _SOMETHING.notify_all()

    def close(self) -> None:
        """Make nobody wait any more; what is there can be fetched."""
        with _SOMETHING:
            self._is_closed = True
            _SOMETHING.notify_all()

    def take_now(self) -> LiveEvent | None:
        """Fetch an event if there is one."""
        if not self._events:
            return None
        event = self._events.popleft()
        self.is_over = isinstance(event, LiveEnd)
        _SOMETHING.notify_all()
        return event


def next_event(queues: Sequence[EventQueue], timeout: float | None) -> LiveEvent | None:
    """Wait for the next event of any of some streams.

    Args:
        queues: theirs.
        timeout: seconds; None: as long as it takes.

    Returns:
        None when nothing came in time, or all have ended.
    """
    stop = None if timeout is None else time.monotonic() + timeout
    with _SOMETHING:
        while not all(queue.is_over for queue in queues):
            for queue in queues:
                event = queue.take_now()
                if event is not None:
                    return event
            left = None if stop is None else stop - time.monotonic()
            if left is not None and left <= 0:
                return None
            _SOMETHING.wait(left)
    return None
