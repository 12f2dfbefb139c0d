"""From frames that have been through `vision_lower` to answers, in the two modes.

Axes: T frames of a window or segment, W windows of a frame, K kept windows, C decoder width.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stts_export.live.controller import Choice, Controller
from stts_export.live.events import Counters, LiveAnswer
from stts_export.live.frames import FrameStore, LowerFrame
from stts_export.live.queues import Piece, Question
from stts_export.live.segments import SegmentCache
from stts_export.live.settings import StreamSettings
from stts_export.live.turns import Turns
from stts_export.runtime import vision
from stts_export.runtime.decoder import OnToken
from stts_export.runtime.visuals import EncodedClip

if TYPE_CHECKING:
    from stts_export.runtime.session import Session

Observer = Callable[[LiveAnswer, NDArray[np.uint8], tuple[int, int]], None]
"""Called in the answering thread with an answer, its frames, uint8 (T, height, width, 3) at the
model's size, and (height, width) of the source's frames."""


class Meter(Protocol):
    """Where times go."""

    def stage(self, name: str, seconds: float) -> None:
        """Note how long a stage took."""


@dataclass(frozen=True)
class Seen:
    """The vision side of some frames."""

    times: NDArray[np.float64]
    """(T,) of the stream."""
    keep: NDArray[np.bool_]
    """(T, W)."""
    ratio: float
    note: str | None
    """Why nothing was removed, or None when something was."""
    choice: Choice
    pixels: list[Any]
    """Of each frame; empty when nobody looks at them."""


@dataclass(frozen=True)
class Told:
    """What the decoder made of a question."""

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]
    """Seconds per stage."""
    growing: float
    """What of the time grows with the windows that were kept for this question, in seconds."""


class Answering(ABC):
    """What both modes share; all of it runs in one thread.

    Args:
        session: the stream's own view of the shared graphs.
        turns: of these graphs.
        party: whose turns are the stream's.
        name: of the stream.
        settings: what was asked for.
        store: the frames.
        controller: chooses ratios.
        keep_pixels: somebody looks at the frames of answers.
    """

    def __init__(
        self,
        session: Session,
        turns: Turns,
        party: int,
        name: str,
        settings: StreamSettings,
        store: FrameStore,
        controller: Controller,
        keep_pixels: bool,
    ) -> None:
        self._session = session
        self._turns = turns
        self._party = party
        self._name = name
        self._settings = settings
        self._store = store
        self._controller = controller
        self._keep_pixels = keep_pixels

    @abstractmethod
    def take_piece(self, piece: Piece) -> Mapping[str, float]:
        """Encode a piece of the stream for good; return seconds per stage."""

    @abstractmethod
    def _printed(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        """Times of a prompt about frames of these times."""

    @abstractmethod
    def _earlier(self, question: Question) -> Sequence[Seen]:
        """What the question is about beside its own frames, oldest first."""

    @abstractmethod
    def _tell(
        self, question: Question, seen: Seen | None, clip: EncodedClip | None, on_token: OnToken
    ) -> Told:
        """Ask the decoder about earlier frames and the question's own, if it has any."""

    def answer(
        self, question: Question, on_token: OnToken, since_last: Callable[[], Counters]
    ) -> tuple[LiveAnswer, list[Any]] | None:
        """Answer a question.

        Args:
            question: what was asked.
            on_token: called with every token; may raise to give up.
            since_last: what became of frames since the answer before.

        Returns:
            The answer and its frames; None when there are no frames.
        """
        waited = time.monotonic() - question.arrived
        parts = list(self._earlier(question))
        own: Seen | None = None
        clip: EncodedClip | None = None
        if question.frames:
            windows = len(question.frames) * self._session.config.vision.windows
            own, clip = self._encode(question.frames, self._controller.choose(windows))
            parts.append(own)
        if not parts:
            return None
        first: list[float] = []

        def note(token: int) -> None:
            first.append(time.monotonic())
            on_token(token)

        told = self._tell(question, own, clip, note)
        now = time.monotonic()
        latency = now - question.arrived
        seeing = {} if clip is None else clip.timings
        if clip is not None:
            growing = seeing["vision_upper"] + told.growing
            self._controller.measured(clip.kept_windows, growing, latency - growing)
        newest = parts[-1]
        keep = np.concatenate([part.keep for part in parts])
        times = np.concatenate([part.times for part in parts])
        answer = LiveAnswer(
            stream=self._name,
            question=question.prompt,
            text=told.text,
            token_ids=told.token_ids,
            finish_reason=told.finish_reason,
            start=float(times[0]),
            end=float(times[-1]),
            source_end=None if question.offset is None else float(times[-1]) + question.offset,
            asked_at=time.time() - latency,
            frames=len(times),
            kept_windows=int(keep.sum()),
            total_windows=keep.size,
            prune_ratio=newest.ratio,
            ratio_reason=newest.choice.reason,
            predicted_latency=newest.choice.predicted,
            latency=latency,
            first_token=(first[0] if first else now) - question.arrived,
            since_last=since_last(),
            timings={"waited": waited, **seeing, **told.timings},
            note=newest.note,
            timestamps=times,
            prompt_times=self._printed(times),
            keep=keep,
        )
        return answer, [pixels for part in parts for pixels in part.pixels]

    def _encode(self, frames: Sequence[LowerFrame], choice: Choice) -> tuple[Seen, EncodedClip]:
        """Select from frames, as a clip, and run the upper part; releases them."""
        ratio, count, note = self._session.removal(len(frames), choice.ratio)
        restart = len(frames) if count == 0 else 1
        if frames[0].is_fresh and (count > 0 or all(frame.is_fresh for frame in frames)):
            restart = 0
        started = time.monotonic()
        hidden, scores = self._store.as_clip(frames, restart=restart)
        self._store.release(frames)
        gathered = time.monotonic() - started
        runners = self._session.vision_runners()
        # What the plugin selects stays in its own memory only until it runs again.
        whole = self._turns.take(self._party) if runners.select_pack else nullcontext()
        with whole:
            out = vision.finish(runners, self._session.config.vision, hidden, scores, count)
        times = np.array([frame.time for frame in frames])
        timings = {"first_frame": gathered, **out.timings}
        clip = EncodedClip(
            out.scores, out.keep, out.features, times - times[0], ratio, note, timings
        )
        pixels = [frame.pixels for frame in frames] if self._keep_pixels else []
        return Seen(times, out.keep, ratio, note, choice, pixels), clip


class ExactAnswering(Answering):
    """A question's window is one clip: what `Session.generate` says about its frames."""

    def take_piece(self, piece: Piece) -> Mapping[str, float]:
        """There are no pieces in this mode."""
        raise AssertionError(piece)

    def _printed(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        printed: NDArray[np.float64] = times - times[0]
        return printed

    def _earlier(self, question: Question) -> Sequence[Seen]:
        return ()

    def _tell(
        self, question: Question, seen: Seen | None, clip: EncodedClip | None, on_token: OnToken
    ) -> Told:
        assert clip is not None
        answer = self._session.generate(
            clip,
            question.prompt,
            self._settings.max_new_tokens,
            sampling=self._settings.sampling,
            stop=self._settings.stop,
            on_token=on_token,
        )
        timings = {name: answer.timings[name] for name in ("prefill", "decode")}
        text = answer.text or ""
        return Told(text, answer.token_ids, answer.finish_reason, timings, timings["prefill"])


class IncrementalAnswering(Answering):
    """Older frames are in the KV cache before a question comes; its own are put there for it.

    Args:
        cache: of the stream.
        shared: as for `Answering`.
    """

    def __init__(self, cache: SegmentCache, *shared: Any) -> None:
        super().__init__(*shared)
        self._cache = cache
        self._parts: deque[Seen] = deque()
        """Parallel to the segments of the cache."""

    def take_piece(self, piece: Piece) -> Mapping[str, float]:
        """Encode a piece and put it into the cache for good."""
        seen, clip = self._encode(piece.frames, self._controller.current)
        self._drop(piece.drop_before)
        started = time.monotonic()
        self._cache.append(seen.times, seen.keep, clip.features)
        self._parts.append(seen)
        return {**clip.timings, "segment": time.monotonic() - started}

    def _drop(self, before: float) -> None:
        self._cache.drop_before(before)
        while len(self._parts) > len(self._cache.segments):
            self._parts.popleft()

    def _printed(self, times: NDArray[np.float64]) -> NDArray[np.float64]:
        return times

    def _earlier(self, question: Question) -> Sequence[Seen]:
        self._drop(question.drop_before)
        return self._parts

    def _tell(
        self, question: Question, seen: Seen | None, clip: EncodedClip | None, on_token: OnToken
    ) -> Told:
        session, settings = self._session, self._settings
        prompts = session.prompts
        assert prompts is not None
        text = session.answer_text(settings.stop)
        started = time.monotonic()
        if seen is not None and clip is not None:
            self._cache.append(seen.times, seen.keep, clip.features)
        appended = time.monotonic() - started
        try:
            out = self._cache.ask(
                prompts.conversation_part(question.prompt),
                max_new_tokens=settings.max_new_tokens,
                eos_ids=session.eos_token_ids,
                sampling=settings.sampling,
                text=text,
                on_token=on_token,
            )
        finally:
            if seen is not None:
                self._cache.take_back()
        timings = {
            "segment": appended, "prefill": out.prefill_seconds, "decode": out.decode_seconds
        }  # fmt: skip
        said = text.text if text else ""
        return Told(said, out.token_ids, out.finish_reason, timings, appended)
