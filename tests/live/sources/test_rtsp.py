from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from stts_export.errors import InputError
from stts_export.live.sources import open_source
from tests.live.sources.helpers import (
    QUICK,
    Heard,
    encode,
    free_port,
    number_of,
    numbered,
    silent_server,
    take,
)


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_frames_come_from_the_first_on(rtsp, transport):
    heard = Heard()
    source = open_source(rtsp().url(), replace(QUICK, transport=transport))
    assert source.is_live
    assert numbered(source, 40, heard) == list(range(40))
    assert heard.notices == [("connected", "frames come: 96x64 h264 at 25 frames a second")]


def test_times_are_those_of_the_stream(rtsp):
    arrivals = take(open_source(rtsp().url(), QUICK), 20)
    assert [arrival.is_first for arrival in arrivals] == [True] + [False] * 19
    # FFmpeg has no time for what comes before the server told its own.
    assert [arrival.pts for arrival in arrivals[1:]] == pytest.approx(
        [place / 25 for place in range(1, 20)]
    )
    assert {arrival.duration for arrival in arrivals} == {0.04}


@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_a_server_that_is_killed_and_started_again(rtsp, transport):
    server, heard = rtsp(), Heard()
    source = open_source(server.url(), replace(QUICK, transport=transport, reconnect_for=20.0))
    firsts, numbers = [], []
    for place, arrival in enumerate(source.arrivals(threading.Event(), heard)):
        firsts.append(arrival.is_first)
        numbers.append(number_of(arrival.rgb()))
        if place == 20:
            server.kill()
            server.start()
        if sum(firsts) == 2 and not any(firsts[-5:]):
            break
    again = firsts.index(True, 1)
    assert numbers[:again] == list(range(again))
    assert numbers[again:] == list(range(len(numbers) - again))
    assert heard.counts == {"reconnects": 1}
    assert heard.kinds[0] == heard.kinds[-1] == "connected"
    assert set(heard.kinds[1:-1]) == {"reconnecting"}
    assert "trying again in 0.5 s, for another 20 s" in heard.text


def test_a_server_that_is_killed_for_good(rtsp):
    server, heard = rtsp(), Heard()
    source = open_source(server.url(), QUICK)
    arrivals = source.arrivals(threading.Event(), heard)
    for _ in range(10):
        next(arrivals)
    server.kill()
    with pytest.raises(InputError, match="is lost: connection refused, tried for 3 s") as error:
        list(arrivals)
    assert error.value.where == source.name
    assert "reconnect_for (--give-up-after)" in str(error.value)


def test_not_trying_again(rtsp):
    server, heard = rtsp(), Heard()
    source = open_source(server.url(), replace(QUICK, reconnect_for=0))
    arrivals = source.arrivals(threading.Event(), heard)
    next(arrivals)
    server.kill()
    with pytest.raises(InputError, match="is lost: the connection was closed"):
        list(arrivals)
    assert heard.kinds == ["connected"]


def test_a_recording_ends(rtsp, tmp_path):
    server, heard = rtsp(video=encode(tmp_path / "short.mp4", 25)), Heard()
    assert numbered(open_source(server.url(), QUICK), None, heard) == list(range(25))
    assert heard.kinds == ["connected"]


@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_credentials(rtsp, caplog, auth):
    server, heard = rtsp("--user", "bob", "--password", "p@ss:w/1", "--auth", auth), Heard()
    source = open_source(server.url("bob:p%40ss%3Aw%2F1@"), QUICK)
    assert len(take(source, 3, heard)) == 3
    assert source.name == server.url()
    for wrong in ("bob:s3cret%40@", "bob:s3:cret@", "s3cret@", ""):
        began = time.monotonic()
        source = open_source(server.url(wrong), QUICK)
        with pytest.raises(InputError, match="missing or wrong") as error:
            take(source, 1, heard)
        assert time.monotonic() - began < 1
        assert "s3" not in repr(error.value) + str(error.value) + source.name
    assert "s3" not in heard.text + caplog.text
    assert "p@ss" not in heard.text + caplog.text


def test_a_path_that_is_not_there(rtsp):
    source = open_source(rtsp().url(path="other"), QUICK)
    with pytest.raises(InputError, match="nothing at this path"):
        take(source, 1)


def test_nobody_listens():
    source = open_source(f"rtsp://bob:s3cret@127.0.0.1:{free_port()}/x", QUICK)
    heard, began = Heard(), time.monotonic()
    with pytest.raises(InputError, match="cannot be reached: connection refused") as error:
        take(source, 1, heard)
    assert 2.5 < time.monotonic() - began < 4
    assert "s3cret" not in str(error.value) + heard.text
    assert set(heard.kinds) == {"reconnecting"}


def test_a_host_that_is_not_known():
    source = open_source("rtsp://camera.invalid/x", replace(QUICK, reconnect_for=0))
    with pytest.raises(InputError, match=r"the host name camera\.invalid is not known"):
        take(source, 1)


def test_a_server_that_never_answers_is_given_up():
    with silent_server() as port:
        source = open_source(f"rtsp://127.0.0.1:{port}/x", replace(QUICK, reconnect_for=1.5))
        began = time.monotonic()
        with pytest.raises(InputError, match=r"cannot be reached: nothing came, tried for [12] s"):
            take(source, 1)
        assert time.monotonic() - began < 2.5


def test_stopping_while_a_server_is_silent():
    stop = threading.Event()
    options = replace(QUICK, connect_timeout=1.0, reconnect_for=30.0)
    with silent_server() as port:
        source = open_source(f"rtsp://127.0.0.1:{port}/x", options)
        timer = threading.Timer(0.2, stop.set)
        timer.start()
        began = time.monotonic()
        assert take(source, stop=stop) == []
        assert time.monotonic() - began < 2
        timer.join()


def test_stopping_while_it_waits_to_try_again():
    stop, heard = threading.Event(), Heard()
    ended: list[float] = []
    source = open_source(f"rtsp://127.0.0.1:{free_port()}/x", replace(QUICK, reconnect_for=60.0))

    def watch() -> None:
        take(source, heard=heard, stop=stop)
        ended.append(time.monotonic())

    thread = threading.Thread(target=watch)
    thread.start()
    while len(heard.notices) < 2:
        time.sleep(0.01)
    began = time.monotonic()
    stop.set()
    thread.join(5)
    assert ended[0] - began < 0.2
