from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from stts_export.errors import InputError
from stts_export.live.sources import open_source
from tests.live.sources.helpers import QUICK, Heard, encode, free_port, take, unsized, web, whole

PACKET = 188


def _packets(data: bytes) -> list[bytes]:
    return [data[at : at + PACKET] for at in range(0, len(data), PACKET)]


def _damaged(data: bytes, share: float) -> bytes:
    """Some packets are missing, as many are overwritten; the first ones, tables, are whole."""
    chance = random.Random(7)
    packets = _packets(data)
    kept = packets[:4]
    for packet in packets[4:]:
        fate = chance.random()
        if fate < share:
            continue
        kept.append(packet[:8] + bytes(PACKET - 8) if fate < 2 * share else packet)
    return b"".join(kept)


@contextmanager
def _sent(data: bytes, port: int, rate: float) -> Iterator[None]:
    """Send it over UDP again and again until the end."""
    over = threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not over.is_set():
                for at in range(0, len(data), 7 * PACKET):
                    sender.sendto(data[at : at + 7 * PACKET], ("127.0.0.1", port))
                    if over.wait(7 * PACKET / rate):
                        return

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_loss_and_damage_leave_the_other_frames(tmp_path):
    data = encode(tmp_path / "clip.ts", 400).read_bytes()
    heard = Heard()
    with web({"/clip.ts": whole(_damaged(data, 0.03))}) as site:
        arrivals = take(open_source(f"{site}/clip.ts", QUICK), None, heard)
    assert 200 < len(arrivals) < 400
    assert heard.counts["damaged"] > 10
    assert heard.kinds.count("damaged") == 1, "one notice, however many packets"
    times = [arrival.pts for arrival in arrivals if arrival.pts is not None]
    assert times[-1] - times[0] > 14


def test_udp(tmp_path):
    data = encode(tmp_path / "clip.ts", 250, options={"g": "5"}).read_bytes()
    port, heard = free_port(), Heard()
    source = open_source(f"udp://127.0.0.1:{port}", replace(QUICK, reconnect_for=10.0))
    with _sent(data, port, len(data) / 2.5):
        arrivals = take(source, 60, heard)
    assert len(arrivals) == 60
    assert arrivals[0].rgb().shape == (64, 96, 3)
    assert heard.counts["reconnects"] == 0


def test_udp_without_a_sender():
    source = open_source(f"udp://127.0.0.1:{free_port()}", replace(QUICK, reconnect_for=1.0))
    began = time.monotonic()
    with pytest.raises(InputError, match="cannot be reached: nothing came"):
        take(source)
    assert time.monotonic() - began < 2


def test_udp_that_falls_silent(tmp_path):
    data = encode(tmp_path / "clip.ts", 250, options={"g": "5"}).read_bytes()
    port, heard = free_port(), Heard()
    source = open_source(f"udp://127.0.0.1:{port}", replace(QUICK, reconnect_for=2.0))
    arrivals = source.arrivals(threading.Event(), heard)
    with _sent(data, port, len(data) / 2.5):
        next(arrivals)
    with pytest.raises(InputError, match="is lost: nothing came"):
        list(arrivals)
    assert heard.kinds[:2] == ["connected", "reconnecting"]


def test_a_new_size(tmp_path):
    small = encode(tmp_path / "small.ts", 50).read_bytes()
    large = encode(tmp_path / "large.ts", 50, size=(128, 192)).read_bytes()
    heard = Heard()
    with web({"/x": whole(small + large + small)}) as site:
        arrivals = take(open_source(f"{site}/x", QUICK), None, heard)
    assert len(arrivals) > 140
    messages = [message for kind, message in heard.notices if kind == "resolution"]
    assert messages == [
        "frames are 192x128 now, after 96x64",
        "frames are 96x64 now, after 192x128",
    ]


def test_pixels_have_the_new_size(tmp_path):
    small = encode(tmp_path / "small.ts", 30).read_bytes()
    large = encode(tmp_path / "large.ts", 30, size=(128, 192)).read_bytes()
    path = tmp_path / "both.ts"
    path.write_bytes(small + large)
    heard = Heard()
    arrivals = open_source(path).arrivals(threading.Event(), heard)
    shapes = {arrival.rgb().shape for arrival in arrivals}
    assert shapes == {(64, 96, 3), (128, 192, 3)}
    assert heard.kinds == ["resolution"]


def _without_times(data: bytes) -> bytes:
    """A transport stream in which every second frame has no time."""
    packets = [bytearray(packet) for packet in _packets(data)]
    number = 0
    for packet in packets:
        start = 4 + (1 + packet[4] if packet[3] & 0x20 else 0)
        if not packet[1] & 0x40 or bytes(packet[start : start + 4]) != b"\0\0\1\xe0":
            continue
        number += 1
        if number % 2 == 0:
            packet[start + 7] &= 0x3F  # no PTS and DTS; their bytes become stuffing
            length = packet[start + 8]
            packet[start + 9 : start + 9 + length] = b"\xff" * length
    return b"".join(map(bytes, packets))


def test_times_reach_us_as_they_are(tmp_path: Path):
    data = encode(tmp_path / "clip.ts", 50).read_bytes()
    jump = encode(tmp_path / "other.ts", 20).read_bytes()
    with web({"/x": unsized(_without_times(data) + jump)}) as site:
        arrivals = take(open_source(f"{site}/x", QUICK), 65)
    times = [arrival.pts for arrival in arrivals]
    assert times[:6] == [0.0, None, 0.08, None, 0.16, None]
    again = times.index(0.0, 1)
    assert times[again : again + 3] == [0.0, 0.04, 0.08]
    assert [arrival.is_first for arrival in arrivals[1:]] == [False] * 64
