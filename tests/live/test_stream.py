"""Streams of pushed frames: answers, windows, times, ends."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.live.events import Counters, LiveAnswer, LiveEnd, LiveEvent, LiveNotice
from stts_export.live.sources.base import Arrival, Reporter
from stts_export.live.turns import SharedRunner, Turns
from stts_export.runtime.resize import resize_frames
from stts_export.runtime.video import play
from stts_export.tensors import VISION_UPPER_FRAMES
from tests.helpers import random_frames, write_video

QUESTION = "How many objects are there?"


def _watch(session: Session, frames: Any, **settings: Any) -> list[LiveEvent]:
    """Push frames half a second apart and take all events."""
    settings = {"prompt": QUESTION, "max_new_tokens": 4, "policy": "wait", **settings}
    with session.stream(**settings) as live:
        for number, frame in enumerate(frames):
            assert live.push(frame, number / 2, timeout=60)
        live.finish()
        return list(live)


def _answers(events: list[LiveEvent]) -> list[LiveAnswer]:
    return [event for event in events if isinstance(event, LiveAnswer)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.9])
def test_exact_answers_equal_those_of_generate(text_bundle: Path, ratio: float):
    frames = random_frames(13, (48, 48), seed=5)
    with Session.open(text_bundle, threads=1) as session:
        events = _watch(session, frames, every="2s", window="3s", prune_ratio=ratio)
        answers = _answers(events)
        assert [answer.end for answer in answers] == [2.0, 4.0, 6.0]
        assert [answer.frames for answer in answers] == [5, 6, 6]
        for answer in answers:
            first = round(2 * answer.start)
            window = frames[first : first + answer.frames]
            np.testing.assert_array_equal(answer.prompt_times, np.arange(answer.frames) / 2)
            clip = session.encode(window, ratio, answer.prompt_times)
            np.testing.assert_array_equal(answer.keep, clip.keep)
            expected = session.generate(clip, QUESTION, 4)
            assert answer.token_ids == expected.token_ids
            assert answer.text == expected.text
    assert isinstance(events[-1], LiveEnd)
    assert events[-1].error is None
    assert events[-1].counters.encoded == 13


def test_incremental_answers_are_about_the_segments_in_the_window(text_bundle: Path):
    """Segments of two frames go when two more have come; what is open is a clip of its own."""
    frames = random_frames(21, (48, 48), seed=6)
    with Session.open(text_bundle, threads=1) as session:
        events = _watch(
            session, frames, mode="incremental", every="2s", window="4s", segment="1s",
            prune_ratio=0.5,
        )  # fmt: skip
        answers = _answers(events)
        assert [answer.end for answer in answers] == [2.0, 4.0, 6.0, 8.0, 10.0]
        # With frame 4 there are 0-1 for good and 2-4 open; with frame 8 also 2-3 and 4-5.
        assert [answer.start for answer in answers] == [0.0, 1.0, 3.0, 5.0, 7.0]
        for answer in answers:
            first, end = round(2 * answer.start), round(2 * answer.end) + 1
            cuts = [*range(first, end - 2, 2), end]
            for start, stop in itertools.pairwise(cuts):
                clip = session.encode(frames[start:stop], 0.5)
                np.testing.assert_array_equal(answer.keep[start - first : stop - first], clip.keep)
            assert answer.kept_windows == answer.keep.sum()
    assert isinstance(events[-1], LiveEnd)
    assert events[-1].error is None


def test_one_segment_equals_the_exact_answer(text_bundle: Path):
    frames = random_frames(5, (48, 48), seed=7)
    with Session.open(text_bundle, threads=1) as session:
        settings: dict[str, Any] = {"every": "2s", "window": "4s"}
        exact = _answers(_watch(session, frames, **settings))
        incremental = _answers(_watch(session, frames, mode="incremental", **settings))
        assert len(exact) == len(incremental) == 1
        np.testing.assert_array_equal(exact[0].keep, incremental[0].keep)
        assert exact[0].token_ids == incremental[0].token_ids


@pytest.fixture(scope="module")
def session(text_bundle: Path) -> Iterator[Session]:
    with Session.open(text_bundle, threads=1) as session:
        yield session


FRAMES = random_frames(40, (48, 48), seed=8)


def test_a_stream_of_one_frame_is_answered_at_its_end(session: Session):
    events = _watch(session, FRAMES[:1])
    (answer,) = _answers(events)
    assert (answer.start, answer.end, answer.frames) == (0.0, 0.0, 1)
    assert answer.since_last.encoded == 1
    assert answer.latency >= answer.first_token > 0


def test_a_stream_without_frames_just_ends(session: Session):
    (end,) = _watch(session, [])
    assert isinstance(end, LiveEnd)
    assert (end.time, end.counters) == (None, Counters())


def test_times_are_the_callers_too(session: Session):
    with session.stream(prompt=QUESTION, every="1s", policy="wait", max_new_tokens=1) as live:
        for number in range(5):
            live.push(FRAMES[number], 1000.25 + number / 2, timeout=60)
        live.finish()
        answers = _answers(list(live))
    assert [answer.end for answer in answers] == [1.0, 2.0]
    assert [answer.source_end for answer in answers] == [1001.25, 1002.25]
    assert abs(answers[-1].asked_at - time.time()) < 60


def test_frames_of_any_size_and_more_often_than_the_grid(session: Session):
    """25 frames a second: every 12th or 13th is sampled, at the size of the model."""
    big = random_frames(51, (97, 130), seed=3)
    with session.stream(prompt=QUESTION, every="1s", policy="wait", max_new_tokens=1) as live:
        for number, frame in enumerate(big):
            live.push(frame, number / 25, timeout=60)
            frame[:] = 0  # the memory is the caller's again
        live.finish()
        answers = _answers(list(live))
        assert live.counters.decoded == 51
        assert live.counters.sampled == live.counters.encoded == 5
    expected = resize_frames(random_frames(51, (97, 130), seed=3)[[0, 12, 25, 37, 50]], (48, 48))
    clip = session.encode(expected, 0.5, np.arange(5) / 2)
    np.testing.assert_array_equal(answers[-1].keep, clip.keep)


def test_questions_may_be_asked_at_any_time(session: Session):
    with session.stream(prompt=QUESTION, every=None, window="4s", policy="wait") as live:
        live.ask()
        first = live.get(timeout=60)
        assert isinstance(first, LiveNotice)
        assert first.kind == "empty"
        for number in range(3):
            live.push(FRAMES[number], number / 2, timeout=60)
        live.ask("Which colour is the circle?")
        answer = live.get(timeout=60)
        assert isinstance(answer, LiveAnswer)
        assert answer.question == "Which colour is the circle?"
        assert answer.frames <= 3
        live.finish()
        assert [type(event) for event in live] == [LiveEnd]


@pytest.mark.parametrize("mode", ["exact", "incremental"])
def test_a_slow_model_drops_the_oldest_and_counts_them(session: Session, mode: Any):
    """Frames come faster than answers: memory stays, the newest are answered, all are counted."""
    frames = random_frames(400, (48, 48), seed=9)
    settings: dict[str, Any] = {"every": "1s", "window": "3s", "queue": 2, "mode": mode}
    if mode == "incremental":
        settings["segment"] = "1s"
    with session.stream(prompt=QUESTION, policy="newest", **settings) as live:
        for number, frame in enumerate(frames):
            live.push(frame, number / 2)
        live.finish()
        events = list(live)
    end = events[-1]
    assert isinstance(end, LiveEnd)
    counted = end.counters
    assert counted.decoded == counted.sampled == 400
    assert counted.encoded + counted.dropped == 400
    assert counted.dropped > 0
    answers = _answers(events)
    assert answers[-1].end == end.time
    assert counted.answers == len(answers)
    assert sum(answer.since_last.dropped for answer in answers) == counted.dropped


def test_a_file_as_source_loses_nothing(session: Session, tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", frames=40)
    with session.stream(path, prompt=QUESTION, every="1s", window="4s", max_new_tokens=4) as live:
        assert live.name == str(path)
        events = list(live)
    answers = _answers(events)
    assert [answer.end for answer in answers] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert all(answer.since_last.dropped == 0 for answer in answers)
    with session.stream(path, prompt=QUESTION, every=None, window="4s") as live:
        assert _answers(list(live)) == []


def test_a_whole_file_in_a_window_is_what_run_answers(session: Session, tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", frames=27)
    expected = session.generate(path, QUESTION, 4)
    with session.stream(path, prompt=QUESTION, every="4s", window="4s", max_new_tokens=4) as live:
        (answer,) = _answers(list(live))
    assert answer.frames == expected.frames == 8
    assert answer.token_ids == expected.token_ids
    assert answer.kept_windows == expected.kept_windows


class _Odd:
    """A source with frames of changing size, broken times and a break."""

    name, is_live = "odd", False

    def arrivals(self, stop: threading.Event, report: Reporter) -> Iterator[Arrival]:
        times = [5.0, 5.5, None, 6.5, 6.4, math.nan, 99_999.0, 99_999.5, 0.0, 0.5]
        for number, pts in enumerate(times):
            size = (48, 48) if number < 4 else (90, 30)
            picture = random_frames(1, size, seed=number)[0]
            yield Arrival(pts, None, number == 0, functools.partial(np.asarray, picture))


def test_broken_times_and_changing_sizes_do_not_stop_a_stream(session: Session):
    with session.stream(_Odd(), prompt=QUESTION, every="1s", window="4s", gate=1) as live:
        events = list(live)
    answers = _answers(events)
    ends = [answer.end for answer in answers]
    assert ends == sorted(set(ends))
    assert all((np.diff(answer.timestamps) > 0).all() for answer in answers)
    end = events[-1]
    assert isinstance(end, LiveEnd)
    assert end.error is None
    assert end.counters.decoded == 10
    assert end.counters.repaired_times == 5
    notices = [event for event in events if isinstance(event, LiveNotice)]
    assert [notice.kind for notice in notices] == ["timestamps"]


def test_segments_end_in_time_where_samples_are_missing(session: Session):
    """A segment that gaps stretch over the window would leave it as a whole."""
    changes = {0, 3, 6, 9, 10, 13}
    frames, shown = [], FRAMES[0]
    for number in range(17):
        shown = FRAMES[number] if number in changes else shown
        frames.append(shown)
    events = _watch(
        session, frames, mode="incremental", window="2s", segment="2s", every="4s", gate=1.0
    )
    got = [answer.timestamps.tolist() for answer in _answers(events)]
    assert got == [[3.0], [6.5]]
    assert [type(event) for event in events] == [LiveAnswer, LiveAnswer, LiveEnd]


def test_a_gate_leaves_out_what_is_the_same_and_counts_it(session: Session):
    still = np.repeat(FRAMES[:1], 20, axis=0)
    still[12:, :10, :10] ^= 255
    events = _watch(session, still, every="2s", window="4s", gate=8.0)
    answers = _answers(events)
    assert [answer.end for answer in answers] == [0.0, 4.0, 6.0, 6.0]
    assert [answer.frames for answer in answers] == [1, 1, 2, 1]
    end = events[-1]
    assert isinstance(end, LiveEnd)
    counted = end.counters
    assert counted.sampled == counted.gated + counted.encoded == 20
    assert counted.encoded == 3


def test_nobody_reads_the_events(session: Session):
    """They are bounded; the newest, and the end, are there in the end."""
    with session.stream(prompt=QUESTION, every="500ms", window="1s", max_new_tokens=1) as live:
        for number in range(600):
            while live.queue_depth > 4:
                time.sleep(0.001)
            live.push(FRAMES[number % 40], number / 2)
        live.finish()
        while not live.is_over:
            time.sleep(0.001)
        events = list(live)
    end = events[-1]
    assert isinstance(end, LiveEnd)
    assert len(events) <= 257
    assert end.counters.answers == len(_answers(events)) + live.counters.dropped_events
    assert _answers(events)[-1].end == 299.5


def test_the_ratio_follows_the_budget(text_bundle: Path):
    """The upper part is made slow: answers are late at first, then the ratio is raised."""
    with Session.open(text_bundle, threads=1) as session:
        upper = session.runners[VISION_UPPER_FRAMES]

        class Slow(SharedRunner):
            def __call__(self, inputs: Any, in_place: Any = None) -> Any:
                bins = inputs["bins"]
                time.sleep(0.002 * bins.shape[0] * bins.shape[1] / 9)  # 2 ms a window
                return super().__call__(inputs, in_place)

        session.runners[VISION_UPPER_FRAMES] = Slow(upper, Turns(), 0)
        frames = random_frames(24, (48, 48), seed=4)
        # 8 frames of 16 windows take 256 ms unpruned.
        events = _watch(session, frames, every="1s", window="4s", latency="120ms", max_new_tokens=1)
    answers = _answers(events)
    assert answers[0].prune_ratio == 0.5
    assert answers[0].predicted_latency is None
    assert answers[-1].prune_ratio > 0.5
    assert answers[-1].kept_windows < answers[-1].total_windows / 2
    assert any(answer.ratio_reason.startswith("raised") for answer in answers)
    assert all("budget 0.12 s" in answer.ratio_reason for answer in answers[1:])


def _shown(session: Session, times: list[float], **settings: Any) -> list[tuple[float, int]]:
    """Time and number of the frame that each sample shows; frames are as bright as their number."""
    seen: dict[float, int] = {}

    def look(answer: LiveAnswer, frames: Any, _: object) -> None:
        for place, moment in enumerate(answer.timestamps.tolist()):
            seen[moment] = int(frames[place].mean().round())

    with session.stream(
        prompt=QUESTION, every="500ms", window="500ms", policy="wait", observer=look,
        max_new_tokens=1, **settings,
    ) as live:  # fmt: skip
        for number, moment in enumerate(times):
            frame = np.full((48, 48, 3), number, np.uint8)
            assert live.push(frame, moment, timeout=60)
        live.finish()
        list(live)
    return sorted(seen.items())


def test_pushed_frames_are_sampled_as_what_was_on_screen(session: Session):
    """With jitter, and over a gap in which the newest frame stays for two seconds."""
    rng = np.random.default_rng(0)
    times = (np.arange(60) / 10 + rng.uniform(-0.03, 0.03, 60)).tolist()
    times += [moment + 10.0 for moment in times]
    start = times[0]
    shown = _shown(session, times)
    assert len(shown) > 15
    for moment, number in shown:
        on_screen = np.searchsorted(np.array(times) - start, moment + 1e-9, side="right") - 1
        assert number == on_screen
        assert moment - (times[number] - start) <= 2.0


def test_a_push_waits_no_longer_than_told_for_all_its_samples(session: Session):
    gate = threading.Event()

    def block(*_: object) -> None:
        gate.wait(60)

    with session.stream(
        prompt=QUESTION, every="500ms", policy="wait", queue=1, observer=block
    ) as live:
        started = time.monotonic()
        for number in range(60):
            live.push(FRAMES[0], number / 2, timeout=60 if number < 2 else 0.0)
        assert not live.push(FRAMES[1], 33.0, timeout=0.3)  # many samples, no room
        assert time.monotonic() - started < 30
        gate.set()
        live.finish()
        list(live)


def test_asking_in_between_does_not_replace_the_standing_question(session: Session):
    with session.stream(prompt=QUESTION, every="10s", window="4s", policy="wait") as live:
        for number in range(6):
            live.push(FRAMES[number], number / 2, timeout=60)
        live.ask("Which colour is the circle?")
        live.finish()
        answers = _answers(list(live))
    assert [answer.question for answer in answers] == ["Which colour is the circle?", QUESTION]
    assert [answer.end for answer in answers] == [2.5, 2.5]


def test_a_gate_moves_the_window_on(session: Session):
    """Samples that stay out move the time of the window, frames behind them do not move it back."""
    frames = np.repeat(FRAMES[:1], 7, axis=0)
    frames[3] ^= 255
    frames[4:] = frames[3]
    with session.stream(prompt=QUESTION, every="3s", window="2s", policy="wait", gate=8) as live:
        for number, frame in enumerate(frames):
            live.push(frame, number / 2, timeout=60)
        live.finish()
        answers = _answers(list(live))
    assert [answer.timestamps.tolist() for answer in answers] == [[1.5]]


def test_a_slow_camera_is_no_latency_of_ours(session: Session):
    """One frame a second says nothing about how long it stays: a sample is known with the next."""
    frames = [np.full((48, 48, 3), number, np.uint8) for number in range(4)]
    with session.stream(prompt=QUESTION, every="500ms", max_new_tokens=1) as live:
        for number, frame in enumerate(frames):
            live.push(frame, float(number))
            time.sleep(1.0)  # what would be counted if the frame's arrival were
        live.finish()
        answers = _answers(list(live))
    assert len(answers) >= 4
    assert all(answer.latency < 0.9 for answer in answers)


@pytest.mark.parametrize("mode", ["exact", "incremental"])
def test_pushed_frames_of_a_file_give_the_files_answers(
    session: Session, tmp_path: Path, mode: Any
):
    path = write_video(tmp_path / "clip.mp4", frames=27)
    settings: dict[str, Any] = {"prompt": QUESTION, "every": "1s", "window": "4s", "mode": mode}
    with session.stream(path, max_new_tokens=4, **settings) as read:
        expected = _answers(list(read))
    with session.stream(policy="wait", max_new_tokens=4, **settings) as pushed:
        for moment, frame in play(path)[1]:
            assert pushed.push(frame, moment, duration=1 / 8, timeout=60)
        pushed.finish()
        got = _answers(list(pushed))
    assert len(got) == len(expected) == 4
    for here, there in zip(got, expected, strict=True):
        np.testing.assert_array_equal(here.timestamps, there.timestamps)
        assert here.token_ids == there.token_ids


@pytest.mark.parametrize("mode", ["exact", "incremental"])
def test_it_does_not_matter_how_many_frames_are_run_together(session: Session, mode: Any):
    settings: dict[str, Any] = {"every": "4s", "window": "3s", "queue": 40, "mode": mode}
    if mode == "incremental":
        settings["segment"] = "1s"
    expected = []
    with session.stream(prompt=QUESTION, policy="wait", **settings) as live:
        for number in range(17):
            live.push(FRAMES[number], number / 2, timeout=60)
            while live.queue_depth:
                time.sleep(0.001)
        live.finish()
        expected = _answers(list(live))
    with session.stream(prompt=QUESTION, policy="wait", **settings) as live:
        with session._turns.take(session._turns.join()):  # frames wait for theirs
            for number in range(17):
                live.push(FRAMES[number], number / 2, timeout=60)
        live.finish()
        got = _answers(list(live))
    assert len(got) == len(expected) == 2
    for here, there in zip(got, expected, strict=True):
        np.testing.assert_array_equal(here.timestamps, there.timestamps)
        np.testing.assert_array_equal(here.keep, there.keep)
        assert here.token_ids == there.token_ids
