"""What a stream is asked to do, checked against the bundle before anything starts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from stts_export.bundle import Limits
from stts_export.errors import InputError
from stts_export.runtime.logits import Sampling
from stts_export.runtime.prompt import Conversation

Mode = Literal["exact", "incremental"]
"""How a question sees its window: as one clip, the same result as `Session.generate` on its frames;
or as segments that are in the KV cache already."""
MODES: tuple[Mode, ...] = get_args(Mode)
Policy = Literal["newest", "wait"]
"""What happens when frames come faster than they are taken: the oldest waiting one is dropped, or
the source waits."""
POLICIES: tuple[Policy, ...] = get_args(Policy)

DEFAULT_EVERY, DEFAULT_WINDOW, DEFAULT_SEGMENT = 2.0, 30.0, 4.0
LOWEST_RATIO, HIGHEST_RATIO = 0.1, 0.9
"""Where the controller stays unless told otherwise."""

_UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "": 1.0}


def seconds(value: object, name: str) -> float:
    """Return the seconds of a number, or of a text with a unit, as "500ms", "2s", "1.5m" or "1h".

    Raises:
        InputError: it is none of these, or not above 0.
    """
    number = math.nan
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", value)
        if match and match[2] in _UNITS and match[1].count(".") <= 1 and match[1] != ".":
            number = float(match[1]) * _UNITS[match[2]]
    elif _is_number(value):
        number = float(value)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number > 0):
        raise InputError(
            f"{name} is {value!r}",
            where=name,
            allowed="a duration above 0: seconds, or with a unit, as 500ms, 2s, 1.5m, 1h",
        )
    return number


def _is_number(value: object) -> bool:
    numbers = (int, float, np.integer, np.floating)
    return isinstance(value, numbers) and not isinstance(value, bool)


@dataclass(frozen=True)
class StreamSettings:
    """Settings of one stream; durations as numbers of seconds or texts such as "30s".

    Raises:
        InputError: a value is of the wrong kind or out of range.
    """

    prompt: Conversation
    every: float | str | None = DEFAULT_EVERY
    """Between questions, on the stream's own clock; None: only when asked."""
    window: float | str | None = None
    """How far back a question sees; 30 s, or what the bundle allows, when None."""
    latency: float | str | None = None
    """How long an answer may take from the moment its question falls due; None: as long as it
    takes, at a fixed ratio."""
    mode: Mode = "exact"
    segment: float | str | None = None
    """Longest piece that is encoded and put into the cache at a time in incremental mode; 4 s, or
    the window where that is shorter, when None."""
    fps: float | None = None
    """Frames sampled from a second; as the model was trained when None."""
    prune_ratio: float | None = None
    """Fixes the ratio; as trained when None and there is no latency budget."""
    min_prune_ratio: float | None = None
    """With a latency budget: the ratio is never below; 0.1 or the bundle's own limit when None."""
    max_prune_ratio: float | None = None
    """With a latency budget: never above; 0.9 when None."""
    max_new_tokens: int = 64
    sampling: Sampling | None = None
    stop: str | tuple[str, ...] = ()
    gate: float | None = None
    """Frames that differ nowhere from the last one that passed by this many of 255 levels, in the
    mean of 8x8 pixels, do not go through the model; None: all do."""
    policy: Policy | None = None
    """What happens to frames and events that come faster than they are taken; "newest" for live
    sources and pushed frames, "wait" for files when None."""
    queue: int = 8
    """Most sampled frames that wait for the model."""


@dataclass(frozen=True)
class Plan:
    """Settings in numbers of the bundle's own grid."""

    fps: float
    window: int
    """Frames."""
    every: int | None
    """Frames between questions."""
    segment: int
    """Most frames of a segment."""
    latency: float | None


def plan(settings: StreamSettings, limits: Limits) -> Plan:
    """Check settings against what a bundle allows.

    Raises:
        InputError: a value is of the wrong kind or out of range, durations are no multiples of the
            sampling step, or the window has more frames than the bundle takes.
    """
    _check_choices(settings)
    fps = _fps(settings.fps, limits)
    longest = limits.max_frames / fps
    window = min(DEFAULT_WINDOW, longest) if settings.window is None else settings.window
    frames = _steps(window, fps, "window", exact=settings.window is not None)
    if frames > limits.max_frames:
        raise InputError(
            f"a window of {frames} frames ({settings.window} at {fps:g} frames a second)",
            where="window",
            allowed=f"up to {limits.max_frames} frames, the limit this bundle was built with",
            fix=f"a window of {longest:g} s, fewer frames a second, or build with "
            f"--max-frames {frames}",
        )
    every = None
    if settings.every is not None:
        every = _steps(settings.every, fps, "every", exact=settings.every != DEFAULT_EVERY)
    segment = min(DEFAULT_SEGMENT, frames / fps) if settings.segment is None else settings.segment
    steps = _steps(segment, fps, "segment", exact=settings.segment is not None)
    if steps > frames:
        raise InputError(
            f"segment is {settings.segment}", where="segment", allowed=f"up to the window, {window}"
        )
    latency = None if settings.latency is None else seconds(settings.latency, "latency")
    return Plan(fps, frames, every, steps, latency)


def _check_choices(settings: StreamSettings) -> None:
    if settings.mode not in MODES:
        raise InputError(f"mode is {settings.mode!r}", where="mode", allowed=" or ".join(MODES))
    if settings.policy not in (None, *POLICIES):
        raise InputError(
            f"policy is {settings.policy!r}", where="policy", allowed=" or ".join(POLICIES)
        )
    gate = settings.gate
    if gate is not None and not (_is_number(gate) and 0 <= gate <= 255):
        raise InputError(f"gate is {gate!r}", where="gate", allowed="0 to 255")
    if settings.segment is not None and settings.mode == "exact":
        raise InputError(
            f"segment is {settings.segment}, but there are none in exact mode",
            where="segment",
            allowed="with mode incremental",
        )
    if settings.latency is not None and settings.prune_ratio is not None:
        raise InputError(
            f"a latency of {settings.latency} beside a fixed prune ratio, {settings.prune_ratio}",
            where="latency",
            allowed="one of the two: a budget is held by choosing the ratio",
        )
    if not isinstance(settings.queue, (int, np.integer)) or settings.queue < 1:
        raise InputError(f"queue is {settings.queue!r}", where="queue", allowed="1 or more frames")


def _fps(fps: float | None, limits: Limits) -> float:
    if fps is None:
        return limits.max_fps
    if not _is_number(fps) or not 0 < fps <= limits.max_fps:
        raise InputError(
            f"fps is {fps!r}",
            where="fps",
            allowed=f"above 0, up to {limits.max_fps:g}, at which the model was trained",
        )
    return float(fps)


def _steps(duration: float | str, fps: float, name: str, exact: bool = True) -> int:
    """Frames of a duration on the sampling grid."""
    length = seconds(duration, name)
    steps = length * fps
    whole = round(steps)
    if not exact:
        return max(1, int(steps + 1e-6))
    if whole < 1 or abs(steps - whole) > 1e-4 * max(1, whole):
        near = sorted({max(1, math.floor(steps)), max(1, math.ceil(steps))})
        raise InputError(
            f"{name} is {duration}",
            where=name,
            allowed=f"multiples of {1 / fps:g} s, the distance of sampled frames",
            fix=" or ".join(f"{step / fps:.7g}s" for step in near),
        )
    return whole
