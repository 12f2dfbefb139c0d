"""From samples to questions: `vision_lower` as frames come, the window, and what falls due when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from threading import Event

import numpy as np

from stts_export.live.answering import Meter
from stts_export.live.frames import FrameStore, LowerFrame
from stts_export.live.gate import Gate
from stts_export.live.queues import Ask, Desk, Inbox, Piece, Question
from stts_export.live.sample import Sample
from stts_export.live.settings import Plan
from stts_export.live.sources.base import Reporter
from stts_export.live.turns import Turns
from stts_export.runtime.prompt import Conversation
from stts_export.tensors import LOWER_CHUNK

_SLACK = 1e-6
_ROOM_SECONDS = 0.2
"""Between two looks whether the stream was closed."""


class Seeing:
    """Runs samples, keeps the frames that questions are about, and asks; all in one thread.

    Args:
        inbox: where samples and questions come from.
        desk: where questions go.
        store: runs and holds frames.
        turns: of the shared graphs.
        prompt: the standing question.
        steps: the stream's settings in samples.
        gate: what is left out; None: nothing.
        stop: set when the stream is closed.
        report: gets counts.
        meter: gets the times of stages.
    """

    def __init__(
        self,
        inbox: Inbox,
        desk: Desk,
        store: FrameStore,
        turns: Turns,
        prompt: Conversation,
        steps: Plan,
        gate: Gate | None,
        stop: Event,
        report: Reporter,
        meter: Meter | None,
    ) -> None:
        self._inbox = inbox
        self._desk = desk
        self._store = store
        self._turns = turns
        self._prompt = prompt
        self._steps = steps
        self._gate = gate
        self._stop = stop
        self._report = report
        self._meter = meter
        self._frames: deque[LowerFrame] = deque()
        """Of the window, but for those that are in the cache for good."""
        self._due = steps.every
        """Grid point of the next question; None: questions are only asked."""
        self._newest: Sample | None = None
        """Whether it went through the model or not."""
        self._is_new = False
        """A frame went through the model after the last question that was due."""

    @property
    def time(self) -> float | None:
        """Stream time of the newest sample; None before the first."""
        return None if self._newest is None else self._newest.time

    def run(self) -> None:
        """Take samples and questions until there are no more, or the stream is closed."""
        while (taken := self._inbox.take(LOWER_CHUNK)) is not None:
            if isinstance(taken, Ask):
                self._ask(taken.prompt, taken.arrived, is_due=False)
            else:
                self._see(taken)

    def ask_at_the_end(self) -> None:
        """Ask about what came after the last question."""
        if self._steps.every is not None and self._is_new and self._newest is not None:
            self._ask(self._prompt, self._newest.arrived, is_due=True)

    def _see(self, samples: Sequence[Sample]) -> None:
        waiting: list[Sample] = []
        for sample in samples:
            if self._was_due_before(sample):
                self._run(waiting)
                if self._is_new:
                    self._ask(self._prompt, sample.arrived, is_due=True)
                self._set_due(sample)
            self._newest = sample
            if self._gate is None or self._gate.passes(self._store.on_host(sample.pixels)):
                waiting.append(sample)
            else:
                self._report.count(gated=1)
            if self._due is not None and sample.index == self._due:
                self._run(waiting)
                self._ask(self._prompt, sample.arrived, is_due=True)
                self._due += self._steps.every or 0
        self._run(waiting)

    def _was_due_before(self, sample: Sample) -> bool:
        """Whether the sample with which a question falls due is missing."""
        return self._due is not None and sample.index is not None and sample.index > self._due

    def _set_due(self, sample: Sample) -> None:
        """Let the next question fall due with a sample, or after it."""
        if self._steps.every is not None and sample.index is not None:
            self._due = -(-sample.index // self._steps.every) * self._steps.every

    def _run(self, samples: list[Sample]) -> None:
        """Run samples through vision_lower, and empty the list."""
        while samples and not self._stop.is_set():
            is_short = self._turns.is_hurried or not isinstance(samples[0].pixels, np.ndarray)
            number = self._store.room(1 if is_short else len(samples), _ROOM_SECONDS)
            if number == 0:
                continue
            part, samples[:] = samples[:number], samples[number:]
            started = time.perf_counter()
            frames = self._store.run(part, begins_clip=not self._frames)
            if self._meter is not None:
                self._meter.stage("vision_lower", (time.perf_counter() - started) / number)
            self._report.count(encoded=number)
            self._is_new = True
            for frame in frames:  # one by one, so that it does not matter how many run together
                self._frames.append(frame)
                self._slide(frame.time)
        samples.clear()

    def _slide(self, now: float) -> None:
        """Let go of the frames that are not in the window any more."""
        gone = []
        while self._frames and (
            self._frames[0].time <= self._drop_before(now) or len(self._frames) > self._steps.window
        ):
            gone.append(self._frames.popleft())
        self._store.release(gone)

    def _drop_before(self, now: float) -> float:
        """Time at or before which frames are not in the window that ends now."""
        return now - self._steps.window / self._steps.fps + _SLACK

    def _ask(self, prompt: Conversation, arrived: float, is_due: bool) -> None:
        now = self.time or 0.0
        self._slide(now)  # samples that did not pass the gate move the window too
        frames = list(self._frames)
        self._store.hold(frames)
        size = (0, 0) if self._newest is None else self._newest.size
        offset = None if self._newest is None else self._newest.offset
        self._is_new = self._is_new and not is_due
        self._desk.put(
            Question(prompt, arrived, frames, size, offset, self._drop_before(now), is_due)
        )


class SeeingSegments(Seeing):
    """Hands the oldest frames over for good, a segment at a time.

    A segment goes when as many frames have come after it. So what a question finds open is never
    just a frame or two, in which selection would have nothing to choose from: a clip's first frame
    stays whole.
    """

    def _slide(self, now: float) -> None:
        super()._slide(now)
        while self._frames and self._is_long():
            end = self._frames[0].time + self._steps.segment / self._steps.fps - _SLACK
            segment: list[LowerFrame] = []
            while (
                self._frames and self._frames[0].time < end and len(segment) < self._steps.segment
            ):
                segment.append(self._frames.popleft())
            self._desk.put(Piece(segment, self._drop_before(now)))

    def _is_long(self) -> bool:
        most = longest_open(self._steps)
        span = self._frames[-1].time - self._frames[0].time
        return len(self._frames) >= most or span >= most / self._steps.fps - _SLACK


def longest_open(steps: Plan) -> int:
    """Frames with which the open part of incremental mode loses its oldest segment."""
    return 2 * steps.segment
