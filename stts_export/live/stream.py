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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from stts_export.engines import cuda
from stts_export.errors import InputError, did_you_mean
from stts_export.live.answering import (
    Answering,
    ExactAnswering,
    IncrementalAnswering,
    Meter,
    Observer,
)
from stts_export.live.events import (
    Counters,
    LiveAnswer,
    LiveEnd,
    LiveEvent,
    LiveNotice,
    NoticeKind,
)
from stts_export.live.gate import Gate
from stts_export.live.opening import (
    PENDING_PIECES,
    check_question_fits,
    checked_prompts,
    controller_of,
    laid_out_cache,
    laid_out_store,
)
from stts_export.live.queues import Ask, Desk, EventQueue, Inbox, Piece, Question, next_event
from stts_export.live.reading import Incoming, Reading
from stts_export.live.seeing import Seeing, SeeingSegments
from stts_export.live.settings import Policy, StreamSettings, plan
from stts_export.live.sources import open_source
from stts_export.live.sources.base import Source
from stts_export.live.sources.options import SourceOptions
from stts_export.live.turns import Turns
from stts_export.runtime.arguments import host_array
from stts_export.runtime.prompt import Conversation
from stts_export.runtime.resize import check_frames

if TYPE_CHECKING:
    from stts_export.runtime.session import Session

_log = logging.getLogger(__name__)

_MOST_ASKED = 16
"""Questions of callers that may wait."""
_LAST_SECONDS = 10.0
"""That `finish` waits at most for room for the last samples, under the policy "wait" only."""


class _StoppedError(Exception):
    """The stream was closed in the middle of an answer."""


class LiveStream:
    """Frames in, answers out; made by `Session.stream`, used as a context manager.

    `push`, `ask`, `finish`, `close` and iteration may be called from any thread.

    Args:
        session: a view of the shared graphs for this stream alone.
        turns: of these graphs.
        party: whose turns are the stream's.
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
        party: int,
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
        self._party = party
        self._source = source
        self._observer = observer
        self._meter = meter
        prompts = checked_prompts(session, settings)
        controller, self._lowest = controller_of(session, settings, self.plan)
        is_live = source is None or source.is_live
        policy: Policy = settings.policy or ("newest" if is_live else "wait")
        self._stop = threading.Event()
        self._lock, self._pushing = threading.Lock(), threading.Lock()
        self._counters = self._told = Counters()
        self._inbox = Inbox(settings.queue, policy, lambda n: self.count(dropped=n))
        self._desk = Desk(policy, PENDING_PIECES, self._skipped)
        self._events = EventQueue(policy, lambda n: self.count(dropped_events=n))
        self._asked = 0
        """Questions of callers that wait."""
        self._last_answer: LiveAnswer | None = None
        self._error: Exception | None = None
        self.is_over = False
        """Its end is among its events."""
        self._reads: list[threading.Thread] = []
        self._computes: list[threading.Thread] = []
        """Threads that use the graphs."""
        self._reading = Reading(
            self._inbox,
            self,
            meter,
            size=session.config.vision.image_size,
            fps=self.plan.fps,
            is_live=is_live,
            is_pushed=source is None,
        )
        is_exact = settings.mode == "exact"
        cache = None
        if not is_exact:
            cache = laid_out_cache(session, prompts, settings, self.plan, self._lowest)
        check_question_fits(session, settings, self.plan, self._lowest, cache, settings.prompt)
        self._cache = cache
        self._store = laid_out_store(session, settings, self.plan, self._lowest, controller)
        shared = (
            session, turns, party, name, settings, self._store, controller, observer is not None,
        )  # fmt: skip
        self._answering: Answering = (
            ExactAnswering(*shared) if cache is None else IncrementalAnswering(cache, *shared)
        )
        gate = None if settings.gate is None else Gate(settings.gate, self.plan.window)
        self._seeing = (Seeing if is_exact else SeeingSegments)(
            self._inbox, self._desk, self._store, turns, settings.prompt, self.plan, gate,
            self._stop, self, meter,
        )  # fmt: skip

    def __enter__(self) -> LiveStream:
        if self._computes or self.is_over:
            raise InputError("was opened before", where=self.name, fix="open another stream")
        if self._source is not None:
            self._reads = [self._thread("reads", self._read)]
        self._computes = [self._thread("sees", self._see), self._thread("answers", self._answer)]
        for thread in (*self._reads, *self._computes):
            thread.start()
        return self

    def _thread(self, role: str, run: Callable[[], None]) -> threading.Thread:
        # A blocking call into FFmpeg or a back end must not keep the process from ending.
        name = f"{self.name} {role}"
        return threading.Thread(target=self._guarded, args=(run,), name=name, daemon=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        self.wait_for_graphs()

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

        Raises:
            InputError: the stream was not entered: nothing would ever come.
        """
        if not self._computes and not self.is_over:
            raise InputError("does not run", where=self.name, fix="use it in a `with` block")
        return next_event([self._events], timeout)

    @property
    def uses_graphs(self) -> bool:
        """Whether one of its threads may still call a graph."""
        return any(thread.is_alive() for thread in self._computes)

    def wait_for_graphs(self) -> None:
        """Wait until a closed stream's last call of a graph has returned."""
        for thread in self._computes:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join()

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
        return self._seeing.time

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
        returns, unless the frame lies on a GPU: that one must stay as it is until it has left the
        window.

        Args:
            frame: uint8 (height, width, 3) RGB: NumPy, DLPack, or in the memory of a GPU for
                engines, at the model's size.
            pts: seconds on the caller's clock; the wall clock when None.
            duration: seconds on screen, so that its samples need not wait for the next frame.
            timeout: seconds to wait for room at most, under the policy "wait" only.

        Returns:
            False when the frame was sampled and there was no room for it.

        Raises:
            InputError: the stream has a source or takes nothing any more, or this is no frame.
        """
        if self._source is not None:
            raise InputError(
                "frames cannot be pushed", where=self.name, allowed="streams without a source"
            )
        if self._error is not None:
            raise InputError(
                f"has ended: {self._error}", where=self.name, fix="open another stream"
            ) from self._error
        if not self._computes or self._stop.is_set() or self._inbox.is_finished:
            raise InputError(
                "takes no frames",
                where=self.name,
                fix="push within its `with` block, before `finish`",
            )
        if pts is not None and not _is_seconds(pts):
            raise InputError(f"pts is {pts!r}", where=self.name, allowed="finite seconds, or None")
        if duration is not None and not (_is_seconds(duration) and duration > 0):
            raise InputError(
                f"duration is {duration!r}", where=self.name, allowed="seconds above 0, or None"
            )
        pixels = self._pushed(frame)
        now = time.monotonic()
        incoming = Incoming(lambda: pixels, now, now if pts is None else float(pts))
        with self._pushing:
            return self._reading.add(incoming, duration, timeout=timeout)

    def ask(self, prompt: Conversation | None = None) -> None:
        """Ask about the newest frames now; the answer comes as an event.

        Args:
            prompt: the question; the stream's own when None.

        Raises:
            InputError: it is no text, or too long, or the stream takes nothing any more.
        """
        if prompt is not None:
            check_question_fits(
                self._session, self.settings, self.plan, self._lowest, self._cache, prompt
            )
        asked = self.settings.prompt if prompt is None else prompt
        with self._lock:
            is_full = self._asked >= _MOST_ASKED and not self._inbox.is_finished
            self._asked += not is_full
        if is_full:
            raise InputError(
                f"{_MOST_ASKED} questions wait already", where=self.name, fix="read the answers"
            )
        if not self._computes or not self._inbox.ask(Ask(asked, time.monotonic())):
            raise InputError(
                "takes no questions",
                where=self.name,
                fix="ask within its `with` block, before `finish`",
            )

    def finish(self) -> None:
        """Take no more frames, of a source either: what is there is answered, then it ends."""
        if self._source is None and self._computes and not self._inbox.is_finished:
            with self._pushing:
                self._reading.finish(_LAST_SECONDS)
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
        threads = [*self._reads, *self._computes]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        self._end()
        done = not any(thread.is_alive() for thread in threads)
        if done:
            self._turns.leave(self._party)
        return done

    def _pushed(self, frame: Any) -> Any:
        """Pixels that are the stream's own, or lie on the GPU."""
        if cuda.is_on_device(frame):
            return self._session.device_frame(frame)
        pixels = host_array(frame, "frame", "uint8 (height, width, 3) in RGB order")
        check_frames(pixels, dimensions=(3,), where="frame")
        return pixels.copy()

    # What sources report.

    def notice(self, kind: NoticeKind, message: str) -> None:
        """Pass on what happened."""
        self._events.put(LiveNotice(self.name, kind, message, self.time))

    def count(self, **counts: int) -> None:
        """Add to the counters."""
        with self._lock:
            self._counters = self._counters.plus(**counts)

    # What the threads run.

    def _read(self) -> None:
        assert self._source is not None
        for arrival in self._source.arrivals(self._stop, self):
            if self._stop.is_set() or self._inbox.is_finished:
                return
            incoming = Incoming(arrival.rgb, time.monotonic(), arrival.pts)
            self._reading.add(incoming, arrival.duration, is_first=arrival.is_first)
        self._reading.finish()
        self._inbox.finish()

    def _see(self) -> None:
        self._seeing.run()
        if self._error is None and not self._stop.is_set():
            self._seeing.ask_at_the_end()
        self._desk.finish()

    def _answer(self) -> None:
        while (work := self._desk.take()) is not None:
            with self._turns.hurry():
                if isinstance(work, Piece):
                    self._note(self._answering.take_piece(work))
                    continue
                answered = self._answering.answer(work, self._go_on, self._since_last)
            if not work.is_due:
                with self._lock:
                    self._asked -= 1
            if answered is None:
                self.notice("empty", "a question found no frames in its window")
                continue
            answer, pixels = answered
            self._last_answer = answer
            self._note(answer.timings)
            self._events.put(answer)
            if self._observer is not None:
                frames = np.stack([self._store.on_host(frame) for frame in pixels])
                self._observer(answer, frames, work.size)
        self._end()

    def _skipped(self, question: Question) -> None:
        self._store.release(question.frames)
        self.count(skipped_questions=1)

    def _go_on(self, token: int) -> None:
        if self._stop.is_set():
            raise _StoppedError(token)

    def _since_last(self) -> Counters:
        self.count(answers=1)
        now, before = self._counters, self._told
        self._told = now
        return now - before

    def _note(self, timings: Mapping[str, float]) -> None:
        if self._meter is not None:
            for stage, seconds in timings.items():
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
            if threading.current_thread() in self._reads:
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
        self._events.put(LiveEnd(self.name, self.time, self._counters, self._error))


def _is_seconds(value: object) -> bool:
    return isinstance(value, (int, float, np.floating, np.integer)) and math.isfinite(value)


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


def open_stream(
    view_for: Callable[[int], Session],
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
        view_for: gives a party's own view of the shared graphs.
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
    opened: Source | None = None
    if source is not None:
        given: Any = source
        is_open = hasattr(given, "arrivals")
        opened = given if is_open else open_source(given, options or SourceOptions())
    wanted = name or (opened.name if opened is not None else "pushed")
    unique, number = wanted, 1
    while unique in taken:
        number += 1
        unique = f"{wanted} ({number})"
    party = turns.join()
    return LiveStream(
        view_for(party), turns, party, unique, opened, StreamSettings(**settings),
        observer=observer, meter=meter,
    )  # fmt: skip
