from __future__ import annotations

import errno
import os
import re
import threading
from dataclasses import replace
from typing import Any

import av
import av.error
import pytest

from stts_export.errors import InputError, MissingDependencyError
from stts_export.live.sources import DeviceSource, NetworkSource, hardware, open_source
from tests.live.sources.helpers import QUICK, Heard, encode, take, web, whole


class Camera:
    """An opener that plays a file as a camera would: with pauses, and until it is unplugged."""

    def __init__(self, path: str, outcomes: list[int | None]) -> None:
        self.path = path
        self.outcomes = outcomes
        """Of each try to open it: an error, or None."""
        self.opened: list[dict[str, Any]] = []

    def __call__(self, url: str, **settings: Any) -> Any:
        self.opened.append({"url": url, **settings})
        outcome = self.outcomes.pop(0)
        if outcome:
            raise av.error.OSError(outcome, os.strerror(outcome), url)
        return Unplugged(av.open(self.path))


class Unplugged:
    """A container that has nothing now and then, and breaks after 10 packets."""

    def __init__(self, container: Any) -> None:
        self._container = container
        self._packets = container.demux(video=0)
        self._read = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def demux(self) -> Any:
        while True:
            self._read += 1
            if self._read % 3 == 0:
                raise av.error.BlockingIOError(errno.EAGAIN, "again")
            if self._read > 15:
                raise av.error.OSError(errno.ENODEV, "No such device")
            yield next(self._packets)


@pytest.fixture
def clip(tmp_path):
    return str(encode(tmp_path / "clip.mp4", 30))


def test_a_camera_that_is_unplugged_and_plugged_in_again(clip):
    camera = Camera(clip, [None, errno.ENOENT, None])
    source, heard = DeviceSource("/dev/video7", QUICK, camera), Heard()
    assert (source.name, source.is_live) == ("/dev/video7", True)
    firsts = []
    for arrival in source.arrivals(threading.Event(), heard):
        firsts.append(arrival.is_first)
        if len(firsts) == 20:
            break
    assert [place for place, first in enumerate(firsts) if first] == [0, 10]
    assert heard.kinds == ["connected", "reconnecting", "reconnecting", "connected"]
    assert heard.counts == {"reconnects": 1}
    assert "is not a camera that gives frames" in heard.notices[1][1]
    assert "there is no such device" in heard.notices[2][1]


def test_how_a_camera_is_opened(clip):
    camera = Camera(clip, [None])
    take(DeviceSource("/dev/video7", QUICK, camera), 1)
    assert camera.opened[0]["url"] == "/dev/video7"
    assert camera.opened[0]["format"] == "video4linux2,v4l2"
    assert camera.opened[0]["timeout"] == pytest.approx((1.5, 1.0), abs=0.01)
    assert camera.opened[0]["options"] == {"fflags": "+4"}


def test_a_camera_without_frames_is_lost(clip):
    class Silent(Camera):
        def __call__(self, url: str, **settings: Any) -> Any:
            container = super().__call__(url, **settings)
            container.demux = self.nothing
            return container

        def nothing(self) -> Any:
            raise av.error.BlockingIOError(errno.EAGAIN, "again")

    camera = Silent(clip, [None] * 8)
    options = replace(QUICK, read_timeout=0.2, reconnect_for=1.0)
    with pytest.raises(InputError, match="cannot be reached: no frame came, tried for"):
        take(DeviceSource("/dev/video7", options, camera))


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOENT, "there is no such device"),
        (errno.EACCES, "this user may not open the device"),
        (errno.ENOTTY, "is not a camera that gives frames"),
        (errno.EBUSY, "another program uses the device"),
    ],
)
def test_a_camera_that_cannot_be_opened_fails_at_once(clip, number, message):
    heard = Heard()
    with pytest.raises(InputError, match=message) as error:
        take(DeviceSource("/dev/video7", QUICK, Camera(clip, [number])), None, heard)
    assert error.value.fix
    assert heard.notices == []


def test_a_device_that_is_none(tmp_path):
    path = tmp_path / "video0"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is not a camera that gives frames"):
        take(DeviceSource(str(path), QUICK))


def test_real_ffmpeg_and_a_missing_device():
    with pytest.raises(InputError, match="there is no such device"):
        take(DeviceSource("/dev/video987", QUICK))


def test_no_gpu_is_reported_once(clip, monkeypatch):
    monkeypatch.setattr(hardware, "_missing", lambda: "there is none")
    camera = Camera(clip, [None, None])
    heard = Heard()
    take(DeviceSource("/dev/video7", replace(QUICK, decoder="auto"), camera), 15, heard)
    assert heard.kinds == ["software-decoding", "connected", "reconnecting", "connected"]
    assert heard.notices[0][1].endswith("the GPU's decoder cannot: there is none")
    assert camera.opened[0]["hwaccel"] is None


def test_insisting_on_a_gpu(clip, monkeypatch):
    monkeypatch.setattr(hardware, "_missing", lambda: "there is none")
    source = DeviceSource("/dev/video7", replace(QUICK, decoder="cuda"), Camera(clip, []))
    with pytest.raises(MissingDependencyError, match="cannot be used: there is none") as error:
        take(source)
    assert "nvv4l2decoder" in str(error.value.fix)


@pytest.mark.parametrize("decoder", ["auto", "cuda"])
def test_a_codec_that_the_gpu_does_not_decode(clip, monkeypatch, decoder):
    monkeypatch.setattr(hardware, "_missing", lambda: None)
    camera, heard = Camera(clip, [None]), Heard()
    source = DeviceSource("/dev/video7", replace(QUICK, decoder=decoder), camera)
    if decoder == "cuda":
        with pytest.raises(MissingDependencyError, match="it does not decode h264"):
            take(source, 1, heard)
    else:
        take(source, 1, heard)
        assert heard.kinds == ["software-decoding", "connected"]
    assert camera.opened[0]["hwaccel"].allow_software_fallback == (decoder == "auto")


def test_nothing_that_the_gpu_decodes(monkeypatch):
    def opener(*_: object, **__: object) -> Any:
        raise RuntimeError("Hardware accelerated decode requested but no stream is compatible")

    monkeypatch.setattr(hardware, "_missing", lambda: None)
    source = DeviceSource("/dev/video7", replace(QUICK, decoder="cuda"), opener)
    with pytest.raises(MissingDependencyError, match="it does not decode what comes"):
        take(source)


def test_this_machine_says_what_decodes(tmp_path):
    data = encode(tmp_path / "clip.mp4", 5).read_bytes()
    heard = Heard()
    with web({"/clip.mp4": whole(data)}) as site:
        source = NetworkSource(f"{site}/clip.mp4", replace(QUICK, decoder="auto"))
        assert len(take(source, None, heard)) == 5
    assert heard.kinds in (["connected"], ["software-decoding", "connected"])


def test_an_ordinary_file_is_no_device(monkeypatch, tmp_path):
    (tmp_path / "video0").write_bytes(b"")
    monkeypatch.setattr("stts_export.live.sources._DEVICE", re.compile(".*video0"))
    with pytest.raises(InputError, match="is not a device"):
        open_source(str(tmp_path / "video0"))
