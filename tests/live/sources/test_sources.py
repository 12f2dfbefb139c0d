from __future__ import annotations

import os

import pytest

from stts_export.errors import InputError
from stts_export.live.sources import (
    FileSource,
    FolderSource,
    NetworkSource,
    SourceOptions,
    open_source,
)
from tests.live.sources.helpers import encode, jpeg


def test_what_a_source_is(tmp_path):
    clip = encode(tmp_path / "clip.mp4", 3)
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    assert isinstance(open_source(clip), FileSource)
    assert isinstance(open_source(str(clip)), FileSource)
    assert isinstance(open_source(tmp_path), FolderSource)
    for scheme in ("rtsp", "rtsps", "http", "https", "udp", "RTSP"):
        assert isinstance(open_source(f"{scheme}://host/path"), NetworkSource)


def test_a_file_whose_name_looks_like_an_address(tmp_path, monkeypatch):
    encode(tmp_path / "http:clip.mp4", 3)
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("http:clip.mp4"), FileSource)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.mp4", "there is no such file or folder"),
        ("rstp://host/x", "the scheme 'rstp' is not known (did you mean 'rtsp'?)"),
        ("ftp://host/x", "the scheme 'ftp' is not known"),
        ("file:///etc/passwd", "the scheme 'file' is not known"),
        ("rtsp://", "the address names no host"),
        ("http:///path", "the address names no host"),
        ("rtsp://bob:word@/path", "the address names no host"),
        ("/dev/video987", "there is no such device"),
    ],
)
def test_what_is_no_source(spec, message):
    with pytest.raises(InputError) as error:
        open_source(spec)
    assert error.value.message.startswith(message)
    assert error.value.allowed or error.value.fix
    assert "word" not in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        "rtsp:/admin:word@cam/x", "admin:word@cam/x", "rtsp//a:word@c", "location=rtsp://a:word@c",
        "user-pw=word", "cam/user=admin&pwd=word", "a:word@rtsp://c", "/dev/v4l/a:word@c",
    ],
)  # fmt: skip
def test_no_password_of_what_is_no_source_is_shown(spec):
    with pytest.raises(InputError, match="there is no such") as error:
        open_source(spec)
    assert "word" not in str(error.value)


@pytest.mark.parametrize("spec", ["", " ", 5, None, b"clip.mp4"])
def test_what_is_no_text(spec):
    with pytest.raises(InputError, match=r"the source is (empty|of type (int|NoneType|bytes))"):
        open_source(spec)


@pytest.mark.parametrize("spec", ["x" * 5000, "a\0b"])
def test_what_is_no_name_of_a_file(spec):
    with pytest.raises(InputError, match=r"file name too long|is no name of a file") as error:
        open_source(spec)
    assert len(str(error.value)) < 500


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(InputError, match="is no file, folder or camera") as error:
            open_source(path)
        assert error.value.allowed


@pytest.mark.parametrize("port", ["", "0", "65536", "99999999", "abc", "-1", "5٥4"])
@pytest.mark.parametrize("host", ["cam", "bob:word@cam", "[::1]"])
def test_a_port_that_is_none(host, port):
    with pytest.raises(InputError) as error:
        open_source(f"rtsp://{host}:{port}/x")
    assert error.value.message == f"the port is {port!r}"
    assert error.value.allowed == "1 to 65535"
    assert "word" not in str(error.value)


@pytest.mark.parametrize("url", ["rtsp://cam:65535", "http://[::1]/x", "rtsp://bob:12/3@cam:1/x"])
def test_a_port_that_is_one(url):
    assert open_source(url).is_live


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "udb"}, "transport is 'udb' (did you mean 'udp'?)"),
        ({"transport": None}, "transport is None"),
        ({"decoder": "nvdec"}, "decoder is 'nvdec'"),
        ({"connect_timeout": 0}, "connect_timeout is 0"),
        ({"read_timeout": float("nan")}, "read_timeout is nan"),
        ({"reconnect_for": -1}, "reconnect_for is -1"),
        ({"folder_fps": "2"}, "folder_fps is '2'"),
        ({"folder_fps": True}, "folder_fps is True"),
        ({"realtime": 1}, "realtime is 1"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(InputError) as error:
        SourceOptions(**options)
    assert error.value.message == message
    assert error.value.where in options
    assert error.value.allowed
