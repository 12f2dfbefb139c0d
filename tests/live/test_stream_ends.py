"""How streams end, and what they refuse."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.errors import InputError
from stts_export.live.events import LiveAnswer, LiveEnd, LiveEvent
from stts_export.live.stream import LiveStream, merged
from tests.helpers import random_frames, write_video
from tests.live.helpers import ListSource

QUESTION = "How many objects are there?"
FRAMES = random_frames(9, (48, 48), seed=2)
FAST: dict[str, Any] = {"prompt": QUESTION, "every": "1s", "window": "3s", "max_new_tokens": 2}


@pytest.fixture(scope="module")
def session(text_bundle: Path) -> Iterator[Session]:
    with Session.open(text_bundle, threads=1) as session:
        yield session


def test_a_source_that_fails_is_answered_up_to_there_and_others_go_on(session: Session):
    lost = InputError("the camera is gone", where="cam", fix="plug it in")
    seen: dict[str, list[LiveEvent]] = {"bad": [], "good": []}
    with (
        session.stream(ListSource(FRAMES[:4], error=lost), name="bad", **FAST) as bad,
        session.stream(ListSource(FRAMES), name="good", **FAST) as good,
    ):
        for event in merged([bad, good]):
            assert event is not None
            seen[event.stream].append(event)
    end = seen["bad"][-1]
    assert isinstance(end, LiveEnd)
    assert end.error is lost
    assert end.values()["error"] == "cam: the camera is gone\n  fix: plug it in"
    assert [e.end for e in seen["bad"] if isinstance(e, LiveAnswer)] == [1.0]
    answers = [e for e in seen["good"] if isinstance(e, LiveAnswer)]
    assert [a.end for a in answers] == [1.0, 2.0, 3.0, 4.0, 4.5]
    last = seen["good"][-1]
    assert isinstance(last, LiveEnd)
    assert last.error is None


def test_iterating_over_one_stream_raises_what_ended_it(session: Session):
    lost = InputError("the camera is gone", where="cam")
    events: list[LiveEvent] = []
    with session.stream(ListSource(FRAMES[:1], error=lost), **FAST) as live:
        with pytest.raises(InputError, match="the camera is gone"):
            events.extend(iter(live))
        assert live.get(timeout=1) is None


def test_a_bug_of_ours_keeps_its_type(session: Session):
    with (
        session.stream(ListSource(FRAMES, error=ZeroDivisionError("oops")), **FAST) as live,
        pytest.raises(ZeroDivisionError, match="oops"),
    ):
        list(live)


def test_an_observer_that_fails_ends_the_stream(session: Session):
    def broken(*_: object) -> None:
        raise OSError("disk full")

    with (
        session.stream(ListSource(FRAMES), observer=broken, **FAST) as live,
        pytest.raises(OSError, match="disk full"),
    ):
        list(live)


def test_observers_and_meters_see_everything(session: Session):
    seen: list[tuple[LiveAnswer, Any, tuple[int, int]]] = []

    class Meter:
        def __init__(self) -> None:
            self.stages: dict[str, list[float]] = {}

        def stage(self, name: str, seconds: float) -> None:
            self.stages.setdefault(name, []).append(seconds)

    for mode in ("exact", "incremental"):
        seen.clear()
        big = random_frames(6, (60, 90), seed=3)
        meter = Meter()
        with session.stream(
            ListSource(big), mode=mode, meter=meter, **FAST,
            observer=lambda *what: seen.append(what),
        ) as live:  # fmt: skip
            answers = [event for event in live if isinstance(event, LiveAnswer)]
        assert [answer for answer, _, _ in seen] == answers
        for answer, frames, size in seen:
            assert frames.shape == (answer.frames, 48, 48, 3)
            assert frames.dtype == np.uint8
            assert size == (60, 90)
        expected = {"resize", "vision_lower", "waited", "select", "vision_upper", "prefill"}
        assert expected <= set(meter.stages)
        assert all(value >= 0 for values in meter.stages.values() for value in values)


def test_closing_ends_at_once_and_says_so(session: Session):
    gate = threading.Semaphore(3)
    before = threading.active_count()
    with session.stream(ListSource(FRAMES, wait=gate), **FAST) as live:
        assert isinstance(live.get(timeout=60), LiveAnswer)
        started = time.monotonic()
        assert live.close()
        assert time.monotonic() - started < 1
        end = live.get(timeout=1)
        assert isinstance(end, LiveEnd)
        assert end.error is None
        assert live.get(timeout=1) is None
    assert threading.active_count() == before


def test_a_session_with_streams_says_who_uses_it(session: Session, tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4")
    with session.stream(**FAST) as live:
        with pytest.raises(InputError, match=r"has open streams.*\n.*ask the stream"):
            session.encode(FRAMES)
        assert len(session.read_video(path).frames) == 3  # needs no graph
        live.finish()
        assert isinstance(list(live)[-1], LiveEnd)
    assert session.encode(FRAMES[:2]).kept_windows > 0


def test_closing_the_session_ends_its_streams(text_bundle: Path):
    session = Session.open(text_bundle, threads=1)
    with session.stream(ListSource(FRAMES, wait=threading.Semaphore(0)), **FAST) as live:
        session.close()
        assert isinstance(list(live)[-1], LiveEnd)
    with pytest.raises(InputError, match="the session is closed"):
        session.stream(**FAST)


def test_pushing_where_nothing_is_taken(session: Session):
    live = session.stream(**FAST)
    with pytest.raises(InputError, match="takes no frames"):
        live.push(FRAMES[0], 0.0)
    with live:
        live.push(FRAMES[0], 0.0)
        live.finish()
        with pytest.raises(InputError, match="takes no frames"):
            live.push(FRAMES[1], 0.5)
    with (
        session.stream(ListSource(FRAMES), **FAST) as read,
        pytest.raises(InputError, match="frames cannot be pushed"),
    ):
        read.push(FRAMES[0], 0.0)


@pytest.mark.parametrize(
    ("frame", "pts", "message"),
    [
        (np.zeros((4, 4), np.uint8), 0.0, "got uint8 of shape"),
        (np.zeros((4, 4, 3), np.float32), 0.0, "got float32 of shape"),
        ([1, 2, 3], 0.0, "got list"),
        (FRAMES[0], float("nan"), "pts is nan"),
        (FRAMES[0], "now", "pts is 'now'"),
        (FRAMES[0], (1.0, -1), "duration is -1"),
        (FRAMES[0], (1.0, "1"), "duration is '1'"),
    ],
)
def test_what_is_no_frame(session: Session, frame: Any, pts: Any, message: str):
    with session.stream(**FAST) as live:
        pts, duration = pts if isinstance(pts, tuple) else (pts, None)
        with pytest.raises(InputError, match=message):
            live.push(frame, pts, duration=duration)
        live.push(FRAMES[0], 0.0)  # it goes on
        live.finish()
        assert any(isinstance(event, LiveAnswer) for event in live)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ""}, "the question is empty"),
        ({"prompt": "<|im_end|>"}, "contains the special token"),
        ({"prompt": [1, 2, 3]}, "the conversation has the turn 1"),
        ({"evry": "2s"}, r"unknown setting 'evry' \(did you mean 'every'\?\)"),
        ({"stop": [""]}, "stop"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 100_000}, r"new ones are \d+\n  allowed: \d+ tokens"),
        ({"max_new_tokens": 100_000, "mode": "incremental"}, r"a window of 6 frames with a que"),
        ({"prune_ratio": 1.5}, "prune ratio 1.5"),
        ({"prune_ratio": "half"}, "prune ratio 'half'"),
        ({"min_prune_ratio": 0.2}, "min_prune_ratio without a latency budget"),
        ({"latency": 1, "prune_ratio": 0.5}, "beside a fixed prune ratio"),
        ({"prompt": 5}, "the prompt is 5"),
        ({"latency": 1, "min_prune_ratio": 0.0}, "ratios from 0 to 0.9\n  allowed: above 0"),
        ({"latency": 1, "min_prune_ratio": 0.8, "max_prune_ratio": 0.2}, "ratios from 0.8 to 0.2"),
        ({"latency": 1, "max_prune_ratio": 1.0}, "ratios from 0.1 to 1"),
    ],
)
def test_settings_that_are_refused_before_anything_starts(
    session: Session, settings: dict[str, Any], message: str
):
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        session.stream(ListSource(FRAMES), **{**FAST, **settings})
    assert threading.active_count() == before
    session.encode(FRAMES[:1])  # no stream is left open


def test_a_question_that_is_too_long_is_refused_where_it_is_asked(session: Session):
    for mode in ("exact", "incremental"):
        with session.stream(mode=mode, **FAST) as live:
            live.push(FRAMES[0], 0.0)
            with pytest.raises(InputError, match="tokens"):
                live.ask("what " * 5000)
            live.finish()
            assert any(isinstance(event, LiveAnswer) for event in live)


def test_a_bundle_without_a_tokenizer_is_refused(small_bundle: Path):
    with (
        Session.open(small_bundle, threads=1) as session,
        pytest.raises(InputError, match="without a tokenizer"),
    ):
        session.stream(**FAST)


def test_names_are_told_apart(session: Session):
    with session.stream(**FAST) as one, session.stream(**FAST) as two:
        assert (one.name, two.name) == ("pushed", "pushed (2)")
    assert session.stream(**FAST, name="door").name == "door"


def test_the_lowest_ratio_of_the_bundle_binds_the_controller(text_bundle: Path):
    with Session.open(text_bundle, threads=1) as session:
        manifest = session.bundle.manifest
        limits = dataclasses.replace(manifest.limits, min_prune_ratio=0.4)
        session.bundle = dataclasses.replace(
            session.bundle, manifest=dataclasses.replace(manifest, limits=limits)
        )
        with pytest.raises(InputError, match=r"ratios from 0.2 to 0.9\n.*0.4 or more"):
            session.stream(latency="1s", min_prune_ratio=0.2, **FAST)
        with session.stream(ListSource(FRAMES), latency="1h", **FAST) as live:
            ratios = [event.prune_ratio for event in live if isinstance(event, LiveAnswer)]
        assert min(ratios) >= 0.4


def test_questions_are_bounded_and_refused_when_nothing_is_taken(session: Session):
    blocked = threading.Event()

    def block(*_: object) -> None:
        blocked.wait(60)

    with session.stream(**FAST, observer=block) as live:
        live.push(FRAMES[0], 0.0)
        for _ in range(16):
            live.ask()
        while live._asked == 16:
            time.sleep(0.001)
        live.ask()
        with pytest.raises(InputError, match="16 questions wait already"):
            live.ask()
        blocked.set()
        live.finish()
        with pytest.raises(InputError, match="takes no questions"):
            live.ask()
        assert sum(isinstance(event, LiveAnswer) for event in live) >= 16
        with pytest.raises(InputError, match="takes no questions"):
            live.ask()


@pytest.mark.parametrize("mode", ["exact", "incremental"])
def test_the_longest_question_that_is_taken_is_answered(text_bundle: Path, mode: str):
    """At the bundle's own limit too: what `ask` lets through must not overflow the cache."""
    with Session.open(text_bundle, threads=1) as session:
        prompts = session.prompts
        assert prompts is not None
        session._eos_ids = frozenset()
        settings = {**FAST, "window": "4s", "max_new_tokens": 100, "prune_ratio": 0.1}
        with session.stream(mode=mode, policy="wait", **settings) as live:
            for number in range(9):
                live.push(FRAMES[number], number / 2, timeout=60)
            taken, words = 0, 10
            while not _is_too_long(live, "what " * words):
                assert len(_next_answer(live).token_ids) == 100
                taken, words = taken + 1, words + 10
            live.finish()
            end = list(live)[-1]
        assert taken
        assert isinstance(end, LiveEnd)
        assert end.error is None


def _is_too_long(live: LiveStream, question: str) -> bool:
    """Ask, unless the question is refused for its length."""
    try:
        live.ask(question)
    except InputError as error:
        if "tokens" not in str(error):
            raise
        return True
    return False


def _next_answer(live: LiveStream) -> LiveAnswer:
    while True:
        event = live.get(timeout=60)
        assert event is not None
        if isinstance(event, LiveAnswer) and event.question != QUESTION:
            return event


def test_gapped_positions_of_a_window_are_checked(text_bundle: Path):
    with Session.open(text_bundle, threads=1) as session:
        manifest = dataclasses.replace(session.bundle.manifest, positions="gapped")
        session.bundle = dataclasses.replace(session.bundle, manifest=manifest)
        settings = {**FAST, "window": "4s", "prune_ratio": 0.9, "max_new_tokens": 300}
        for mode in ("exact", "incremental"):
            with pytest.raises(InputError, match=r"positions\n.*max_position_embeddings"):
                session.stream(mode=mode, **settings)


def test_a_name_may_be_used_again(session: Session):
    """A supervisor opens a camera anew when it has ended, and closes the old one later."""
    old = session.stream(ListSource(FRAMES), name="cam", **FAST)
    with old:
        assert isinstance(list(old)[-1], LiveEnd)
        with session.stream(ListSource(FRAMES), name="cam", **FAST) as new:
            old.close()
            assert isinstance(list(new)[-1], LiveEnd)
    assert session.encode(FRAMES[:1]).kept_windows


def test_a_stream_that_does_not_run_says_so(session: Session):
    live = session.stream(**FAST)
    with pytest.raises(InputError, match=r"does not run\n  fix: use it in a `with` block"):
        list(live)
    session.encode(FRAMES[:1])  # it uses nothing yet
    with live:
        live.finish()
        list(live)
    with pytest.raises(InputError, match="was opened before"):
        live.__enter__()


def test_pushing_after_a_failure_says_what_failed(session: Session):
    def broken(*_: object) -> None:
        raise OSError("disk full")

    with session.stream(**FAST, observer=broken) as live:
        for number in range(3):
            live.push(FRAMES[number], number / 2)
        while not live.is_over:
            time.sleep(0.001)
        with pytest.raises(InputError, match="has ended: disk full") as error:
            live.push(FRAMES[3], 1.5)
        assert isinstance(error.value.__cause__, OSError)
        live.close()


def test_finish_ends_a_stream_with_a_source(session: Session):
    gate = threading.Semaphore(3)
    with session.stream(ListSource(FRAMES, wait=gate), **FAST) as live:
        assert isinstance(live.get(timeout=60), LiveAnswer)
        live.finish()
        gate.release(2)
        assert isinstance(list(live)[-1], LiveEnd)
        assert live.counters.encoded == 3
