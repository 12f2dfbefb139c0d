"""Streams over real servers: a camera that is killed, wrong credentials, answers as of the file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.errors import InputError
from stts_export.live.events import LiveAnswer, LiveEnd, LiveEvent, LiveNotice
from stts_export.live.stream import LiveStream, merged
from stts_export.runtime.video import read_video
from tests.live.sources.helpers import QUICK, RtspServer, encode

QUESTION = "How many objects are there?"


@pytest.fixture(scope="module")
def session(text_bundle: Path) -> Iterator[Session]:
    with Session.open(text_bundle, threads=1) as session:
        yield session


def _stream(session: Session, source: Any, **settings: Any) -> LiveStream:
    given = {"every": "1s", "window": "4s", "max_new_tokens": 4, "options": QUICK, **settings}
    return session.stream(source, prompt=QUESTION, **given)


def _answers(events: list[LiveEvent]) -> list[LiveAnswer]:
    return [event for event in events if isinstance(event, LiveAnswer)]


@pytest.fixture(scope="module")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.4 s at 25 frames a second: eight samples, as many as the bundle takes."""
    return encode(tmp_path_factory.mktemp("short") / "short.mp4", 85)


def test_a_camera_is_answered_as_its_file_is(
    session: Session, rtsp: Callable[..., RtspServer], short_clip: Path
):
    """The same frames, windows and answer, from RTSP in real time and from the file."""
    server = rtsp(video=short_clip)
    with _stream(session, server.url(), policy="wait") as live:
        events = list(live)
    expected = read_video(short_clip, max_frames=8, size=(48, 48))
    last = _answers(events)[-1]
    np.testing.assert_allclose(last.timestamps, expected.timestamps, atol=0.001)
    clip = session.encode(expected)
    np.testing.assert_array_equal(last.keep, clip.keep)
    assert last.token_ids == session.generate(clip, QUESTION, 4).token_ids
    assert [answer.end for answer in _answers(events)][:3] == [1.0, 2.0, 3.0]
    end = events[-1]
    assert isinstance(end, LiveEnd)
    assert (end.error, end.counters.dropped, end.counters.reconnects) == (None, 0, 0)


def test_a_camera_that_is_killed_and_comes_back(session: Session, rtsp: Callable[..., RtspServer]):
    """Answers go on, times ascend over the outage, and another stream does not notice."""
    server, other = rtsp(), rtsp()
    seen: dict[str, list[LiveEvent]] = {"door": [], "yard": []}
    with (
        _stream(session, server.url(), name="door") as door,
        _stream(session, other.url(), name="yard") as yard,
    ):
        was_killed = is_back = False
        for event in merged([door, yard], timeout=30):
            assert event is not None, "nothing came for 30 s"
            seen[event.stream].append(event)
            answers = _answers(seen["door"])
            if not was_killed and len(answers) == 2:
                server.kill()
                was_killed = True
            if isinstance(event, LiveNotice) and event.kind == "reconnecting":
                assert event.stream == "door"
                server.start()
            is_back = is_back or door.counters.reconnects == 1
            if is_back and len(answers) >= 5:
                break
        counted = door.counters
    ends = [answer.end for answer in _answers(seen["door"])]
    assert ends == sorted(set(ends))
    assert counted.reconnects == 1
    kinds = [event.kind for event in seen["door"] if isinstance(event, LiveNotice)]
    assert kinds.count("connected") == 2
    assert "reconnecting" in kinds
    assert yard.counters.reconnects == 0
    yard_ends = [answer.end for answer in _answers(seen["yard"])]
    assert len(yard_ends) >= 4
    assert yard_ends == [1.0 + number for number in range(len(yard_ends))]


def test_a_camera_that_is_gone_ends_its_stream_in_time_and_no_other(
    session: Session, rtsp: Callable[..., RtspServer], short_clip: Path
):
    server = rtsp()
    with (
        _stream(session, server.url("user:se%40cret@"), name="gone") as gone,
        _stream(session, short_clip, name="file") as file,
    ):
        assert any(isinstance(event, LiveAnswer) for event in _until_answer(gone))
        server.kill()
        started = time.monotonic()
        events: list[LiveEvent] = []
        with pytest.raises(InputError, match=r"is lost: .*tried for") as error:
            events.extend(iter(gone))
        assert time.monotonic() - started < QUICK.reconnect_for + 2 * QUICK.connect_timeout
        assert len(_answers(list(file))) == 4
    text = f"{error.value} {events} {gone.name}"
    assert "cret" not in text


def _until_answer(live: LiveStream) -> list[LiveEvent]:
    events: list[LiveEvent] = []
    while not events or not isinstance(events[-1], LiveAnswer):
        event = live.get(timeout=30)
        assert event is not None
        events.append(event)
    return events


def test_wrong_credentials_end_at_once(session: Session, rtsp: Callable[..., RtspServer]):
    server = rtsp("--user", "anna", "--password", "right")
    url = server.url("anna:wr%3Aong@")
    started = time.monotonic()
    with (
        _stream(session, url) as live,
        pytest.raises(InputError, match=r"(?s)credentials|password") as error,
    ):
        list(live)
    assert time.monotonic() - started < 5
    assert "ong" not in str(error.value).replace("wrong", "")
    assert "anna" not in live.name
