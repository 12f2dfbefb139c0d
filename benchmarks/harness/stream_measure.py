"""The three measurements of bench_stream; all times are wall time, frames come in real time."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.stream_feeds import Camera, Feed, waiting_events
from benchmarks.harness.timing import summary
from stts_export.live.events import Counters, LiveAnswer
from stts_export.live.settings import LOWEST_RATIO, MODES, Mode
from stts_export.live.stream import LiveStream
from stts_export.runtime.session import Session

Say = Callable[[str], None]

QUESTION = "How many objects are there?"
RATIO = 0.5
"""Prune ratio wherever no controller chooses one."""
BEFORE, DURING, AFTER = PHASES = ("before", "during", "after")
"""Of the controller's trace; the load is there in the middle."""
_CALIBRATION_QUESTIONS = 5


@dataclass(frozen=True)
class Settings:
    """What to run."""

    quick: bool
    threads: int | None
    """Of an operator; None: all cores."""
    windows: tuple[int, ...]
    """Frames, ascending."""
    repeats: int
    """Questions to each window and mode."""
    fps: float
    """Of windows and of the controller's stream."""
    every: int
    """Frames between questions, and frames of a segment, of these."""
    streams: tuple[int, ...]
    """Numbers of streams that share the session, ascending."""
    rate: float
    """Frames a second of each of them, above what the machine can take."""
    stream_window: int
    """Frames."""
    stream_every: float
    """Seconds between questions."""
    stream_rounds: int
    warm_up: float
    """Seconds of a round that do not count."""
    seconds: float
    """Of a round that count."""
    controller_window: int
    """Frames."""
    phase_questions: int
    """Of each of the trace's phases."""
    budget_factor: float
    """Latency budget over the latency of the lowest ratio without load."""
    competitors: int
    """Streams that are the load."""
    max_new_tokens: int


def measure_windows(
    session: Session, settings: Settings, clip: NDArray[np.uint8], say: Say
) -> list[dict[str, Any]]:
    """Time answers of every window and mode; the streams take turns, one question at a time."""
    say("windows: filling them")
    with ExitStack() as stack:
        feeds: dict[tuple[int, Mode], Feed] = {}
        for frames, mode in itertools.product(settings.windows, MODES):
            live = session.stream(
                name=f"{mode}, {frames} frames",
                prompt=QUESTION,
                mode=mode,
                fps=settings.fps,
                every=settings.every / settings.fps,
                window=frames / settings.fps,
                segment=settings.every / settings.fps if mode == "incremental" else None,
                prune_ratio=RATIO,
                max_new_tokens=settings.max_new_tokens,
            )
            feeds[frames, mode] = Feed(stack.enter_context(live), clip)
            feeds[frames, mode].fill()
        taken: dict[tuple[int, Mode], list[LiveAnswer]] = {case: [] for case in feeds}
        cases = list(feeds)
        for repeat in range(settings.repeats):
            say(f"windows: repeat {repeat + 1} of {settings.repeats}")
            shift = repeat % len(cases)
            for case in cases[shift:] + cases[:shift]:
                taken[case].append(feeds[case].ask_in_real_time())
        return [
            _describe_window(case, answers, feeds[case].live.counters)
            for case, answers in taken.items()
        ]


def _describe_window(
    case: tuple[int, Mode], answers: Sequence[LiveAnswer], counters: Counters
) -> dict[str, Any]:
    frames, mode = case
    return {
        "frames": frames,
        "mode": mode,
        "answer_frames": sorted({answer.frames for answer in answers}),
        "kept_windows": statistics.median(answer.kept_windows for answer in answers),
        "total_windows": answers[-1].total_windows,
        "new_tokens": [len(answer.token_ids) for answer in answers],
        "first_token": summary([answer.first_token for answer in answers]),
        "latency": summary([answer.latency for answer in answers]),
        "stages": {
            stage: summary([answer.timings[stage] for answer in answers])
            for stage in answers[-1].timings
        },
        "dropped": counters.dropped,
    }


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the longest window beside the shortest, and the modes beside each other.

    Args:
        rows: of `measure_windows`; quotients are taken within a repeat.

    Returns:
        `longest_over_shortest` by mode, and `exact_over_incremental` by frames.
    """
    samples = {(row["frames"], row["mode"]): row["first_token"]["samples"] for row in rows}
    frames = sorted({row["frames"] for row in rows})
    return {
        "shortest": frames[0],
        "longest": frames[-1],
        "longest_over_shortest": {
            mode: summary(_quotients(samples[frames[-1], mode], samples[frames[0], mode]))
            for mode in MODES
        },
        "exact_over_incremental": {
            str(count): summary(_quotients(samples[count, "exact"], samples[count, "incremental"]))
            for count in frames
        },
    }


def _quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def measure_streams(
    session: Session, settings: Settings, clip: NDArray[np.uint8], say: Say
) -> list[dict[str, Any]]:
    """Count what streams get that together ask for more than the machine can do."""
    cases = list(itertools.product(settings.streams, MODES))
    rounds: dict[tuple[int, Mode], list[_Round]] = {case: [] for case in cases}
    for number in range(settings.stream_rounds):
        shift = number % len(cases)
        for count, mode in cases[shift:] + cases[:shift]:
            say(f"streams: round {number + 1} of {settings.stream_rounds}: {count} {mode}")
            rounds[count, mode].append(_overload(session, settings, clip, count, mode))
    return [_describe_streams(*case, rounds[case], settings) for case in cases]


@dataclass(frozen=True)
class _Round:
    seconds: float
    counters: list[Counters]
    """Of each stream, within these seconds."""
    answers: list[LiveAnswer]

    def total(self, name: str) -> int:
        return sum(getattr(counters, name) for counters in self.counters)


def _overload(
    session: Session, settings: Settings, clip: NDArray[np.uint8], count: int, mode: Mode
) -> _Round:
    with ExitStack() as stack:
        streams: list[LiveStream] = []
        for place in range(count):
            offset = place / count / settings.rate
            camera = Camera(f"camera {place + 1}", clip, settings.rate, offset)
            live = session.stream(
                camera,
                prompt=QUESTION,
                mode=mode,
                fps=settings.rate,
                every=settings.stream_every,
                window=settings.stream_window / settings.rate,
                prune_ratio=RATIO,
                max_new_tokens=settings.max_new_tokens,
            )
            streams.append(stack.enter_context(live))
        time.sleep(settings.warm_up)
        for live in streams:
            waiting_events(live)
        before, started = [live.counters for live in streams], time.monotonic()
        time.sleep(settings.seconds)
        after, seconds = [live.counters for live in streams], time.monotonic() - started
        answers = [
            event
            for live in streams
            for event in waiting_events(live)
            if isinstance(event, LiveAnswer)
        ]
        for live in streams:
            live.close(wait=0.0)  # all at once; the stack then waits for each
    pairs = zip(before, after, strict=True)
    return _Round(seconds, [late - early for early, late in pairs], answers)


def _describe_streams(
    count: int, mode: Mode, rounds: Sequence[_Round], settings: Settings
) -> dict[str, Any]:
    encoded = [[counters.encoded for counters in one.counters] for one in rounds]
    latencies = [answer.latency for one in rounds for answer in one.answers]
    return {
        "streams": count,
        "mode": mode,
        "offered_per_second": count * settings.rate,
        "sampled_per_second": summary([one.total("sampled") / one.seconds for one in rounds]),
        "encoded_per_second": summary([one.total("encoded") / one.seconds for one in rounds]),
        "dropped_share": summary(
            [one.total("dropped") / max(1, one.total("sampled")) for one in rounds]
        ),
        "encoded_of_each": encoded,
        "fairness": summary([min(each) / max(1, *each) for each in encoded]),
        "answers": sum(len(one.answers) for one in rounds),
        "skipped_questions": sum(one.total("skipped_questions") for one in rounds),
        "dropped": sum(one.total("dropped") for one in rounds),
        "latency": summary(latencies) if latencies else None,
    }


def trace_controller(
    session: Session, settings: Settings, clip: NDArray[np.uint8], say: Say
) -> dict[str, Any]:
    """Follow the controller of one stream while others come and go."""
    say("controller: latency without load")
    alone = _latency_alone(session, settings, clip)
    budget = round(settings.budget_factor * statistics.median(alone), 3)
    with ExitStack() as stack:
        live = session.stream(name="traced", latency=budget, **_traced(settings))
        feed = Feed(stack.enter_context(live), clip)
        feed.fill()
        tracer = _Tracer(feed, settings)
        phases = {}
        for phase in PHASES:
            say(f"controller: {phase} the load")
            begun = tracer.now
            load = _load(session, settings, clip, stack) if phase == DURING else []
            tracer.run()
            for other in load:
                other.close(wait=0.0)  # the traced stream's frames must not be late
            phases[phase] = begun, tracer.now
        answers = tracer.finish()
        return {
            "budget": budget,
            "alone": summary(alone),
            "load": {
                "streams": settings.competitors,
                "fps": settings.fps,
                "window": settings.controller_window,
                "every_seconds": settings.stream_every,
            },
            "load_between": phases[DURING],
            "dropped": live.counters.dropped,
            "ratio_changes": _changes(answers),
            "phases": {phase: _describe_phase(answers, phase, budget) for phase in PHASES},
            "answers": answers,
        }


def _traced(settings: Settings) -> dict[str, Any]:
    return {
        "prompt": QUESTION,
        "fps": settings.fps,
        "every": settings.every / settings.fps,
        "window": settings.controller_window / settings.fps,
        "max_new_tokens": settings.max_new_tokens,
    }


def _latency_alone(session: Session, settings: Settings, clip: NDArray[np.uint8]) -> list[float]:
    """Seconds to answers at the lowest ratio, on a machine that does nothing else."""
    with session.stream(prune_ratio=LOWEST_RATIO, **_traced(settings)) as live:
        feed = Feed(live, clip)
        feed.fill()
        return [feed.ask_in_real_time().latency for _ in range(_CALIBRATION_QUESTIONS)]


def _load(
    session: Session, settings: Settings, clip: NDArray[np.uint8], stack: ExitStack
) -> list[LiveStream]:
    """Open cameras that ask about windows as long as the traced stream's, at the same rate."""
    streams = []
    for place in range(settings.competitors):
        offset = place / settings.competitors / settings.fps
        asked = {**_traced(settings), "every": settings.stream_every, "prune_ratio": RATIO}
        camera = Camera(f"load {place + 1}", clip, settings.fps, offset)
        streams.append(stack.enter_context(session.stream(camera, **asked)))
    return streams


class _Tracer:
    """Pushes frames when they are due, phase by phase, and keeps the answers."""

    def __init__(self, feed: Feed, settings: Settings) -> None:
        self._feed = feed
        self._frames = settings.phase_questions * settings.every
        """Of a phase."""
        self._step = 1 / settings.fps
        self._filled = feed.newest
        self._started = time.monotonic()
        self._pushed = 0
        self._answers: list[LiveAnswer] = []

    @property
    def now(self) -> float:
        """Seconds since the window was full."""
        return time.monotonic() - self._started

    def run(self) -> None:
        """Push the frames of a phase."""
        for _ in range(self._frames):
            self._pushed += 1
            time.sleep(max(0.0, self._pushed * self._step - self.now))
            self._feed.push()
            self._answers += [e for e in self._feed.events() if isinstance(e, LiveAnswer)]

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the last answer; describe all of them."""
        newest = self._answers[-1].end if self._answers else None
        if newest != self._feed.newest:
            self._answers.append(self._feed.answer())
        return [self._describe(answer) for answer in self._answers]

    def _describe(self, answer: LiveAnswer) -> dict[str, Any]:
        since = answer.end - self._filled
        place = round(since / self._step) - 1
        return {
            "time": since,
            "phase": PHASES[place // self._frames],
            "prune_ratio": answer.prune_ratio,
            "predicted": answer.predicted_latency,
            "latency": answer.latency,
            "first_token": answer.first_token,
            "waited": answer.timings["waited"],
            "skipped_before": answer.since_last.skipped_questions,
            "reason": answer.ratio_reason,
        }


def _describe_phase(answers: Sequence[dict[str, Any]], phase: str, budget: float) -> dict[str, Any]:
    """Summarise a phase; a question that was skipped has no answer within the budget."""
    mine = [answer for answer in answers if answer["phase"] == phase]
    skipped = sum(answer["skipped_before"] for answer in mine)
    within = sum(answer["latency"] <= budget for answer in mine)
    return {
        "answers": len(mine),
        "skipped_questions": skipped,
        "within_budget": within,
        "share_within_budget": within / max(1, len(mine) + skipped),
        "latency": summary([answer["latency"] for answer in mine]) if mine else None,
        "prune_ratio": summary([answer["prune_ratio"] for answer in mine]) if mine else None,
        "ratio_changes": _changes(mine),
    }


def _changes(answers: Sequence[dict[str, Any]]) -> int:
    ratios = [answer["prune_ratio"] for answer in answers]
    return sum(now != before for before, now in itertools.pairwise(ratios))
