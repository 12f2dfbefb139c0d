"""Clips whose frames show their number, a reporter that remembers, and servers on this machine."""

from __future__ import annotations

import io
import itertools
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from stts_export.live.sources import Arrival, Source, SourceOptions

HEIGHT, WIDTH, BITS = 64, 96, 11
QUICK = SourceOptions(decoder="software", connect_timeout=2.0, read_timeout=1.0, reconnect_for=3.0)


class Heard:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()

    def notice(self, kind: str, message: str) -> None:
        self.notices.append((kind, message))

    def count(self, **counts: int) -> None:
        self.counts.update(counts)

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.notices]

    @property
    def text(self) -> str:
        return "\n".join(message for _, message in self.notices)


def take(
    source: Source,
    count: int | None = None,
    heard: Heard | None = None,
    stop: threading.Event | None = None,
) -> list[Arrival]:
    """The first frames of a source, or all of them."""
    arrivals = source.arrivals(stop or threading.Event(), heard or Heard())
    return list(itertools.islice(arrivals, count))


def numbered(source: Source, count: int | None = None, heard: Heard | None = None) -> list[int]:
    """The numbers that the frames of a source show."""
    arrivals = source.arrivals(threading.Event(), heard or Heard())
    return [number_of(arrival.rgb()) for arrival in itertools.islice(arrivals, count)]


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.01)


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A frame that shows its number in binary, as vertical stripes."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], dtype=np.uint8)
    stripes = bits[np.arange(width) * BITS // width] * 255
    return np.repeat(np.broadcast_to(stripes, (height, width))[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    height, width = frame.shape[:2]
    columns = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    levels = frame[height // 4 : height // 2, columns].mean(axis=(0, 2))
    return sum(1 << bit for bit, level in enumerate(levels) if level > 127)


def encode(
    path: Path,
    count: int,
    *,
    rate: int = 25,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264",
    start: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    faststart = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=faststart) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        x264 = {"g": "10", "bf": "0", "threads": "1", "preset": "ultrafast"}
        stream.options = (x264 if codec == "libx264" else {}) | (options or {})
        for number in range(count):
            image = picture(start + number, *size)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(number)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RtspServer:
    """GStreamer's RTSP server in a process of its own, that can be killed and started again."""

    def __init__(self, video: Path, *arguments: str) -> None:
        self.port = free_port()
        script = Path(__file__).with_name("rtsp_server.py")
        self._command = ["/usr/bin/python3", str(script), str(video), str(self.port), *arguments]
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def url(self, credentials: str = "", path: str = "live") -> str:
        return f"rtsp://{credentials}127.0.0.1:{self.port}/{path}"

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "listening\n"

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


Page = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def web(pages: dict[str, Page]) -> Iterator[str]:
    """Serve pages by their paths; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                pages.get(self.path.partition("?")[0], status(404))(self)
            except OSError:
                self.close_connection = True  # the reader went away

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            assert isinstance(sys.exc_info()[1], OSError)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def status(code: int) -> Page:
    return lambda request: request.send_error(code)


def whole(data: bytes, kind: str = "application/octet-stream") -> Page:
    """All of it, with its length."""

    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return page


def ranged(data: bytes, *, cuts: list[int]) -> Page:
    """Byte ranges; every answer but the last ones ends at a place in the data before its end."""

    def page(request: BaseHTTPRequestHandler) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", "bytes=0-"))
        assert asked is not None
        first = int(asked[1])
        request.send_response(206)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(data) - first))
        request.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        request.wfile.write(data[first : cuts.pop(0) if cuts else None])

    return page


def unranged(data: bytes, *, cuts: list[int]) -> Page:
    """As `whole`; every answer but the last ones ends at a place in the data before its end."""

    def page(request: BaseHTTPRequestHandler) -> None:
        whole(data)(request) if not cuts else _cut(data, cuts.pop(0))(request)

    return page


def _cut(data: bytes, at: int) -> Page:
    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data[:at])

    return page


def unsized(data: bytes, kind: str = "video/mp2t") -> Page:
    """Some data, and then the connection is closed: nothing says that it was all."""

    def page(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.end_headers()
        request.wfile.write(data)

    return page


@contextmanager
def silent_server() -> Iterator[int]:
    """Accepts connections and says nothing; yields the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield int(listener.getsockname()[1])
