"""Fair turns at the graphs that several streams share.

A turn is one call of a graph: a few frames through `vision_lower`, some bins through
`vision_upper`, a prefill, a token. The stream that has had the least time goes next, so that long
answers of one do not hold up the frames of another. Within a stream answers go before frames, but
no call waits for more than a second because of that.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numpy.typing import DTypeLike, NDArray

from stts_export.runtime.decoder import Runner


class Turns:
    """Hands out turns, some number of them at a time.

    Args:
        slots: turns at a time.
    """

    def __init__(self, slots: int = 1) -> None:
        self._free = slots
        self._changed = threading.Condition()
        self._waiting: dict[int, _Waiting] = {}
        """In order of arrival."""
        self._used: dict[int, float] = {}
        """Seconds that a party has had. Being away earns nothing: who comes back begins near where
        the others stand (start-time fair queueing)."""
        self._level = 0.0
        """Where the party stood that had the last turn."""
        self._tickets = itertools.count()
        self._parties = itertools.count()
        self._hurried = 0
        self._own = threading.local()

    def join(self) -> int:
        """Return a new party."""
        with self._changed:
            return next(self._parties)

    def leave(self, party: int) -> None:
        """Forget a party; it may still come back, as a new one."""
        with self._changed:
            self._used.pop(party, None)

    @contextmanager
    def take(self, party: int) -> Iterator[None]:
        """Wait for a turn and have it; within a turn of the same thread this does nothing.

        Args:
            party: whose time it counts as.
        """
        if getattr(self._own, "has_turn", False):
            yield
            return
        self._wait(party)
        self._own.has_turn = True
        started = time.perf_counter()
        try:
            yield
        finally:
            self._own.has_turn = False
            with self._changed:
                self._free += 1
                self._used[party] = self._stands_at(party) + time.perf_counter() - started
                self._changed.notify_all()

    @contextmanager
    def hurry(self) -> Iterator[None]:
        """Let the calls of this thread go before others of the same party meanwhile."""
        with self._changed:
            self._hurried += 1
        self._own.is_urgent = True
        try:
            yield
        finally:
            self._own.is_urgent = False
            with self._changed:
                self._hurried -= 1

    @property
    def is_hurried(self) -> bool:
        """Whether somebody hurries, so that calls should be short."""
        return self._hurried > 0

    def _wait(self, party: int) -> None:
        is_urgent = getattr(self._own, "is_urgent", False)
        with self._changed:
            ticket = next(self._tickets)
            self._used[party] = max(self._stands_at(party), self._level - _CREDIT)
            self._waiting[ticket] = _Waiting(party, is_urgent, time.monotonic())
            try:
                while not (self._free and self._first() == ticket):
                    self._changed.wait()
                self._free -= 1
                self._level = max(self._level, self._stands_at(party))
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()  # there may be another free one

    def _stands_at(self, party: int) -> float:
        return self._used.get(party, self._level)

    def _first(self) -> int:
        now = time.monotonic()

        def rank(ticket: int) -> tuple[float, bool, int]:
            waiting = self._waiting[ticket]
            goes_first = waiting.is_urgent or now - waiting.since > _PATIENCE
            return self._stands_at(waiting.party), not goes_first, ticket

        return min(self._waiting, key=rank)


@dataclass(frozen=True)
class _Waiting:
    party: int
    is_urgent: bool
    since: float


_CREDIT = 0.5
"""Seconds by which a party may be ahead that was waiting for its frames meanwhile."""
_PATIENCE = 1.0
"""Seconds after which a call counts as urgent."""


class SharedRunner:
    """A runner of which every call is a turn.

    Args:
        runner: the graph.
        turns: where to get them.
        party: whose they are.
    """

    def __init__(self, runner: Runner, turns: Turns, party: int) -> None:
        self._runner = runner
        self._turns = turns
        self._party = party
        self.updates_in_place = runner.updates_in_place
        self.cache_capacity = runner.cache_capacity

    def __call__(
        self, inputs: dict[str, Any], in_place: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run the graph."""
        with self._turns.take(self._party):
            return self._runner(inputs, in_place)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Array of zeros in the runner's memory."""
        with self._turns.take(self._party):
            return self._runner.zeros(shape, dtype)

    def to_host(self, array: Any) -> NDArray[Any]:
        """Array of the runner's memory as a NumPy array."""
        with self._turns.take(self._party):
            return self._runner.to_host(array)

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of the runner's memory, or of the host, to one of the runner's."""
        with self._turns.take(self._party):
            self._runner.copy(target, source)


def turns_at_a_time(threads: int | None) -> int:
    """Turns at a time on the CPU: as many as there are cores for.

    Args:
        threads: of an operator; None: it uses all cores. Engines share one block of memory and have
            one turn at a time.
    """
    return 1 if threads is None else max(1, (os.cpu_count() or 1) // threads)
