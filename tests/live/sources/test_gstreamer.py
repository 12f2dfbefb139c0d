from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

import pytest

from stts_export.errors import InputError, MissingDependencyError
from stts_export.live.sources import GStreamerSource, open_source
from tests.live.sources.helpers import QUICK, Heard, encode, numbered, take

pytestmark = pytest.mark.usefixtures("gstreamer")

DECODE = "rtph264depay ! h264parse ! avdec_h264"


def _children() -> set[str]:
    with open(f"/proc/self/task/{threading.get_native_id()}/children", encoding="ascii") as file:
        return set(file.read().split())


def test_a_pipeline_that_ends():
    heard = Heard()
    source = open_source("gst:videotestsrc num-buffers=30 ! video/x-raw,framerate=10/1", QUICK)
    assert source.is_live
    arrivals = take(source, None, heard)
    assert [arrival.pts for arrival in arrivals] == pytest.approx(
        [place / 10 for place in range(30)], abs=0.002
    )
    assert [arrival.is_first for arrival in arrivals] == [True] + [False] * 29
    assert heard.notices == [("connected", "frames come: 320x240 rawvideo at 10 frames a second")]


def test_a_file(tmp_path):
    path = encode(tmp_path / "a clip.mp4", 50, options={"bf": "2"})
    pipeline = f'gst:filesrc location="{path}" ! qtdemux ! h264parse ! avdec_h264'
    source = open_source(pipeline, replace(QUICK, decoder="auto"))
    assert not source.is_live
    assert numbered(source) == list(range(50))


def test_no_shell(tmp_path):
    with pytest.raises(InputError, match="the pipeline fails"):
        take(open_source(f"gst:videotestsrc; touch {tmp_path}/x", QUICK))
    assert not (tmp_path / "x").exists()


def test_leaving_kills_the_process():
    before, files = _children(), len(os.listdir("/proc/self/fd"))
    arrivals = open_source("gst:videotestsrc", QUICK).arrivals(threading.Event(), Heard())
    next(arrivals)
    assert len(_children() - before) == 1
    arrivals.close()  # type: ignore[attr-defined]
    assert _children() == before
    assert len(os.listdir("/proc/self/fd")) == files


def test_stopping_a_silent_pipeline():
    stop = threading.Event()
    source = open_source("gst:videotestsrc is-live=true ! valve drop=true", QUICK)
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    began = time.monotonic()
    assert take(source, stop=stop) == []
    assert time.monotonic() - began < 0.8
    timer.join()


def test_a_silent_pipeline_is_given_up():
    options = replace(QUICK, reconnect_for=1.0)
    source = open_source("gst:videotestsrc is-live=true ! valve drop=true", options)
    with pytest.raises(InputError, match="cannot be reached: nothing came, tried for"):
        take(source)


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ("nosuch ! x", 'the pipeline fails: .*no element "nosuch"'),
        ("videotestsrc num-buffers=0", "the pipeline ends without a frame"),
        ("filesrc location=/nowhere ! qtdemux ! h264parse ! avdec_h264", "Resource not found"),
    ],
)
def test_a_pipeline_that_fails(pipeline, message):
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match=message) as error:
        take(open_source(f"gst:{pipeline}", QUICK))
    assert error.value.where == f"gst:{pipeline}"
    assert error.value.fix == "try it by itself with gst-launch-1.0"
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_server_that_is_away_at_the_start(rtsp):
    server, heard = rtsp(), Heard()
    server.kill()
    pipeline = f"gst:rtspsrc location={server.url()} protocols=tcp latency=0 ! {DECODE}"
    source = open_source(pipeline, replace(QUICK, reconnect_for=20.0))
    timer = threading.Timer(1.0, server.start)
    timer.start()
    assert len(take(source, 3, heard)) == 3
    timer.join()
    assert set(heard.kinds[:-1]) == {"reconnecting"}
    assert "the pipeline fails: " in heard.text
    assert heard.kinds[-1] == "connected"


@pytest.mark.parametrize(
    "pipeline",
    [
        "rtspsrc location=rtsp://127.0.0.1:1/x ! rtph264depay ! h264parse ! avdec_h264",
        "v4l2src device=/dev/video987",
        "tcpclientsrc host=127.0.0.1 port=1 ! tsdemux ! h264parse ! avdec_h264",
    ],
)
def test_a_camera_that_never_comes(pipeline):
    heard = Heard()
    source = open_source(f"gst:{pipeline}", replace(QUICK, reconnect_for=2.0))
    with pytest.raises(InputError, match=r"cannot be reached: .*, tried for"):
        take(source, None, heard)
    assert set(heard.kinds) == {"reconnecting"}
    assert "the pipeline fails: ERROR: from element" in heard.text


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("nosuch", 'no element "nosuch"'),
        ("rtph264depay nosuch=1", 'no property "nosuch"'),
        ("rtph265depay ! h265parse ! avdec_h265", "the pipeline fails"),
    ],
)
def test_a_wrong_pipeline_is_not_tried_again(rtsp, rest, message):
    server, heard = rtsp(), Heard()
    source = open_source(f"gst:rtspsrc location={server.url()} protocols=tcp ! {rest}", QUICK)
    with pytest.raises(InputError, match=message) as error:
        take(source, None, heard)
    assert "tried for" not in error.value.message
    assert heard.kinds == []


def test_a_path_that_is_not_there_is_not_tried_again(rtsp):
    heard = Heard()
    source = open_source(f"gst:rtspsrc location={rtsp().url(path='other')} ! {DECODE}", QUICK)
    with pytest.raises(InputError, match=r"the pipeline fails: .*Not found"):
        take(source, None, heard)
    assert heard.kinds == []


def test_a_camera_that_comes_back(rtsp):
    server, heard = rtsp(), Heard()
    pipeline = f"gst:rtspsrc location={server.url()} protocols=tcp latency=0 ! {DECODE}"
    source = open_source(pipeline, replace(QUICK, reconnect_for=20.0))
    firsts = []
    for arrival in source.arrivals(threading.Event(), heard):
        firsts.append(arrival.is_first)
        if len(firsts) == 10:
            server.kill()
            server.start()
        if sum(firsts) == 2:
            break
    assert heard.counts == {"reconnects": 1}
    assert heard.kinds[-1] == "connected"


def test_wrong_credentials(rtsp):
    server, heard = rtsp("--user", "bob", "--password", "word"), Heard()
    location = server.url("bob:s3%40cret@")
    source = open_source(f"gst:rtspsrc location={location} user-pw=s3cret ! {DECODE}", QUICK)
    with pytest.raises(InputError, match=r"the pipeline fails: .*[Uu]nauthorized") as error:
        take(source, 1, heard)
    assert "s3" not in str(error.value) + source.name + heard.text
    assert heard.kinds == []


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [("", "the pipeline is empty"), ('filesrc location="x', "the pipeline cannot be read")],
)
def test_what_is_no_pipeline(pipeline, message):
    with pytest.raises(InputError, match=message):
        open_source(f"gst:{pipeline}", QUICK)


def test_a_pipeline_is_not_decoded_by_ffmpeg():
    with pytest.raises(InputError, match="decoder is 'cuda', but the pipeline decodes"):
        open_source("gst:videotestsrc", replace(QUICK, decoder="cuda"))


def test_gstreamer_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"gst-launch-1\.0 is not installed") as error:
        GStreamerSource("videotestsrc", QUICK)
    assert "apt-get install gstreamer1.0-tools" in str(error.value.fix)
