"""What a live stream reports: answers, notices, its end, and what it has counted.

Times of a stream are seconds after its first frame. Axes: T frames of a window, W windows of
patches of a frame.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime.prompt import Conversation

NoticeKind = Literal[
    "connected",
    "reconnecting",
    "resolution",
    "timestamps",
    "gap",
    "damaged",
    "software-decoding",
    "empty",
]
"""What a notice is about: the source answered; it is lost and tried again; its frames have another
size; its times jumped or were missing; nothing came for a while; packets could not be decoded; the
hardware decoder that was looked for is not there; a question found no frames to be about."""


@dataclass(frozen=True)
class Counters:
    """What became of the frames of a stream, since it began."""

    decoded: int = 0
    """Frames that the source gave."""
    sampled: int = 0
    """Frames that fell on the sampling grid."""
    gated: int = 0
    """Sampled frames that were like the one before and did not go through the model."""
    dropped: int = 0
    """Sampled frames that were pushed out of a full queue, or came too late for one."""
    encoded: int = 0
    """Sampled frames that went through `vision_lower`."""
    damaged: int = 0
    """Packets that could not be decoded."""
    repaired_times: int = 0
    """Frames whose time was missing or impossible and was set."""
    reconnects: int = 0
    """Connections after the first one."""
    answers: int = 0
    skipped_questions: int = 0
    """Questions that fell due while an older one was waiting, and replaced it."""
    dropped_events: int = 0
    """Events that nobody fetched in time."""

    def __sub__(self, other: Counters) -> Counters:
        """Count between two moments."""
        earlier = asdict(other)
        return Counters(**{name: value - earlier[name] for name, value in asdict(self).items()})

    def plus(self, **counts: int) -> Counters:
        """Add to some of the counts."""
        return replace(self, **{name: getattr(self, name) + n for name, n in counts.items()})


@dataclass(frozen=True)
class LiveAnswer:
    """The answer to a question that fell due."""

    stream: str
    """Name of the stream: its source without credentials, or what its opener called it."""
    question: Conversation
    text: str
    token_ids: list[int]
    finish_reason: str
    """"stop" when the model or a stop string ended the answer, "length" when max_new_tokens did."""
    start: float
    """Time of the first frame that the answer is about."""
    end: float
    """Time of the last one."""
    source_end: float | None
    """The same on the source's own clock, as the caller's `pts`; None where it had no time."""
    asked_at: float
    """When the question fell due, in Unix time."""
    frames: int
    """T."""
    kept_windows: int
    """Of `total_windows`, and with the prune ratio of each segment in incremental mode."""
    total_windows: int
    prune_ratio: float
    """In incremental mode that of the newest segment."""
    ratio_reason: str
    """Why this ratio."""
    predicted_latency: float | None
    """Seconds that the controller expected; None without a budget or before anything was
    measured."""
    latency: float
    """Seconds from the arrival of the frame with which the question fell due to the answer."""
    first_token: float
    """Seconds from there to the answer's first token."""
    since_last: Counters
    """What became of frames since the answer before."""
    timings: dict[str, float]
    """Seconds per stage; `waited` is the time before work on the question began."""
    note: str | None
    """Why nothing was removed, or None when something was."""
    timestamps: NDArray[np.float64] = field(repr=False)
    """(T,) times of the frames, on the stream's clock."""
    prompt_times: NDArray[np.float64] = field(repr=False)
    """(T,) the times that the prompt prints; in exact mode from the window's first frame on.
    `Session.generate` with them as `timestamps` then gives the same answer about these frames."""
    keep: NDArray[np.bool_] = field(repr=False)
    """(T, W): windows that survived."""

    def values(self) -> dict[str, Any]:
        """What `--json` prints, without arrays."""
        return _values(self, "answer")


@dataclass(frozen=True)
class LiveNotice:
    """Something that happened to a stream that goes on."""

    stream: str
    kind: NoticeKind
    message: str
    time: float | None = None
    """Time of the last frame before it; None before the first."""

    def values(self) -> dict[str, Any]:
        """What `--json` prints."""
        return _values(self, "notice")


@dataclass(frozen=True)
class LiveEnd:
    """The last event of a stream."""

    stream: str
    time: float | None
    """Time of its last frame; None when there was none."""
    counters: Counters
    error: Exception | None = None
    """Why it ended; None when the source came to its end or the stream was closed."""

    def values(self) -> dict[str, Any]:
        """What `--json` prints."""
        values = _values(self, "end")
        values["error"] = None if self.error is None else str(self.error)
        return values


LiveEvent = LiveAnswer | LiveNotice | LiveEnd


def _values(event: LiveAnswer | LiveNotice | LiveEnd, kind: str) -> dict[str, Any]:
    fields: Mapping[str, Any] = {
        name: getattr(event, name)
        for name in event.__dataclass_fields__
        if name not in ("timestamps", "prompt_times", "keep")
    }
    return {
        "event": kind,
        **{
            name: asdict(value) if isinstance(value, Counters) else value
            for name, value in fields.items()
        },
    }


def json_line(event: LiveEvent) -> str:
    """One line of JSON."""
    return json.dumps(event.values())
