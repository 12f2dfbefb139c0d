"""Metrics: what is read from streams, and the server that shows it."""

from __future__ import annotations

import http.client
import socket
import sys
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from stts_export.errors import InputError, MissingDependencyError
from stts_export.live import metrics as module
from stts_export.live.metrics import Metrics, StreamMeter, parse_address
from tests.live.fakes import COUNTERS, FakeStream, answer


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    with Metrics() as opened:
        yield opened


def _added(metrics: Metrics, stream: FakeStream) -> StreamMeter:
    meter = metrics.meter()
    metrics.add(stream, meter)
    return meter


def _scrape(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Values by name, stream and other labels."""
    with urlopen(metrics.serve("127.0.0.1", 0), timeout=10) as reply:
        text = reply.read().decode()
    metrics.close()
    return {
        (sample.name, sample.labels.pop("stream"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0", ("127.0.0.1", 0)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),
        ("[::1]:9100", ("::1", 9100)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]):
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":9100",
        "65536",
        "-1",
        "9100:",
        "::1:9100",
        "[::1]",
        "a b:1",
        "http://h:1",
        "٣",
        "1.5",
    ],
)
def test_what_is_no_address(text: str):
    with pytest.raises(
        InputError, match=r"metrics: the address is .*\n.* 0\.0\.0\.0:9100, \[::1\]"
    ):
        parse_address(text)


def test_counts_are_those_of_the_stream(metrics: Metrics):
    _added(metrics, FakeStream("cam", time=12.5))
    values = _scrape(metrics)
    for outcome in ("decoded", "sampled", "gated", "dropped", "encoded"):
        assert values["stts_frames_total", "cam", outcome] == getattr(COUNTERS, outcome)
    for field in ("repaired_times", "reconnects", "answers", "skipped_questions", "dropped_events"):
        assert values[f"stts_{field}_total", "cam"] == getattr(COUNTERS, field)
    assert values["stts_damaged_packets_total", "cam"] == COUNTERS.damaged
    assert values["stts_queue_depth", "cam"] == 4
    assert values["stts_stream_time_seconds", "cam"] == 12.5


def test_what_is_not_known_yet_is_left_out(metrics: Metrics):
    _added(metrics, FakeStream("cam"))
    names = {name for name, *_ in _scrape(metrics)}
    assert not names & {"stts_stream_time_seconds", "stts_kept_fraction", "stts_prune_ratio"}


def test_streams_are_read_when_somebody_asks(metrics: Metrics):
    stream = FakeStream("cam")
    _added(metrics, stream)
    _scrape(metrics)
    stream.counters = COUNTERS.plus(encoded=1)
    stream.last_answer = answer(kept_windows=6, total_windows=24, prune_ratio=0.75)
    values = _scrape(metrics)
    assert values["stts_frames_total", "cam", "encoded"] == COUNTERS.encoded + 1
    assert values["stts_kept_fraction", "cam"] == 0.25
    assert values["stts_prune_ratio", "cam"] == 0.75


def test_times_go_into_histograms(metrics: Metrics):
    meter = _added(metrics, FakeStream("cam"))
    other = _added(metrics, FakeStream("door"))
    meter.stage("prefill", 0.004)
    meter.stage("prefill", 59.0)
    meter.stage("decode", 61.0)
    meter.answered(answer(latency=0.41, first_token=0.03))
    other.answered(answer(latency=2.5))
    values = _scrape(metrics)
    stage = "stts_stage_seconds"
    assert values[f"{stage}_count", "cam", "prefill"] == 2
    assert values[f"{stage}_sum", "cam", "prefill"] == pytest.approx(59.004)
    buckets = {key[1:]: value for key, value in values.items() if key[0] == f"{stage}_bucket"}
    assert buckets["cam", "0.005", "prefill"] == 1
    assert buckets["cam", "60.0", "prefill"] == 2
    assert buckets["cam", "60.0", "decode"] == 0
    assert buckets["cam", "+Inf", "decode"] == 1
    assert values["stts_answer_latency_seconds_sum", "cam"] == 0.41
    assert values["stts_answer_latency_seconds_sum", "door"] == 2.5
    assert values["stts_first_token_seconds_sum", "cam"] == 0.03


def test_any_name_is_a_label(metrics: Metrics):
    name = 'gst: a="b"\\ ! \n c'
    _added(metrics, FakeStream(name))
    assert _scrape(metrics)["stts_queue_depth", name] == 4


def test_two_streams_of_one_name_are_refused(metrics: Metrics):
    _added(metrics, FakeStream("cam"))
    with pytest.raises(InputError, match="two streams called 'cam'"):
        _added(metrics, FakeStream("cam"))


def test_nothing_is_shared(metrics: Metrics):
    before = {family.name for family in REGISTRY.collect()}
    _added(metrics, FakeStream("cam")).stage("decode", 1.0)
    with Metrics() as other:
        _added(other, FakeStream("cam"))
        assert ("stts_stage_seconds_count", "cam", "decode") not in _scrape(other)
    assert {family.name for family in REGISTRY.collect()} == before


def test_close_stops_the_server_and_frees_its_port(metrics: Metrics):
    url = metrics.serve("127.0.0.1", 0)
    port = int(url.removeprefix("http://127.0.0.1:").removesuffix("/metrics"))
    assert urlopen(url, timeout=10).status == 200
    metrics.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
    metrics.serve("127.0.0.1", port)
    metrics.close()
    metrics.close()


def test_a_taken_port(metrics: Metrics):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"metrics 127\.0\.0\.1:{port}: cannot listen there"):
            metrics.serve("127.0.0.1", port)


def test_a_host_that_is_not_this_machine(metrics: Metrics):
    with pytest.raises(InputError, match="an address of this machine"):
        metrics.serve("192.0.2.1", 0)


def test_a_port_that_is_not_allowed(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module._Server, "server_bind", refused)
    with pytest.raises(
        InputError, match=r"Permission denied\n  fix: choose another port, above 1023"
    ):
        metrics.serve("127.0.0.1", 80)


def test_ipv6(metrics: Metrics):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    url = metrics.serve("::1", 0)
    assert url.startswith("http://[::1]:")
    assert urlopen(url, timeout=10).status == 200


def test_no_name_is_looked_up_to_serve(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "getfqdn", None)
    assert urlopen(metrics.serve("127.0.0.1", 0), timeout=10).status == 200


def test_a_client_that_hangs_up_is_no_news(
    metrics: Metrics, capsys, monkeypatch: pytest.MonkeyPatch
):
    def reset(*_: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(module._Server, "finish_request", reset)
    url = metrics.serve("127.0.0.1", 0)
    with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
        urlopen(url, timeout=10)
    metrics.close()
    assert capsys.readouterr().err == ""


def test_requests_are_not_logged(metrics: Metrics, capsys):
    _scrape(metrics)
    assert capsys.readouterr().err == ""


def test_without_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'stts-export\[metrics\]'"):
        Metrics()
    assert parse_address("9100") == ("127.0.0.1", 9100)
