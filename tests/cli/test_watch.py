"""`watch`: what it prints where, how it ends, and what it passes on."""

from __future__ import annotations

import array
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import termios
import textwrap
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from urllib.request import urlopen

import av
import numpy as np
import pytest

from stts_export import Session
from stts_export.cli import main, watch, watch_screen
from stts_export.errors import InputError, MissingDependencyError
from stts_export.live import metrics as live_metrics
from stts_export.live import settings as live_settings
from stts_export.live import sources as live_sources
from stts_export.live import stream as live_stream
from stts_export.live.events import Counters, LiveEnd, LiveEvent, LiveNotice
from stts_export.runtime.logits import Sampling
from tests.helpers import write_video
from tests.live import fakes
from tests.live.fakes import FakeStream, answer

QUESTION = "What colour is the square?"
PACED = ["--realtime", "--every", "500ms"]
END_SECONDS = 2.0
"""From a signal to the end of the process: a second, and what a busy machine needs to notice."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten seconds: 21 samples at 2 per second."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 80)


class _Session:
    """Opens streams that are ready."""

    def __init__(self, streams: list[FakeStream]) -> None:
        self.streams = list(streams)
        self.calls: list[dict[str, Any]] = []
        self.config = Namespace(vision=Namespace(window_grid=fakes.GRID))

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, *_: object) -> None:
        assert not any(stream.is_open for stream in self.streams)

    def stream(self, source: Any, **options: Any) -> FakeStream:
        self.calls.append({"source": source, **options})
        return self.streams[len(self.calls) - 1]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch, video: Path) -> Callable[..., tuple[int, _Session]]:
    """Watches streams in place of real ones."""

    def run(streams: list[FakeStream], *options: str) -> tuple[int, _Session]:
        session = _Session(streams)
        monkeypatch.setattr(Session, "open", lambda *_: session)
        monkeypatch.setattr(live_stream, "merged", fakes.merged)
        sources = [word for _ in streams for word in ("--source", str(video))]
        return main(["watch", "bundle", *sources, "-p", QUESTION, *options]), session

    return run


def _end(stream: str = "cam", error: Exception | None = None) -> LiveEnd:
    counts = Counters(decoded=97, sampled=13, dropped=1, answers=6)
    return LiveEnd(stream, 12.0, counts, error)


EVENTS: list[LiveEvent] = [
    LiveNotice("cam", "connected", "1280x720, h264"),
    answer((12.0, 13.0, 14.0), text="A person.", latency=0.412, prune_ratio=0.5),
    LiveNotice("cam", "gap", "no frame for 2 s", 14.0),
    _end(),
]


def test_lines_for_people(watched, capsys):
    code, _ = watched([FakeStream(events=EVENTS)])
    assert code == 0
    printed = capsys.readouterr()
    assert printed.out == "12.0-14.0 s  A person.   (kept 9/18, ratio 0.50, 0.41 s)\n"
    assert printed.err.splitlines() == [
        "connected: 1280x720, h264",
        "14.0 s  gap: no frame for 2 s",
        "ended at 12.0 s: 97 frames, 13 sampled, 1 dropped, 6 answers",
    ]


def test_names_are_shown_where_there_are_several(watched, capsys):
    door: list[LiveEvent] = [answer(stream="door"), _end("door")]
    streams = [FakeStream("cam", EVENTS), FakeStream("door", door)]
    assert watched(streams)[0] == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["[cam]", "[door]"]
    assert [line.split()[0] for line in printed.err.splitlines()] == ["[cam]"] * 3 + ["[door]"]


def test_every_event_is_a_line_of_json(watched, capsys):
    error = InputError("is lost", where="cam")
    assert watched([FakeStream(events=[*EVENTS[:-1], _end(error=error)])], "--json")[0] == 1
    printed = capsys.readouterr()
    lines = [json.loads(line) for line in printed.out.splitlines()]
    assert [line["event"] for line in lines] == ["notice", "answer", "notice", "end"]
    assert lines[1]["text"] == "A person."
    assert lines[3]["error"] == "cam: is lost"
    assert printed.err == "error: cam: is lost\n"


def test_text_cannot_steer_the_terminal(watched, capsys):
    bad, good = "a\n\x1b[2J\r\x9b\u202e\ud800b", "caf\u00e9 \u6771 \U0001f468\u200d\U0001f469"
    events: list[LiveEvent] = [
        answer(text=bad, stream="\x1b]0;x\x07"),
        LiveNotice("cam", "damaged", "\x1b[31m"),
        answer(text=good),
        _end(),
    ]
    assert watched([FakeStream(events=events), FakeStream("b")])[0] == 0
    printed = capsys.readouterr()
    first, second = printed.out.splitlines()
    assert r"a\n\x1b[2J\r\x9b\u202e\ud800b" in first
    assert first.startswith(r"[\x1b]0;x\x07] ")
    assert good in second
    assert r"damaged: \x1b[31m" in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_stream_that_fails_does_not_end_the_others(watched, capsys, options: list[str]):
    lost = MissingDependencyError("no decoder", where="a", fix="install it")
    other = InputError("is lost", where="b")
    streams = [
        FakeStream("a", [_end("a", lost)]),
        FakeStream("b", [_end("b", other)]),
        FakeStream("c", [answer(stream="c"), _end("c")]),
    ]
    assert watched(streams, *options)[0] == 4
    printed = capsys.readouterr()
    assert "error: a: no decoder\n  fix: install it\n" in printed.err
    assert "error: b: is lost\n" in printed.err
    assert "red" in printed.out


def test_a_bug_keeps_its_traceback(watched, capsys):
    def bug() -> None:
        print(1 / 0)

    with pytest.raises(ZeroDivisionError) as raised:
        bug()
    assert watched([FakeStream(events=[_end(error=raised.value), answer()])])[0] == 1
    printed = capsys.readouterr()
    assert "in bug" in printed.err
    assert "ZeroDivisionError: division by zero" in printed.err
    assert "red" in printed.out


def test_it_stops_after_its_time(watched, capsys):
    stream = FakeStream(is_endless=True, events=[answer()])
    code, _ = watched([stream], "--for", "200ms")
    assert code == 0
    assert stream.closed
    assert "red" in capsys.readouterr().out


def test_a_thread_that_hangs_ends_with_the_process(watched, monkeypatch: pytest.MonkeyPatch):
    class _Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise _Left(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(watch, "_GRACE_SECONDS", 60.0)
    stream = FakeStream(is_endless=True, hangs=True)
    with pytest.raises(_Left, match="0"):
        watched([stream], "--for", "100ms")
    with pytest.raises(_Left, match="1"):
        watched([FakeStream(hangs=True, events=[_end(error=InputError("x"))])])


def test_all_streams_are_told_to_stop_before_one_is_waited_for(
    watched, monkeypatch: pytest.MonkeyPatch
):
    def closed_pipe(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(watch_screen.Screen, "show", closed_pipe)
    timed = [FakeStream("a", is_endless=True), FakeStream("b", is_endless=True)]
    unheard = [FakeStream("a", [answer()]), FakeStream("b")]
    assert watched(timed, "--for", "100ms")[0] == 0
    assert watched(unheard)[0] == 1
    for stream in (*timed, *unheard):
        assert stream.closed[0] == 0


def test_settings_are_passed_on(watched, tmp_path: Path):
    options = (
        "--every 4s --window 20s --latency 500ms --mode incremental --segment 2s --fps 1 "
        "--prune-ratio 0.4 --min-prune-ratio 0.2 --max-prune-ratio 0.8 --gate 3 --queue 5 "
        "--drop wait --max-new-tokens 9 --temperature 0.5 --seed 3 --stop x --stop y"
    )
    _, session = watched([FakeStream()], *options.split())
    [call] = session.calls
    del call["source"]
    assert call == {
        "prompt": QUESTION, "every": "4s", "window": "20s", "latency": "500ms",
        "mode": "incremental", "segment": "2s", "fps": 1.0, "prune_ratio": 0.4,
        "min_prune_ratio": 0.2, "max_prune_ratio": 0.8, "gate": 3.0, "queue": 5, "policy": "wait",
        "max_new_tokens": 9, "sampling": Sampling(temperature=0.5, seed=3), "stop": ("x", "y"),
        "observer": None, "meter": None,
    }  # fmt: skip
    live_settings.StreamSettings(
        **{name: value for name, value in call.items() if name not in ("observer", "meter")}
    )


def test_what_is_not_given_is_left_to_the_library(watched):
    _, session = watched([FakeStream()])
    [call] = session.calls
    assert set(call) == {
        "source", "prompt", "policy", "sampling", "stop", "max_new_tokens", "observer", "meter"
    }  # fmt: skip
    assert (call["policy"], call["stop"]) == (None, ())


def test_how_sources_are_read_is_passed_on(watched, monkeypatch: pytest.MonkeyPatch):
    calls = []
    monkeypatch.setattr(live_sources, "open_source", lambda *given: calls.append(given))
    options = (
        "--realtime --transport udp --connect-timeout 1s --stall-timeout 500ms "
        "--give-up-after 2m --decoder software --folder-fps 4"
    )
    watched([FakeStream()], *options.split())
    zeros = ("0", "0s", "0ms", " 0.0 m ")
    for zero in zeros:
        watched([FakeStream()], "--give-up-after", zero)
    watched([FakeStream()])
    assert [given for _, given in calls] == [
        live_sources.SourceOptions(True, "udp", 1.0, 0.5, 120.0, "software", 4.0),
        *[live_sources.SourceOptions(reconnect_for=0.0)] * len(zeros),
        live_sources.SourceOptions(),
    ]


def test_choices_are_those_of_the_library():
    parser = ArgumentParser()
    watch.options(parser)
    choices = {name: action.choices for name, action in parser._option_string_actions.items()}
    assert choices["--mode"] == live_settings.MODES
    assert choices["--drop"] == live_settings.POLICIES
    assert choices["--transport"] == get_args(live_sources.Transport)
    assert choices["--decoder"] == get_args(live_sources.Decoder)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--every", "soon"], "--every: --every is 'soon'"),
        (["--window", "0"], "--window is '0'"),
        (["--latency", "-1s"], "--latency is '-1s'"),
        (["--segment", "4 parsecs"], "as 500ms, 2s, 1.5m, 1h"),
        (["--for", "x"], "--for is 'x'"),
        (["--connect-timeout", "0"], "--connect-timeout is '0'"),
        (["--stall-timeout", "x"], "--stall-timeout is 'x'"),
        (["--give-up-after", "x"], "--give-up-after is 'x'"),
        (["--give-up-after", "0x"], "--give-up-after is '0x'"),
        (["--source", ""], "the source is empty"),
        (["--source", "rtsp://cam:99999/x"], "the port is '99999'"),
        (["--folder-fps", "0"], "folder_fps is 0.0"),
        (["--metrics", "65536"], "the address is '65536'"),
        (["--overlay", "out.gif"], "a name in .mp4 or .png"),
        (["--overlay", "none/out.mp4"], "cannot be written"),
        (["--top-k", "3"], "add a temperature"),
        (["--source", "/none.mp4"], "there is no such file or folder"),
    ],
)
def test_bad_options_are_found_before_the_bundle_is_opened(
    video: Path, capsys, monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
):
    monkeypatch.setattr(Session, "open", None)
    words = [word.replace("-1s", "--latency=-1s") for word in options if options[1] == "-1s"][1:]
    assert main(["watch", "bundle", str(video), "-p", QUESTION, *(words or options)]) == 1
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""
    assert printed.err.count("error:") == 1


def test_without_a_source(capsys):
    assert main(["watch", "bundle", "-p", QUESTION]) == 1
    assert "there is no source\n  fix: name one after the bundle" in capsys.readouterr().err


def test_several_sources(video: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def opened(spec: str, _: object) -> None:
        calls.append(spec)
        if len(calls) == 3:
            raise InputError("enough")

    monkeypatch.setattr(live_sources, "open_source", opened)
    assert main(["watch", "bundle", "a", "b", "-p", "x", "--source", "c"]) == 1
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize(
    "words",
    [
        ["watch", "bundle", "x", "-p", "q", "rtsp://admin:s3 cret@cam/x"],
        ["watch", "bundle", "x", "-p", "q", "admin:s3cret@cam"],
        ["watch", "bundle", "x", "-p", "q", "--fps", "rtsp://admin:s3cret@cam/x"],
        ["watch", "bundle", "x", "-p", "q", "--mode=rtsp://admin:s3'cret@cam/x"],
        ["watch", "bundle", "x", "-p", "q", "--s=rtsp://admin:s3cret@cam/x"],
        ["run", "bundle", "x", "-p", "q", "rtsp://cam/user=admin&password=s3cret"],
        ["rtsp://admin:s3cret@cam/x"],
    ],
)
def test_usage_errors_show_no_password(words: list[str], capsys):
    with pytest.raises(SystemExit):
        main(words)
    printed = capsys.readouterr().err
    assert "error: " in printed
    assert "cam" in printed
    assert "s3" not in printed
    assert "cret" not in printed


def test_the_source_is_never_written_over(video: Path, capsys):
    before = video.read_bytes()
    assert main(["watch", "bundle", str(video), "-p", "x", "--overlay", str(video)]) == 1
    assert "would be overwritten" in capsys.readouterr().err
    assert video.read_bytes() == before


def test_without_the_metrics_library(video: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr(Session, "open", None)
    assert main(["watch", "bundle", str(video), "-p", "x", "--metrics", "0"]) == 4
    assert "pip install 'stts-export[metrics]'" in capsys.readouterr().err


def test_a_taken_port_is_found_before_a_stream_starts(watched, capsys):
    stream = FakeStream(events=EVENTS)
    with live_metrics.Metrics() as other:
        port = other.serve("127.0.0.1", 0).split(":")[-1].removesuffix("/metrics")
        assert watched([stream], "--metrics", port)[0] == 1
    printed = capsys.readouterr()
    assert "cannot listen there" in printed.err
    assert printed.out == ""
    assert stream.closed == []


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["watch", "--help"])
    text = capsys.readouterr().out
    assert "usage: stts-export watch" in text
    assert all(option in text for option in ("--every", "--give-up-after", "[HOST:]PORT", "--for"))
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "    watch " in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_gets_a_row_per_stream_below_the_lines(
    watched, capsys, monkeypatch: pytest.MonkeyPatch, options: list[str]
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    streams = [
        FakeStream("cam", [answer(), _end()], time=14.0, last_answer=answer(latency=0.41)),
        FakeStream("door", [_end("door")]),
    ]
    assert watched(streams, *options)[0] == 0
    printed = capsys.readouterr()
    row = "14.0 s  13 frames  1 dropped  queue 4  kept 0.50, ratio 0.50, 0.41 s"
    assert f"\x1b[?7l[cam] {row}\x1b[?7h\n" in printed.err
    assert "[door] no frame yet  13 frames" in printed.err
    drawn = printed.err.count(row)
    assert drawn > 0
    # Two rows: up one, and all below is cleared, as often as they were drawn.
    assert printed.err.count("\r\x1b[1A\x1b[J") == drawn
    assert not printed.err.endswith("\x1b[?7h")
    assert "\x1b" not in printed.out


def test_rows_are_drawn_again_twice_a_second(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    times = iter([100.0, 100.1, 100.49, 100.5, 100.6, 100.7])
    monkeypatch.setattr(watch_screen, "time", Namespace(monotonic=lambda: next(times)))
    screen = watch_screen.Screen([FakeStream()], as_json=False)
    seen = []
    for _ in range(5):
        screen.refresh()
        seen.append(capsys.readouterr().err.count("queue 4"))
    assert seen == [1, 0, 0, 1, 0]
    screen.print("x")
    screen.refresh()
    assert capsys.readouterr().err.count("queue 4") == 1


def test_rows_fit_the_terminal(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    size = Namespace(get_terminal_size=lambda: os.terminal_size((80, 4)))
    monkeypatch.setattr(watch_screen, "shutil", size)
    screen = watch_screen.Screen([FakeStream(f"s{n}") for n in range(9)], as_json=False)
    screen.refresh()
    assert capsys.readouterr().err.count("\n") == 2
    screen.clear()
    assert capsys.readouterr().err == "\r\x1b[2A\x1b[J"


def test_what_is_logged_does_not_end_up_in_a_row(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        with watch_screen.Screen([FakeStream()], as_json=False) as screen:
            screen.refresh()
            logging.getLogger("stts_export").warning("full")
            assert capsys.readouterr().err.endswith("\r\x1b[Jfull\n")
        assert handler.filters == []
    finally:
        logging.getLogger().removeHandler(handler)


# From here on with real streams.


@pytest.fixture
def words(text_bundle: Path, video: Path) -> list[str]:
    return [
        "watch", str(text_bundle), str(video), "-p", QUESTION, "--threads", "1",
        "--max-new-tokens", "4",
    ]  # fmt: skip


def test_a_video_is_watched_to_its_end(words: list[str], tmp_path: Path, capsys):
    overlay = tmp_path / "out.mp4"
    assert main([*words, "--overlay", str(overlay)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("0.0-2.0 s  ")
    assert "(kept 40/80, ratio 0.50, " in lines[0]
    assert lines[-1].startswith("6.5-10.0 s  ")
    assert "ended at 10.0 s: 80 frames, 21 sampled, 0 dropped, 5 answers\n" in printed.err
    assert f"wrote {overlay}\nwrote {tmp_path / 'out.png'}\n" in printed.err
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    with av.open(str(overlay)) as container:
        times = [float(frame.time or 0) for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(22) / 2, atol=1e-3)


def test_two_sources_as_json_with_a_picture_each(words: list[str], tmp_path: Path, capsys):
    options = ["--source", words[2], "--json", "--overlay", str(tmp_path / "out.png")]
    assert main([*words, *options]) == 0
    printed = capsys.readouterr()
    events = [json.loads(line) for line in printed.out.splitlines()]
    names = {words[2], f"{words[2]} (2)"}
    assert {event["stream"] for event in events} == names
    for name in names:
        kinds = [event["event"] for event in events if event["stream"] == name]
        assert kinds.count("answer") == 5
        assert kinds[-1] == "end"
    assert printed.err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-1.png", "out-2.png"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--every", "0.3s"], "every is 0.3s"),
        (["--window", "60s"], "window"),
        (["--prune-ratio", "1"], "ratio"),
        (["--gate", "-1"], "gate is -1.0"),
        (["--queue", "0"], "queue is 0"),
        (["--fps", "0"], "fps is 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--stop", ""], "none of them empty"),
        (["-p", " "], "empty"),
        (["--temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_bad_settings_are_found_before_a_thread_starts(
    words: list[str], capsys, monkeypatch: pytest.MonkeyPatch, options: list[str], text: str
):
    monkeypatch.setattr(live_stream.LiveStream, "__enter__", None)
    monkeypatch.setattr(live_metrics.Metrics, "serve", None)
    assert main([*words, "--metrics", "0", *options]) == 1
    printed = capsys.readouterr()
    assert text in printed.err
    assert printed.out == ""
    assert printed.err.count("error:") == 1


def _start(
    words: list[str], before: str = "", shell: str = "", **options: Any
) -> subprocess.Popen[str]:
    """Run the command after some code, as a terminal would: Ctrl-C is not ignored.

    Args:
        words: of the command.
        before: what runs before it.
        shell: where its output goes, in the shell's words.
        options: for `Popen`.
    """
    code = f"import sys\n{textwrap.dedent(before)}\nfrom stts_export.cli import main\n"
    command = [sys.executable, "-c", f"{code}sys.exit(main(sys.argv[1:]))", *words]
    return subprocess.Popen(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command] if shell else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def _end_after(process: subprocess.Popen[str], number: signal.Signals) -> tuple[str, str]:
    """Signal a process that is to end within a second."""
    sent = time.monotonic()
    process.send_signal(number)
    try:
        printed = process.communicate(timeout=30)
    finally:
        process.kill()
    assert time.monotonic() - sent < END_SECONDS
    return printed


def test_metrics_while_it_runs_and_ctrl_c(words: list[str], tmp_path: Path):
    process = _start([*words, *PACED, "--metrics", "0", "--overlay", str(tmp_path / "out.mp4")])
    assert process.stdout is not None
    assert process.stderr is not None
    url = process.stderr.readline().removeprefix("metrics: ").strip()
    assert process.stdout.readline().startswith("0.0-0.5 s")
    text = urlopen(url, timeout=10).read().decode()
    label = f'stream="{words[2]}"'
    for name in ("stts_answers_total", "stts_answer_latency_seconds_count"):
        [count] = re.findall(rf"{name}\{{{re.escape(label)}\}} (.*)", text)
        assert float(count) >= 1
    assert f'stts_stage_seconds_count{{stage="vision_lower",{label}}}' in text
    assert f"stts_prune_ratio{{{label}}} 0.5" in text
    _, err = _end_after(process, signal.SIGINT)
    assert process.returncode == 130
    assert "interrupted\n" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4", "out.png"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 3


def test_terminated(words: list[str]):
    process = _start([*words, *PACED, "--json"])
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "answer":
        pass
    out, err = _end_after(process, signal.SIGTERM)
    assert process.returncode == 143
    assert json.loads(out.splitlines()[-1])["event"] == "end"
    assert err == ""


HANGS = """
from stts_export.live.sources.file import FileSource
real = FileSource.arrivals
def arrivals(self, stop, report):
    import time
    for number, arrival in enumerate(real(self, stop, report)):
        if number == 40:
            time.sleep(60)
        yield arrival
FileSource.arrivals = arrivals
"""


DRAWING_HANGS = """
from stts_export.live import live_overlay
real, calls = live_overlay.write_contact_sheet, []
def hangs(*given, **named):
    import time
    calls.append(given)
    if len(calls) > 4:
        time.sleep(60)
    real(*given, **named)
live_overlay.write_contact_sheet = hangs
"""

AT_EXIT = """
import atexit, time
def linger():
    print("exits", flush=True)
    time.sleep(0.5)
atexit.register(linger)
"""


def test_ctrl_c_while_a_source_hangs(words: list[str], tmp_path: Path):
    process = _start([*words, "--overlay", str(tmp_path / "out.mp4")], HANGS)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.readline()
    _, err = _end_after(process, signal.SIGINT)
    assert process.returncode == 130
    assert "interrupted\n" in err
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10


def test_terminated_while_nobody_reads(words: list[str]):
    process = _start([*words, "--json", "--every", "500ms"], pipesize=4096)
    assert process.stdout is not None
    _fill(process)
    sent = time.monotonic()
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - sent < END_SECONDS
    process.communicate()


def test_a_reader_that_has_enough(words: list[str]):
    process = _start([*words, *PACED])
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""
    process.stderr.close()


def test_a_source_that_cannot_be_reached_while_another_goes_on(words: list[str], capsys):
    lost = ["--source", "http://me:secret@127.0.0.1:1/x.mp4", "--give-up-after", "0"]
    assert main([*words, *lost]) == 1
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 5
    assert printed.err.count("error: http://127.0.0.1:1/x.mp4: ") == 1
    assert "[http://127.0.0.1:1/x.mp4] ended before its first frame: 0 frames" in printed.err
    assert "secret" not in printed.out + printed.err


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
def test_stdout_that_takes_nothing(words: list[str], options: list[str], redirection: str):
    process = _start([*words, *options], shell=redirection)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Error" not in err
    assert "Traceback" not in err
    assert '"text"' not in err


@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-"])
def test_stderr_that_takes_nothing(words: list[str], tmp_path: Path, redirection: str):
    overlay = ["--overlay", str(tmp_path / "out.mp4")]
    process = _start([*words, *overlay, "--metrics", "0"], shell=redirection)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = out.splitlines()
    assert len(lines) == 5
    assert all("(kept " in line for line in lines)
    process = _start(["watch", "bundle", "/none.mp4", "-p", "x"], shell=redirection)
    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 1


def _fill(process: subprocess.Popen[str]) -> None:
    """Wait until a line of JSON does not fit into the pipe any more."""
    waiting = array.array("i", [0])
    while waiting[0] < 3000:
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)  # type: ignore[arg-type]
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("before", "names"), [("", ["out.mp4", "out.png"]), (DRAWING_HANGS, ["out.png"])]
)
def test_pictures_while_nobody_reads(
    words: list[str], tmp_path: Path, before: str, names: list[str]
):
    options = ["--json", "--every", "500ms", "--overlay", str(tmp_path / "out.mp4")]
    process = _start([*words, *options], before, pipesize=4096)
    _fill(process)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - sent < END_SECONDS
    process.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if "out.mp4" in names:
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) >= 3


def test_three_signals_in_a_row(words: list[str]):
    process = _start([*words, *PACED], AT_EXIT)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    while process.stdout.readline() != "exits\n":
        pass
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
