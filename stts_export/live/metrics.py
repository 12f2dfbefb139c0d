"""What Prometheus reads about running streams."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from stts_export.errors import InputError, MissingDependencyError
from stts_export.live.events import Counters, LiveAnswer

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.registry import Collector

_Value = TypeVar("_Value")

_LOCAL = "127.0.0.1"
_ADDRESS = re.compile(
    r"(?:(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:\[\]/@]+)):)?(?P<port>\d{1,5})"
)
_HIGHEST_PORT = 65535
_POLL_SECONDS = 0.05
"""How long `close` may wait for the server's thread."""

_BUCKETS = (
    0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0,
    60.0,
)  # fmt: skip
"""Seconds: from a stage on a GPU to an answer on a small CPU."""
_FRAMES = ("decoded", "sampled", "gated", "dropped", "encoded")
_COUNTS = {
    "damaged": ("damaged_packets", "Packets that could not be decoded."),
    "repaired_times": ("repaired_times", "Frames whose time was missing or impossible."),
    "reconnects": ("reconnects", "Connections after the first one."),
    "answers": ("answers", "Answers."),
    "skipped_questions": ("skipped_questions", "Questions that a newer one replaced."),
    "dropped_events": ("dropped_events", "Events that nobody fetched in time."),
}
"""Field of `Counters`: name and help of its metric."""


class Watched(Protocol):
    """What is read from a stream whenever somebody asks."""

    @property
    def name(self) -> str:
        """Value of the label `stream`."""

    @property
    def counters(self) -> Counters:
        """What has been counted so far."""

    @property
    def queue_depth(self) -> int:
        """Sampled frames that wait."""

    @property
    def last_answer(self) -> LiveAnswer | None:
        """The newest answer."""

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame."""


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of "9100", "0.0.0.0:9100" or "[::1]:9100"; 127.0.0.1 without a host.

    Raises:
        InputError: it is none of these.
    """
    match = _ADDRESS.fullmatch(text.strip())
    if not match or not match["port"].isascii() or int(match["port"]) > _HIGHEST_PORT:
        raise InputError(
            f"the address is {text!r}",
            where="metrics",
            allowed=f"a port (0 to {_HIGHEST_PORT}; 0 takes a free one), or with a host, as "
            "9100, 0.0.0.0:9100, [::1]:9100",
        )
    return match["v6"] or match["host"] or _LOCAL, int(match["port"])


class StreamMeter:
    """Meter of one stream: to be opened with it, then given to `Metrics.add` with the stream."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.name = ""
        """Of the stream."""

    def stage(self, name: str, seconds: float) -> None:
        """Count how long a stage took."""
        self._metrics.stages.labels(self.name, name).observe(seconds)

    def answered(self, answer: LiveAnswer) -> None:
        """Count how long an answer and its first token took."""
        self._metrics.latencies.labels(self.name).observe(answer.latency)
        self._metrics.first_tokens.labels(self.name).observe(answer.first_token)


class Metrics:
    """Metrics of some streams in a registry of their own, and the server that shows them.

    Counts and gauges are read from the streams when somebody asks; only times are collected. Close
    it, or use it as a context manager.

    Raises:
        MissingDependencyError: prometheus-client is not installed.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Histogram
        except ModuleNotFoundError:
            raise MissingDependencyError(
                "needs the package prometheus_client",
                where="metrics",
                fix="pip install 'stts-export[metrics]'",
            ) from None

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"stts_{name}_seconds", text, ("stream", *labels), buckets=_BUCKETS,
                registry=self.registry,
            )  # fmt: skip

        self.registry = CollectorRegistry()
        self.stages = histogram("stage", "Time of a stage.", "stage")
        self.latencies = histogram(
            "answer_latency", "From the frame with which a question fell due to its answer."
        )
        self.first_tokens = histogram(
            "first_token", "From the frame with which a question fell due to the first token."
        )
        self._streams: list[Watched] = []
        self._server: _Server | None = None
        self.registry.register(cast("Collector", _Streams(self._streams)))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def meter(self) -> StreamMeter:
        """Return what a stream reports its times to."""
        return StreamMeter(self)

    def add(self, stream: Watched, meter: StreamMeter) -> None:
        """Show a stream's counts from now on, and its times under its name.

        Raises:
            InputError: there is one of this name, and nobody could tell them apart.
        """
        if any(other.name == stream.name for other in self._streams):
            raise InputError(
                f"there are two streams called {stream.name!r}",
                where="metrics",
                fix="give each its own name",
            )
        meter.name = stream.name
        self._streams.append(stream)

    def serve(self, host: str, port: int) -> str:
        """Answer to HTTP in a thread of its own, until `close`.

        Returns:
            The address.

        Raises:
            InputError: the port is taken or not allowed, or the host is not this machine.
        """
        from prometheus_client import make_wsgi_app

        shown = f"[{host}]" if ":" in host else host
        try:
            server = (_ServerV6 if ":" in host else _Server)((host, port), _Request)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"cannot listen there: {reason}",
                where=f"metrics {shown}:{port}",
                fix="choose another port, above 1023, and an address of this machine",
            ) from None
        server.set_app(make_wsgi_app(self.registry))
        self._server = server
        Thread(
            target=server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True
        ).start()
        return f"http://{shown}:{server.server_port}/metrics"

    def close(self) -> None:
        """Stop the server; what was collected stays."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Streams:
    """Asks the streams when a registry is asked."""

    def __init__(self, streams: Sequence[Watched]) -> None:
        self._streams = streams

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all streams as they are now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        def gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
            family = GaugeMetricFamily(f"stts_{name}", text, labels=("stream",))
            for stream, value in values.items():
                family.add_metric((stream,), value)
            return family

        streams = list(self._streams)
        counts = {stream.name: asdict(stream.counters) for stream in streams}
        frames = CounterMetricFamily(
            "stts_frames",
            "Frames that were decoded; of them sampled; of these gated, dropped or encoded.",
            labels=("stream", "outcome"),
        )
        for name, values in counts.items():
            for outcome in _FRAMES:
                frames.add_metric((name, outcome), values[outcome])
        yield frames
        for field, (metric, text) in _COUNTS.items():
            family = CounterMetricFamily(f"stts_{metric}", text, labels=("stream",))
            for name, values in counts.items():
                family.add_metric((name,), values[field])
            yield family
        waiting = {stream.name: stream.queue_depth for stream in streams}
        yield gauge("queue_depth", "Sampled frames that wait.", waiting)
        times = {stream.name: stream.time for stream in streams}
        yield gauge("stream_time_seconds", "Time of the newest frame.", _known(times))
        answers = _known({stream.name: stream.last_answer for stream in streams})
        kept = {name: _kept_fraction(answer) for name, answer in answers.items()}
        yield gauge("kept_fraction", "Windows that the newest answer kept, of all.", kept)
        ratios = {name: answer.prune_ratio for name, answer in answers.items()}
        yield gauge("prune_ratio", "Prune ratio of the newest answer.", ratios)


def _known(values: Mapping[str, _Value | None]) -> dict[str, _Value]:
    return {name: value for name, value in values.items() if value is not None}


def _kept_fraction(answer: LiveAnswer) -> float:
    return answer.kept_windows / max(answer.total_windows, 1)


class _Request(WSGIRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing: a scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # On Windows it would share a taken port instead of refusing it.
    allow_reuse_address = os.name == "posix"

    def server_bind(self) -> None:
        """Bind without the lookup of the host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep a client that hangs up from filling the terminal."""
        logging.getLogger(__name__).info("metrics for %s failed", client_address, exc_info=True)


class _ServerV6(_Server):
    address_family = socket.AF_INET6
