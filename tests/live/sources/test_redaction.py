from __future__ import annotations

import shlex

import pytest

from stts_export.errors import SttsError
from stts_export.live.sources import SourceOptions, open_source
from stts_export.live.sources.redaction import (
    redacted,
    redacted_message,
    redacted_text,
    redacted_words,
    secrets_of,
)

PASSWORDS = [
    "s3cret", "s3:cret", "s3@cret", "s3%40cret", "s3@@c:r:et@", "s3/cret", "s3?cret", "s3#cret",
    "12/s3cret", "12?s3=cret&a=b", "s3 cret", "s3@host/x", "s3;cret", "s3[cret]", "@s3", "s3ß",
]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://host/path", "rtsp://host/path"),
        ("rtsp://host:554/path", "rtsp://host:554/path"),
        ("rtsp://bob:word@host:554/a/b", "rtsp://host:554/a/b"),
        ("rtsp://bob@host/path", "rtsp://host/path"),
        ("rtsp://bob:w@r:d@host/path", "rtsp://host/path"),
        ("rtsp://bob:word@[::1]:554/path", "rtsp://[::1]:554/path"),
        ("http://host/a?token=x&user=y", "http://host/a?token=***&user=***"),
        ("http://host/a?token", "http://host/a?***"),
        ("http://host/a?t=x=y&", "http://host/a?t=***&***"),
        ("http://host/a?t=x#part", "http://host/a?t=***"),
        ("http://host?t=x", "http://host?t=***"),
        ("http://host/a?t=x@y", "http://***"),
        ("rtsp://bob:12/34@host/path", "rtsp://***"),
        ("rtsp://bob:12?34@host/path", "rtsp://***"),
        ("rtsp:/admin:s3cret@cam/x", "***@cam/x"),
        ("admin:s3cret@cam/x", "***@cam/x"),
        ("rtsp//a:b@c", "***@c"),
        ("rtsp:/a:b://c@d@cam/x", "***@cam/x"),
        ("cam/user=admin&password=s3cret", "cam/user=***&password=***"),
        (
            "rtsp://host/user=admin&password=s3cret&channel=1",
            "rtsp://host/user=***&password=***&channel=1",
        ),
        (
            "rtsp://host/user=a&password=s3&/;cret&channel=1",
            "rtsp://host/user=***&password=***&channel=1",
        ),
        ("rtsp://host/a;user=admin;password=x", "rtsp://host/a;user=***;password=***"),
        ("rtsp://host/user=admin_password=x_channel=1.sdp?real", "rtsp://host/user=***?***"),
        ("rtsp://host/channel=1;stream=0", "rtsp://host/channel=1;stream=0"),
        ("udp://@239.0.0.1:1234", "udp://239.0.0.1:1234"),
        ("/dev/video0", "/dev/video0"),
        ("clip.mp4", "clip.mp4"),
    ],
)
def test_addresses(url, shown):
    assert redacted(url) == shown


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("scheme", ["rtsp", "http", "xyz"])
def test_no_password_is_in_a_name_or_an_error(password, scheme):
    url = f"{scheme}://bob:{password}@127.0.0.1:1/path?key={password}"
    assert "s3" not in redacted(url)
    try:
        name = open_source(url, SourceOptions(decoder="software")).name
    except SttsError as error:
        name = str(error)
    assert "s3" not in name
    assert "cret" not in name


@pytest.mark.parametrize("password", PASSWORDS)
def test_pipelines(password):
    words = [
        "rtspsrc", f"location=rtsp://bob:{password}@host/path", f"user-pw={password}", "!", "x",
    ]  # fmt: skip
    shown = " ".join(redacted_words(words))
    assert "s3" not in shown
    assert shown.endswith("user-pw=*** ! x")
    said = f"ERROR: {password} of rtsp://bob:{password}@host/path is wrong"
    text = redacted_text(said, secrets_of(words))
    assert "s3" not in text
    assert text.startswith("ERROR: ")


@pytest.mark.parametrize(
    "setting", ["user-pw = s3cret", "user-pw= s3cret", "user-pw =s3cret", "'user-pw = s3cret'"]
)
def test_spaces_around_the_sign_of_a_setting(setting):
    words = shlex.split(f"rtspsrc {setting} ! x")
    assert redacted_words(words)[1].replace(" ", "") == "user-pw=***"
    assert redacted_words(words)[2:] == ["!", "x"]
    assert redacted_text("s3cret is wrong", secrets_of(words)) == "*** is wrong"


def test_a_value_that_ends_in_the_sign():
    words = ["rtspsrc", "user-pw=s3cret=", "!", "x"]
    assert redacted_words(words) == ["rtspsrc", "user-pw=***", "!", "x"]
    assert redacted_text("s3cret= is wrong", secrets_of(words)) == "*** is wrong"


def test_only_whole_words_are_secret():
    said = "ERROR: from element /GstPipeline:pipeline0: a user a@host, e is a bad name"
    shown = "ERROR: from element /GstPipeline:pipeline0: *** user ***@host, *** is *** bad name"
    assert redacted_text(said, secrets_of(["location=rtsp://a:e@host/x"])) == shown


@pytest.mark.parametrize("password", PASSWORDS)
def test_messages_that_repeat_words(password):
    words = [f"rtsp://bob:{password}@host/x", f"--fps=bob:{password}@host", f"password={password}"]
    for word in words:
        for said in (word, repr(word), repr(word.removeprefix("--fps="))):
            text = redacted_message(f"invalid: {said}", words)
            assert "s3" not in text
            assert text.startswith("invalid: ")
    assert redacted_message("unrecognized arguments: --x=1", ["--x=1"]).endswith("--x=1")


def test_other_settings_stay():
    words = "videotestsrc num-buffers=30 ! video/x-raw,format=I420 ! queue max-size-buffers=1"
    assert redacted_words(words.split()) == words.split()
    assert redacted_text("could not link", secrets_of(words.split())) == "could not link"
