"""Answers and streams that nothing had to compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stts_export.live.events import Counters, LiveAnswer, LiveEvent

GRID = (2, 3)
COLOUR = (200, 40, 90)
COUNTERS = Counters(
    decoded=97, sampled=13, gated=2, dropped=1, encoded=9, damaged=3, repaired_times=4,
    reconnects=5, answers=6, skipped_questions=7, dropped_events=8,
)  # fmt: skip


def answer(
    times: Sequence[float] = (0.0, 0.5, 1.0), keep: Any = None, **changes: Any
) -> LiveAnswer:
    """Of frames at these times; by default half of their windows are kept."""
    if keep is None:
        keep = np.tile(np.array([1, 0, 1, 0, 1, 0], dtype=bool), (len(times), 1))
    values: dict[str, Any] = {
        "stream": "cam", "question": "What colour?", "text": "red", "token_ids": [1, 2],
        "finish_reason": "stop",
        "start": times[0], "end": times[-1], "source_end": times[-1],
        "asked_at": 1.8e9, "frames": len(times),
        "kept_windows": int(keep.sum()), "total_windows": keep.size, "prune_ratio": 0.5,
        "ratio_reason": "as trained", "predicted_latency": None, "latency": 0.41,
        "first_token": 0.3, "since_last": Counters(), "timings": {"prefill": 0.1}, "note": None,
        "timestamps": np.array(times), "prompt_times": np.array(times), "keep": keep, **changes,
    }  # fmt: skip
    return LiveAnswer(**values)


def frames(count: int = 3) -> np.ndarray:
    return np.full((count, 120, 180, 3), COLOUR, np.uint8)


@dataclass
class FakeStream:
    """Has its events from the start; an endless one goes on until it is closed."""

    name: str = "cam"
    events: list[LiveEvent] = field(default_factory=list)
    is_endless: bool = False
    hangs: bool = False
    """A thread of it does not end."""
    counters: Counters = COUNTERS
    queue_depth: int = 4
    last_answer: LiveAnswer | None = None
    time: float | None = None
    is_open: bool = False
    closed: list[float] = field(default_factory=list)
    """What `close` was called with."""

    def __enter__(self) -> FakeStream:
        self.is_open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, wait: float = 1.0) -> bool:
        self.is_open = False
        self.closed.append(wait)
        return not self.hangs


def merged(streams: Sequence[FakeStream], timeout: float) -> Iterator[LiveEvent | None]:
    assert all(stream.is_open for stream in streams)
    for stream in streams:
        yield from stream.events
    while any(stream.is_endless and stream.is_open for stream in streams):
        yield None
