from __future__ import annotations

import threading
import time
from dataclasses import replace

import av
import numpy as np
import pytest

from stts_export.errors import InputError
from stts_export.live.sources import open_source
from tests.live.sources.helpers import (
    QUICK,
    Heard,
    encode,
    jpeg,
    number_of,
    numbered,
    ranged,
    status,
    take,
    unranged,
    unsized,
    web,
    whole,
)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("web") / "clip.mp4", 250).read_bytes()


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("web") / "clip.ts", 250).read_bytes()


def test_a_file(mp4):
    heard = Heard()
    with web({"/clip.mp4": whole(mp4)}) as site:
        source = open_source(f"{site}/clip.mp4?token=s3cret", QUICK)
        assert not source.is_live
        assert source.name == f"{site}/clip.mp4?token=***"
        assert numbered(source, None, heard) == list(range(250))
    assert heard.kinds == ["connected"]


def test_a_transport_stream_of_known_length_ends(stream):
    heard = Heard()
    with web({"/live": whole(stream)}) as site:
        source = open_source(f"{site}/live", QUICK)
        guess = source.is_live
        assert numbered(source, None, heard) == list(range(250))
    assert (guess, source.is_live) == (True, False)
    assert heard.kinds == ["connected"]


@pytest.mark.parametrize("page", [ranged, unranged])
def test_a_file_goes_on_where_it_broke_off(mp4, page):
    heard = Heard()
    with web({"/clip.mp4": page(mp4, cuts=[len(mp4) // 2])}) as site:
        source = open_source(f"{site}/clip.mp4", QUICK)
        firsts, numbers = 0, []
        for arrival in source.arrivals(threading.Event(), heard):
            firsts += arrival.is_first
            numbers.append(number_of(arrival.rgb()))
    assert numbers == list(range(250))
    assert firsts == 1
    assert heard.counts["reconnects"] == 1


def test_a_file_that_is_cut_off_on_the_server(mp4):
    heard = Heard()
    with web({"/clip.mp4": whole(mp4[: len(mp4) // 2])}) as site:
        numbers = numbered(open_source(f"{site}/clip.mp4", QUICK), None, heard)
    assert numbers == list(range(len(numbers)))
    assert 50 < len(numbers) < 200
    assert heard.notices[-1] == ("damaged", "the recording is cut off: it stops before its end")
    assert heard.counts["damaged"] >= 1


def test_a_stream_that_stops_without_a_length_is_lost(stream):
    heard = Heard()
    with web({"/live.ts": unsized(stream[: len(stream) // 2 // 188 * 188])}) as site:
        source = open_source(f"{site}/live.ts", QUICK)
        arrivals = []
        for arrival in source.arrivals(threading.Event(), heard):
            arrivals.append(arrival)
            if sum(arrival.is_first for arrival in arrivals) == 2:
                break
        assert source.is_live
    assert heard.counts["reconnects"] == 1
    assert heard.kinds == ["connected", "reconnecting", "connected"]
    assert arrivals[-1].pts == arrivals[0].pts


def test_motion_jpeg_has_no_times():
    parts = b"".join(
        b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"
        % (len(data), data)
        for data in map(jpeg, range(10))
    )
    with web({"/video": unsized(parts, "multipart/x-mixed-replace; boundary=frame")}) as site:
        arrivals = take(open_source(f"{site}/video", QUICK), 10)
        assert [arrival.pts for arrival in arrivals] == [None] * 10
        assert numbered(open_source(f"{site}/video", QUICK), 10) == list(range(10))


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (status(401), "user and password are missing or wrong"),
        (status(403), "user and password are missing or wrong"),
        (status(404), "the server has nothing at this path"),
        (status(400), "the server refuses the request"),
        (whole(b"only words\n" * 100, "text/plain"), "is not a video"),
        (whole(b"<html>no video here</html>\n" * 100, "text/html"), "is not a video"),
        (whole(jpeg(1), "image/jpeg"), "is a still image"),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_fails_at_once(page, message):
    heard = Heard()
    with web({"/x": page}) as site:
        address = site.replace("//", "//bob:s3cret@")
        began = time.monotonic()
        with pytest.raises(InputError, match=message) as error:
            take(open_source(f"{address}/x", QUICK), None, heard)
    assert time.monotonic() - began < 1
    assert "s3cret" not in str(error.value)
    assert error.value.where == f"{site}/x"
    assert heard.notices == []


def test_a_codec_that_nothing_decodes(mp4):
    with (
        web({"/clip.mp4": whole(mp4.replace(b"avc1", b"zzzz"))}) as site,
        pytest.raises(InputError, match="the video's codec is not supported"),
    ):
        take(open_source(f"{site}/clip.mp4", QUICK))


def test_a_recording_whose_connection_fails_behind_its_end_is_over(mp4):
    heard = Heard()
    rest = mp4 + b"\0\0\1\0free" + bytes(248)
    with web({"/clip.mp4": unranged(rest, cuts=[len(mp4) + 20, len(mp4) + 20])}) as site:
        numbers = numbered(open_source(f"{site}/clip.mp4", QUICK), None, heard)
    assert numbers == list(range(250))
    assert heard.kinds == ["connected"]


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), "fltp", "mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with (
        web({"/sound.mp4": ranged(path.read_bytes(), cuts=[])}) as site,
        pytest.raises(InputError, match="has no video stream, only audio"),
    ):
        take(open_source(f"{site}/sound.mp4", QUICK))


def test_an_error_of_the_server_is_waited_for(mp4):
    answers = [status(503), whole(mp4)]
    heard = Heard()
    with web({"/clip.mp4": lambda request: answers.pop(0)(request)}) as site:
        assert len(take(open_source(f"{site}/clip.mp4", QUICK), None, heard)) == 250
    assert heard.kinds == ["reconnecting", "connected"]
    assert "5xx" in heard.text


def test_a_path_that_is_gone_only_for_a_while(stream):
    part = unsized(stream[: len(stream) // 188 // 2 * 188])
    answers = [part, status(404), part]
    heard = Heard()
    with web({"/live": lambda request: answers.pop(0)(request)}) as site:
        source = open_source(f"{site}/live", QUICK)
        firsts = 0
        for arrival in source.arrivals(threading.Event(), heard):
            firsts += arrival.is_first
            if firsts == 2:
                break
    assert heard.kinds == ["connected", "reconnecting", "reconnecting", "connected"]


def test_a_file_with_its_index_at_the_end_needs_ranges(mp4):
    index = mp4.index(b"moov") - 4
    data = mp4.index(b"mdat") - 4
    moved = mp4[:index] + mp4[data:] + mp4[index:data]
    options = replace(QUICK, reconnect_for=0.5)
    with (
        web({"/clip.mp4": whole(moved)}) as site,
        pytest.raises(InputError, match="faststart"),
    ):
        take(open_source(f"{site}/clip.mp4", options))


def test_a_playlist_cannot_reach_a_file(tmp_path, stream):
    (tmp_path / "secret.ts").write_bytes(stream)
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    pages = {
        "/good.m3u8": whole(playlist.format("clip.ts").encode()),
        "/bad.m3u8": whole(playlist.format(f"file://{tmp_path}/secret.ts").encode()),
        "/clip.ts": whole(stream),
    }
    heard = Heard()
    with web(pages) as site:
        assert len(take(open_source(f"{site}/good.m3u8", QUICK), None, heard)) == 250
        assert heard.kinds == ["connected"]
        with pytest.raises(InputError):
            take(open_source(f"{site}/bad.m3u8", replace(QUICK, reconnect_for=0.5)))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A playlist, and its pieces of one second by their paths."""
    folder = tmp_path_factory.mktemp("hls")
    clip = encode(folder / "clip.ts", 150, options={"g": "25"})
    with av.open(str(clip)) as source, av.open(str(folder / "x.m3u8"), "w", format="hls",
        options={"hls_time": "1", "hls_list_size": "0"}) as target:  # fmt: skip
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    playlist = (folder / "x.m3u8").read_text()
    return playlist, {f"/{path.name}": whole(path.read_bytes()) for path in folder.glob("x*.ts")}


def test_a_playlist_that_grows_and_ends(pieces):
    playlist, segments = pieces
    finished = playlist.encode()
    growing = ["".join(playlist.partition(f"x{last}.ts\n")[:2]).encode() for last in (3, 3, 4, 4)]
    heard = Heard()
    # Each new piece comes only after a second, the time between two looks at the playlist.
    options = replace(QUICK, read_timeout=0.6, reconnect_for=10.0)
    with web({
        "/x.m3u8": lambda request: whole(growing.pop(0) if growing else finished)(request),
        **segments,
    }) as site:  # fmt: skip
        source = open_source(f"{site}/x.m3u8", options)
        assert source.is_live
        numbers = numbered(source, None, heard)
    assert numbers == list(range(numbers[0], 150))
    assert numbers[0] <= 50
    assert heard.kinds.count("connected") == 1
