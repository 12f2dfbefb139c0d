"""A stream: threads that carry frames from a source to answers.

    source ─► reading ─► inbox ─► seeing ─► desk ─► answering ─► events
              decode,             vision_lower      select, vision_upper,
              clock, grid,        as frames come    decoder
              resize

Reading, seeing and answering run at the same time; the graphs are shared with other streams by
`turns.Turns`. Frames pushed by a caller take the place of the reading thread.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stts_export.engines import cuda
from stts_export.errors import InputError, did_you_mean
from stts_export.live.answering import (
    Answering,
    ExactAnswering,
    IncrementalAnswering,
    Meter,
    Observer,
)
from stts_export.live.controller import Controller, FixedRatio
from stts_export.live.events import (
    Counters,
    LiveAnswer,
    LiveEnd,
    LiveEvent,
    LiveNotice,
    NoticeKind,
)
from stts_export.live.frames import FrameStore, LowerFrame
from stts_export.live.gate import Gate
from stts_export.live.grid import LONGEST_STILL, MAX_JUMP, Grid, Moment, StreamClock
from stts_export.live.opening import (
    OTHER_QUESTION,
    checked_prompts,
    controller_of,
    laid_out_cache,
)
from stts_export.live.queues import (
    Ask,
    Desk,
    EventQueue,
    Inbox,
    Piece,
    Question,
    Sample,
    next_event,
)
from stts_export.live.settings import Policy, StreamSettings, plan
from stts_export.live.sources import open_source
from stts_export.live.sources.base import Source
from stts_export.live.sources.options import SourceOptions
from stts_export.live.turns import Turns
from stts_export.runtime import planner
from stts_export.runtime.arguments import host_array
from stts_export.runtime.prompt import Conversation, check_question
from stts_export.runtime.resize import check_frames, resize_frames
from stts_export.tensors import LOWER_CHUNK, VISION_LOWER

if TYPE_CHECKING:
    from stts_export.runtime.session import Session

_log = logging.getLogger(__name__)

_SLACK = 1e-6
_PENDING_PIECES = 2
_ROOM_SECONDS = 0.2


class _StoppedError(Exception):
    """The stream was closed in the middle of an answer."""


class LiveStream:
    """Frames in, answers out; made by `Session.stream`, used as a context manager.

    `push`, `ask`, `finish`, `close` and iteration may be called from any thread.

    Args:
        session: a view of the shared graphs for this stream alone.
        turns: of these graphs.
        name: of the stream.
        source: where frames come from; None when they are pushed.
        settings: what is asked.
        observer: sees every answer with its frames.
        meter: gets the times of stages.
    """

    def __init__(
        self,
        session: Session,
        turns: Turns,
        name: str,
        source: Source | None,
        settings: StreamSettings,
        *,
        observer: Observer | None = None,
        meter: Meter | None = None,
    ) -> None:
        self.name = name
        self.settings = settings
        self.plan = plan(settings, session.bundle.manifest.limits)
        self._session = session
        self._turns = turns
        self._source = source
        self._observer = observer
        self._meter = meter
        self._prompts = checked_prompts(session, settings)
        controller, self._lowest = controller_of(session, settings, self.plan)
        is_live = source is None or source.is_live
        policy: Policy = settings.policy or ("newest" if is_live else "wait")
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._counters = self._told = Counters()
        self._inbox = Inbox(settings.queue, policy, lambda n: self.count(dropped=n))
        self._desk = Desk(policy, _PENDING_PIECES, self._skipped)
        self._events = EventQueue(policy, lambda n: self.count(dropped_events=n))
        self._clock = StreamClock(
            is_live,
            self._repaired,
            math.inf if source is None else MAX_JUMP,  # a caller's times are what they are
        )
        self._grid: Grid[_Held] = Grid(1 / self.plan.fps, LONGEST_STILL if is_live else MAX_JUMP)
        self._longest_still = LONGEST_STILL if is_live else math.inf
        self._gate = None if settings.gate is None else Gate(settings.gate, self.plan.window)
        self._window: deque[LowerFrame] = deque()
        """Frames of the window; in incremental mode of the open segment."""
        self._due = self.plan.every
        """Grid point of the next question."""
        self._is_new = False
        """A frame came after the last question."""
        self._time: float | None = None
        self._size = session.config.vision.image_size
        self._offset: float | None = None
        self._last_answer: LiveAnswer | None = None
        self._error: Exception | None = None
        self._is_repaired = False
        self.is_over = False
        """Its end is among its events."""
        self._threads: list[threading.Thread] = []
        self._arrived = 0.0
        """When the newest frame came."""
        self._store, self._answering = self._make(controller)

    def _make(self, controller: Controller) -> tuple[FrameStore, Answering]:
        """Memory for frames, and what answers; checks that prompts fit."""
        session, steps, lowest = self._session, self.plan, self._lowest
        config, precision = session.config.vision, session.bundle.manifest.precision
        is_exact = self.settings.mode == "exact"
        longest = steps.window if is_exact else steps.segment
        pieces = 2 if is_exact else 1 + _PENDING_PIECES
        plain = isinstance(controller, FixedRatio) and not (
            config.pruning and planner.n_prune(config.windows, longest, lowest)
        )
        cache = None
        if is_exact:
            session.check_window(
                np.arange(longest) / steps.fps,
                lowest,
                self.settings.prompt,
                self.settings.max_new_tokens,
            )
        else:
            cache = laid_out_cache(session, self._prompts, self.settings, steps, lowest)
        store = FrameStore(
            session.runners[VISION_LOWER],
            config,
            precision,
            slots=pieces * longest + LOWER_CHUNK,
            longest=longest,
            plain=plain,
        )
        shared = (
            session, self._turns, self.name, self.settings, store, controller,
            self._observer is not None,
        )  # fmt: skip
        if cache is None:
            return store, ExactAnswering(*shared)
        return store, IncrementalAnswering(cache, *shared)

    def __enter__(self) -> LiveStream:
        runs: list[tuple[str, Callable[[], None]]] = [
            ("sees", self._see),
            ("answers", self._answer),
        ]
        if self._source is not None:
            runs.insert(0, ("reads", self._read))
        for role, run in runs:
            # Blocking calls into FFmpeg or a back end must not keep the process from ending.
            thread = threading.Thread(
                target=self._guarded, args=(run,), name=f"{self.name} {role}", daemon=True
            )
            self._threads.append(thread)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[LiveEvent]:
        """Yield events as they come, the end among them.

        Raises:
            SttsError: what ended the stream, after its last event.
        """
        while (event := self.get()) is not None:
            yield event
            if isinstance(event, LiveEnd) and event.error is not None:
                raise event.error

    def get(self, timeout: float | None = None) -> LiveEvent | None:
        """Wait for the next event; None when there was none in time or the stream has ended.

        Args:
            timeout: seconds; None: as long as it takes.
        """
        return next_event([self._events], timeout)

    @property
    def counters(self) -> Counters:
        """What became of the frames so far."""
        return self._counters

    @property
    def queue_depth(self) -> int:
        """Sampled frames that wait."""
        return len(self._inbox)

    @property
    def last_answer(self) -> LiveAnswer | None:
        """The newest answer."""
        return self._last_answer

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame that went to the model; None before the first."""
        return self._time

    def push(
        self,
        frame: Any,
        pts: float | None = None,
        *,
        duration: float | None = None,
        timeout: float = 0.0,
    ) -> bool:
        """Give a frame to a stream without a source.

        Frames between sampling points cost a copy. The caller's memory is free when the call
        returns, unless the frame lies on a GPU: that one must stay as it is until it was answered.

        Args:
            frame: uint8 (height, width, 3) RGB: NumPy, DLPack, or in the memory of a GPU for
                engines, at the model's size.
            pts: seconds on the caller's clock; the wall clock when None.
            duration: seconds on screen; the distance to the frame before when None.
            timeout: seconds to wait for room, under the policy "wait" only.

        Returns:
            False when the frame was sampled and there was no room for it.

        Raises:
            InputError: the stream has a source or takes nothing any more, or this is no frame.
        """
        if self._source is not None:
            raise InputError(
                "frames cannot be pushed", where=self.name, allowed="streams without a source"
            )
        if not self._threads or self._stop.is_set() or self._inbox.is_finished:
            raise InputError(
                "takes no frames",
                where=self.name,
                fix="push within its `with` block, before `finish`",
            )
        if pts is not None and not (
            isinstance(pts, (int, float, np.floating, np.integer)) and math.isfinite(pts)
        ):
            raise InputError(f"pts is {pts!r}", where=self.name, allowed="finite seconds, or None")
        pixels = self._pushed(frame)
        now = time.monotonic()
        given = now if pts is None else float(pts)
        held = _Held(lambda: pixels, now, given)
        return self._arrive(duration, held, is_first=False, timeout=timeout)

    def ask(self, prompt: Conversation | None = None) -> None:
        """Ask about the newest frames now; the answer comes as an event.

        Args:
            prompt: the question; the stream's own when None.

        Raises:
            InputError: it is no text, or too long.
        """
        asked = self.settings.prompt if prompt is None else prompt
        if prompt is not None:
            self._check_question(prompt)
        self._inbox.ask(Ask(asked, time.monotonic()))

    def finish(self) -> None:
        """Say that no more frames will be pushed: what is there is answered, then it ends."""
        self._inbox.finish()

    def close(self, wait: float = 1.0) -> bool:
        """Stop at once.

        Args:
            wait: seconds to wait for the stream's threads.

        Returns:
            Whether all of them have ended. One that is in a blocking call ends with that.
        """
        self._halt()
        until = time.monotonic() + wait
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        self._end()
        done = not any(thread.is_alive() for thread in self._threads)
        if done:
            self._turns.leave(self.name)
        return done

    # What sources report.

    def notice(self, kind: NoticeKind, message: str) -> None:
        """Pass on what happened."""
        self._events.put(LiveNotice(self.name, kind, message, self._time))

    def count(self, **counts: int) -> None:
        """Add to the counters."""
        with self._lock:
            self._counters = self._counters.plus(**counts)

    # Reading.

    def _read(self) -> None:
        assert self._source is not None
        for arrival in self._source.arrivals(self._stop, self):
            if self._stop.is_set():
                return
            held = _Held(arrival.rgb, time.monotonic(), arrival.pts)
            self._arrive(arrival.duration, held, arrival.is_first, None)
        for moment in self._grid.finish():
            self._sample(moment, None)
        self._inbox.finish()

    def _arrive(
        self,
        duration: float | None,
        held: _Held,
        is_first: bool,
        timeout: float | None,
    ) -> bool:
        """Place a frame on the grid; False when a sample found no room."""
        self.count(decoded=1)
        before = self._clock.last
        now = self._clock.time(held.pts, held.arrived, is_first, duration)
        held.offset = None if held.pts is None else held.pts - now
        if before is not None and now - before > self._longest_still:
            self.notice("gap", f"no frame for {now - before:.1f} s")
        if duration is None and self._source is None and before is not None:
            duration = now - before
        fits = True
        for moment in self._grid.add(now, duration, held):
            fits = self._sample(moment, timeout) and fits
        return fits

    def _sample(self, moment: Moment[_Held], timeout: float | None) -> bool:
        self.count(sampled=1)
        started = time.perf_counter()
        pixels, size = moment.frame.sized(self._session.config.vision.image_size)
        self._note("resize", time.perf_counter() - started)
        held = moment.frame
        sample = Sample(moment.time, moment.index, pixels, held.arrived, size, held.offset)
        return self._inbox.put(sample, timeout)

    def _repaired(self, what: str) -> None:
        self.count(repaired_times=1)
        if not self._is_repaired:
            self._is_repaired = True
            self.notice("timestamps", f"{what}; such times are replaced, and counted from now on")

    def _pushed(self, frame: Any) -> Any:
        if cuda.is_on_device(frame):
            return self._session.device_frame(frame)
        pixels = host_array(frame, "frame", "uint8 (height, width, 3) in RGB order")
        check_frames(pixels, dimensions=(3,), where="frame")
        return pixels.copy()

    # Seeing.

    def _see(self) -> None:
        while (taken := self._inbox.take(LOWER_CHUNK)) is not None:
            if isinstance(taken, Ask):
                self._question(taken.prompt, taken.arrived, is_due=False)
            else:
                self._see_samples(taken)
        if self._stop.is_set():
            return
        if self._error is None and self.plan.every is not None and self._is_new:
            self._question(self.settings.prompt, self._arrived, is_due=True)
        self._desk.finish()

    def _see_samples(self, samples: Sequence[Sample]) -> None:
        waiting: list[Sample] = []
        for sample in samples:
            if self._is_past_due(sample):
                self._run(waiting)
                if self._is_new:
                    self._question(self.settings.prompt, sample.arrived, is_due=True)
            self._set_due(sample)
            self._arrived, self._size, self._offset = sample.arrived, sample.size, sample.offset
            if self._gate is None or self._gate.passes(_host(sample.pixels)):
                waiting.append(sample)
            else:
                self.count(gated=1)
                self._time = sample.time
            if sample.index is not None and sample.index == self._due:
                self._run(waiting)
                self._question(self.settings.prompt, sample.arrived, is_due=True)
                self._set_due(sample, after=True)
        self._run(waiting)

    def _is_past_due(self, sample: Sample) -> bool:
        """Whether the frame with which a question falls due was dropped."""
        return self._due is not None and sample.index is not None and sample.index > self._due

    def _set_due(self, sample: Sample, after: bool = False) -> None:
        every = self.plan.every
        if every is None or sample.index is None or self._due is None:
            return
        if after:
            self._due = (sample.index // every + 1) * every
        elif sample.index > self._due:
            self._due = -(-sample.index // every) * every

    def _run(self, samples: list[Sample]) -> None:
        """Run frames through vision_lower, and empty the list."""
        while samples and not self._stop.is_set():
            is_exact = self.settings.mode == "exact"
            most = len(samples) if is_exact else self._segment_room(samples)
            if most == 0:
                self._hand_over_piece()
                continue
            number = self._store.room(most, _ROOM_SECONDS)
            if _is_device(samples[0].pixels) or self._turns.is_hurried:
                number = min(number, 1)
            if number == 0:
                continue
            part, samples[:] = samples[:number], samples[number:]
            started = time.perf_counter()
            begins = self._time is None if is_exact else not self._window
            frames = self._store.run(
                [sample.time for sample in part],
                [sample.pixels for sample in part],
                [sample.arrived for sample in part],
                [begins and place == 0 for place in range(number)],
            )
            self._note("vision_lower", (time.perf_counter() - started) / number)
            self.count(encoded=number)
            self._window.extend(frames)
            self._time, self._is_new = part[-1].time, True
            if is_exact:
                self._slide()
            elif len(self._window) == self.plan.segment:
                self._hand_over_piece()
        samples.clear()

    def _segment_room(self, samples: Sequence[Sample]) -> int:
        """How many of the next samples belong to the open segment, in number and in time."""
        first = self._window[0].time if self._window else samples[0].time
        end = first + self.plan.segment / self.plan.fps - _SLACK
        in_time = sum(sample.time < end for sample in samples)
        return min(in_time, self.plan.segment - len(self._window))

    def _slide(self) -> None:
        """Let go of the frames that have left the window."""
        gone = []
        while self._window and (
            self._window[0].time <= self._drop_before or len(self._window) > self.plan.window
        ):
            gone.append(self._window.popleft())
        self._store.release(gone)

    @property
    def _drop_before(self) -> float:
        return (self._time or 0.0) - self.plan.window / self.plan.fps + _SLACK

    def _hand_over_piece(self) -> None:
        if self._window:
            frames = list(self._window)
            self._window.clear()
            self._desk.put(Piece(frames, self._drop_before))

    def _question(self, prompt: Conversation, arrived: float, is_due: bool) -> None:
        frames: list[LowerFrame] = []
        if self.settings.mode == "exact":
            self._slide()
            frames = list(self._window)
            self._store.hold(frames)
        else:
            self._hand_over_piece()
        self._is_new = False
        self._desk.put(
            Question(prompt, arrived, frames, self._size, self._offset, self._drop_before, is_due)
        )

    def _skipped(self, question: Question) -> None:
        self._store.release(question.frames)
        self.count(skipped_questions=1)

    # Answering.

    def _answer(self) -> None:
        while (work := self._desk.take()) is not None:
            with self._turns.hurry():
                if isinstance(work, Piece):
                    self._answering.take_piece(work)
                    continue
                answered = self._answering.answer(work, self._go_on, self._since_last)
            if answered is None:
                self.notice("empty", "a question found no frames in its window")
                continue
            answer, pixels = answered
            self._last_answer = answer
            for stage, seconds in answer.timings.items():
                self._note(stage, seconds)
            self._events.put(answer)
            if self._observer is not None:
                frames = np.stack([_host(frame) for frame in pixels])
                self._observer(answer, frames, work.size)
        self._end()

    def _go_on(self, token: int) -> None:
        if self._stop.is_set():
            raise _StoppedError(token)

    def _since_last(self) -> Counters:
        self.count(answers=1)
        now, before = self._counters, self._told
        self._told = now
        return now - before

    def _note(self, stage: str, seconds: float) -> None:
        if self._meter is not None:
            self._meter.stage(stage, seconds)

    # Ending.

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except _StoppedError:
            pass
        except Exception as error:  # reaches whoever reads the events, with its traceback
            if self._stop.is_set():
                _log.info("%s: %s, after the stream was closed", self.name, error)
                return
            self._error = self._error or error
            if run == self._read:
                self._inbox.finish()  # what has come is still answered
            else:
                self._halt()
                self._end()

    def _halt(self) -> None:
        self._stop.set()
        self._inbox.close()
        self._desk.close()
        self._events.close()

    def _end(self) -> None:
        with self._lock:
            if self.is_over:
                return
            self.is_over = True
        self._events.put(LiveEnd(self.name, self._time, self._counters, self._error))

    def _check_question(self, prompt: Conversation) -> None:
        check_question(prompt)
        new = len(self._prompts.conversation_part(prompt))
        own = len(self._prompts.conversation_part(self.settings.prompt))
        if self.settings.mode == "exact":
            self._session.check_window(
                np.arange(self.plan.window) / self.plan.fps,
                self._lowest,
                prompt,
                self.settings.max_new_tokens,
            )
        elif new > own + OTHER_QUESTION:
            raise InputError(
                f"a question of {new} tokens",
                where=self.name,
                allowed=f"up to {own + OTHER_QUESTION}: the cache was laid out for the first one",
                fix="open the stream with the longest question as its prompt",
            )


def merged(
    streams: Sequence[LiveStream], timeout: float | None = None
) -> Iterator[LiveEvent | None]:
    """Yield the events of several streams as they come, until the last of them has ended.

    Args:
        streams: entered ones.
        timeout: yield None when nothing came for so many seconds; None: never.
    """
    queues = [stream._events for stream in streams]
    while not all(queue.is_over for queue in queues):
        event = next_event(queues, timeout)
        if event is not None or timeout is not None:
            yield event


class _Held:
    """A frame of the source whose pixels are made when it is sampled, once."""

    def __init__(self, rgb: Callable[[], Any], arrived: float, pts: float | None) -> None:
        self._rgb = rgb
        self._sized: tuple[Any, tuple[int, int]] | None = None
        self.arrived = arrived
        """By the monotonic clock."""
        self.pts = pts if pts is not None and math.isfinite(pts) else None
        """Seconds on the source's own clock."""
        self.offset: float | None = None
        """That minus the stream time."""

    def sized(self, size: tuple[int, int]) -> tuple[Any, tuple[int, int]]:
        """Pixels at the model's size, and the source's (height, width)."""
        if self._sized is None:
            rgb = self._rgb()
            if _is_device(rgb):
                self._sized = rgb, size
            else:
                self._sized = resize_frames(rgb, size), (rgb.shape[0], rgb.shape[1])
        return self._sized


def _is_device(pixels: Any) -> bool:
    return not isinstance(pixels, np.ndarray)


def _host(pixels: Any) -> NDArray[np.uint8]:
    host: NDArray[np.uint8] = pixels.to_host()[0] if _is_device(pixels) else pixels
    return host


def open_stream(
    view_for: Callable[[str], Session],
    turns: Turns,
    taken: Collection[str],
    name: str | None,
    source: str | Path | Source | None,
    options: SourceOptions | None,
    observer: Observer | None,
    meter: Meter | None,
    settings: Mapping[str, Any],
) -> LiveStream:
    """Open a stream; see `Session.stream`.

    Args:
        view_for: gives a stream's own view of the shared graphs, by its name.
        turns: of these graphs.
        taken: names of other streams.
        name: of the stream, or None.
        source: where frames come from.
        options: how the source is read.
        observer: sees every answer with its frames.
        meter: gets the times of stages.
        settings: fields of `StreamSettings`.
    """
    known = [field.name for field in fields(StreamSettings)]
    for key in settings:
        if key not in known:
            raise InputError(
                f"unknown setting {key!r}{did_you_mean(key, known)}",
                where="stream",
                allowed=", ".join(known),
            )
    if "prompt" not in settings:
        raise InputError("there is no prompt", where="stream", fix='stream(prompt="...")')
    if isinstance(source, (str, Path)):
        source = open_source(source, options or SourceOptions())
    wanted = name or (source.name if source is not None else "pushed")
    unique, number = wanted, 1
    while unique in taken:
        number += 1
        unique = f"{wanted} ({number})"
    return LiveStream(
        view_for(unique), turns, unique, source, StreamSettings(**settings),
        observer=observer, meter=meter,
    )  # fmt: skip
