"""`stts-export watch`."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from stts_export.cli.common import (
    Arguments,
    backend_options,
    generation_options,
    overlay_files,
    sampling_of,
)
from stts_export.errors import InputError, SttsError

if TYPE_CHECKING:
    from stts_export.cli.watch_screen import Screen
    from stts_export.live.live_overlay import LiveOverlay
    from stts_export.live.metrics import Metrics, StreamMeter
    from stts_export.live.sources import Source
    from stts_export.live.stream import LiveStream
    from stts_export.runtime.session import Session

_TICK_SECONDS = 0.1
"""How often signals and the time are looked at."""
_STOP_SECONDS = 0.5
"""How long threads may take to end when they are told to."""
_END_SECONDS = 5.0
"""How long they may take when their streams have ended."""
_RESCUE_SECONDS, _GRACE_SECONDS = 0.5, 0.9
"""From a signal to the finishing of pictures and to the end of the process, whatever hangs."""
_ZERO = re.compile(r"\s*0+(?:\.0*)?\s*(?:ms|s|m|h)?\s*")

_SETTINGS = (
    "mode", "fps", "prune_ratio", "min_prune_ratio", "max_prune_ratio", "gate", "queue",
    "max_new_tokens",
)  # fmt: skip
_DURATIONS = ("every", "window", "latency", "segment")


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument(
        "source", nargs="*",
        help="video file, folder of images, address (rtsp, http, udp), camera (/dev/video0), or "
        "gst: and a GStreamer pipeline; several are watched at the same time",
    )  # fmt: skip
    verb.add_argument(
        "--source", dest="sources", action="append", default=[], metavar="SOURCE",
        help="another source (repeatable)",
    )  # fmt: skip
    verb.add_argument("-p", "--prompt", required=True, help="the question")
    _question_options(verb)
    _source_options(verb)
    generation_options(verb)
    verb.add_argument(
        "--for", dest="duration", metavar="DURATION", help="stop after this time; never if absent"
    )
    backend_options(verb)
    verb.add_argument("--device", help="cpu (default) or cuda; for engines cuda or cuda:N")
    verb.add_argument("--threads", type=int, help="threads within an operator; all cores if absent")
    verb.add_argument("--json", action="store_true", help="print one JSON object per line")
    verb.add_argument(
        "--metrics", metavar="[HOST:]PORT",
        help="show metrics to Prometheus; to this machine only without a host",
    )  # fmt: skip
    verb.add_argument(
        "--overlay", type=Path, metavar="OUT",
        help="draw kept and removed windows: OUT.mp4 (and a contact sheet OUT.png of the newest "
        "answer beside it), or OUT.png for the sheet alone; of several sources OUT-1, OUT-2 and "
        "so on",
    )  # fmt: skip


def _question_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--every", metavar="DURATION", help="time between questions (2s)")
    verb.add_argument(
        "--window", metavar="DURATION",
        help="how far back a question sees (30s, or what the bundle takes)",
    )  # fmt: skip
    verb.add_argument(
        "--latency", metavar="DURATION",
        help="how long an answer may take: the prune ratio follows; a fixed ratio if absent",
    )  # fmt: skip
    verb.add_argument(
        "--mode", choices=("exact", "incremental"),
        help="encode the window as one clip (exact, default), or put it into the KV cache in "
        "segments as it comes",
    )  # fmt: skip
    verb.add_argument(
        "--segment", metavar="DURATION", help="longest segment of the incremental mode (4s)"
    )
    verb.add_argument("--fps", type=float, help="frames to sample per second; as trained if absent")
    verb.add_argument(
        "--prune-ratio", type=float, help="fraction of windows to remove; as trained if absent"
    )
    verb.add_argument(
        "--min-prune-ratio", type=float, metavar="R", help="lowest ratio with --latency (0.1)"
    )
    verb.add_argument(
        "--max-prune-ratio", type=float, metavar="R", help="highest ratio with --latency (0.9)"
    )
    verb.add_argument(
        "--gate", type=float, metavar="LEVELS",
        help="skip frames that nowhere differ from the last one by so many levels of 255; 8 lets "
        "noise go by",
    )  # fmt: skip
    verb.add_argument(
        "--queue", type=int, metavar="N", help="most sampled frames that wait for the model (8)"
    )
    verb.add_argument(
        "--drop", choices=("newest", "wait"),
        help="when frames come too fast, keep the newest (default of live sources) or let the "
        "source wait (of files)",
    )  # fmt: skip
    verb.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (64)")


def _source_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--realtime", action="store_true", help="play files at their own pace, as a camera would"
    )
    verb.add_argument(
        "--transport", choices=("tcp", "udp"), help="how RTSP sends its packets (tcp)"
    )
    verb.add_argument(
        "--connect-timeout", metavar="DURATION", help="longest wait for a connection (5s)"
    )
    verb.add_argument(
        "--stall-timeout", metavar="DURATION",
        help="time without a frame after which a connection is lost (5s)",
    )  # fmt: skip
    verb.add_argument(
        "--give-up-after", metavar="DURATION",
        help="time without a frame after which a lost source is given up (30s); 0: at once",
    )  # fmt: skip
    verb.add_argument(
        "--decoder", choices=("auto", "software", "cuda"),
        help="decode on the GPU where that works (auto, default), never, or always",
    )  # fmt: skip
    verb.add_argument(
        "--folder-fps", type=float, metavar="FPS", help="images of a folder per second (2)"
    )


def run(arguments: Arguments) -> int:
    from stts_export.live.metrics import Metrics, parse_address
    from stts_export.live.settings import seconds
    from stts_export.runtime.session import Session

    settings = _settings(arguments)
    duration = None if arguments.duration is None else seconds(arguments.duration, "--for")
    address = None if arguments.metrics is None else parse_address(arguments.metrics)
    given = _given(arguments)
    overlays = overlay_files(arguments.overlay, given)
    sources = _opened(given, arguments)
    metrics = None if address is None else Metrics()
    session = Session.open(
        arguments.bundle,
        arguments.backend,
        arguments.device,
        arguments.threads,
        arguments.plugin,
    )
    # Stop guards the closing of all that is opened within it.
    with _Stop(duration) as stop, session, ExitStack() as outputs:
        watch = _Watch(session, sources, settings, overlays, metrics, outputs)
        if metrics is not None and address is not None:
            say(f"metrics: {metrics.serve(*address)}")
        return watch.run(stop, arguments.json)


def _settings(arguments: Arguments) -> dict[str, Any]:
    """Settings of every stream that were given, for `Session.stream`."""
    from stts_export.live.settings import seconds

    given = {name: getattr(arguments, name) for name in (*_DURATIONS, *_SETTINGS)}
    settings = {name: value for name, value in given.items() if value is not None}
    for name in _DURATIONS:
        if name in settings:
            seconds(settings[name], f"--{name}")
    return {
        **settings,
        "prompt": arguments.prompt,
        "policy": arguments.drop,
        "sampling": sampling_of(arguments),
        "stop": tuple(arguments.stop),
    }


def _given(arguments: Arguments) -> list[str]:
    given = [*arguments.source, *arguments.sources]
    if not given:
        raise InputError(
            "there is no source", where="watch", fix="name one after the bundle, or with --source"
        )
    return given


def _opened(given: Sequence[str], arguments: Arguments) -> list[Source]:
    """Check sources before anything is loaded."""
    from stts_export.live.settings import seconds
    from stts_export.live.sources import SourceOptions, open_source

    timeouts = {
        "connect_timeout": "connect_timeout",
        "read_timeout": "stall_timeout",
        "reconnect_for": "give_up_after",
    }
    options: dict[str, Any] = {"realtime": arguments.realtime}
    for field in ("transport", "decoder", "folder_fps"):
        if getattr(arguments, field) is not None:
            options[field] = getattr(arguments, field)
    for field, option in timeouts.items():
        text = getattr(arguments, option)
        if text is not None:
            name = f"--{option.replace('_', '-')}"
            is_zero = field == "reconnect_for" and _ZERO.fullmatch(text)
            options[field] = 0.0 if is_zero else seconds(text, name)
    return [open_source(source, SourceOptions(**options)) for source in given]


class _Watch:
    """Streams of a session, and where their events go.

    Args:
        session: answers.
        sources: one stream each.
        settings: of all streams.
        overlays: a picture per stream, or none.
        metrics: get times and counts.
        outputs: closes metrics and pictures.
    """

    def __init__(
        self,
        session: Session,
        sources: Sequence[Source],
        settings: dict[str, Any],
        overlays: Sequence[Path],
        metrics: Metrics | None,
        outputs: ExitStack,
    ) -> None:
        from stts_export.live.live_overlay import LiveOverlay

        grid = session.config.vision.window_grid
        self.outputs = outputs
        self.pictures = [outputs.enter_context(LiveOverlay(path, grid)) for path in overlays]
        observers: list[LiveOverlay | None] = [*self.pictures] or [None] * len(sources)
        self.streams: list[LiveStream] = []
        self.meters: dict[str, StreamMeter] = {}
        for source, observer in zip(sources, observers, strict=True):
            meter = None if metrics is None else metrics.meter()
            stream = session.stream(source, observer=observer, meter=meter, **settings)
            self.streams.append(stream)
            if metrics is not None and meter is not None:
                metrics.add(stream, meter)
                self.meters[stream.name] = meter
        if metrics is not None:
            outputs.enter_context(metrics)

    def run(self, stop: _Stop, as_json: bool) -> int:
        """Start the streams, and print what they report until all have ended or `stop` is due.

        Returns:
            The exit code. A thread that hangs ends the process instead.
        """
        from stts_export.cli.watch_screen import Screen

        stop.pictures = self.pictures
        with ExitStack() as running:
            for stream in self.streams:
                running.enter_context(stream)
            is_heard = True
            try:
                with Screen(self.streams, as_json) as screen:
                    code = self._follow(screen, stop)
            except BrokenPipeError:
                code, is_heard = 1, False
            has_ended = _close(self.streams, _STOP_SECONDS if stop.is_due() else _END_SECONDS)
            self.outputs.close()
            if is_heard and not as_json:
                for path in (path for picture in self.pictures for path in picture.written):
                    say(f"wrote {path}")
            if not has_ended:
                _leave(code)
        return code

    def _follow(self, screen: Screen, stop: _Stop) -> int:
        from stts_export.live.events import LiveAnswer, LiveEnd
        from stts_export.live.stream import merged

        code, is_stopping = 0, False
        for event in merged(self.streams, _TICK_SECONDS):
            if event is None:
                if is_stopping:
                    break
            else:
                if isinstance(event, LiveAnswer) and event.stream in self.meters:
                    self.meters[event.stream].answered(event)
                if isinstance(event, LiveEnd) and event.error is not None:
                    code = code or _exit_code(event.error)
                screen.show(event)
            if not is_stopping:
                screen.refresh()
                is_stopping = stop.is_due()
                if is_stopping:
                    _tell_to_stop(self.streams)
        if stop.code == 128 + signal.SIGINT:
            screen.print("interrupted")
        return stop.code or code


def say(line: str) -> None:
    """Print a line on stderr; when nobody takes it, that is no reason to end."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _exit_code(error: Exception) -> int:
    return error.exit_code if isinstance(error, SttsError) else 1


def _tell_to_stop(streams: Sequence[LiveStream]) -> None:
    for stream in streams:
        stream.close(0)


def _close(streams: Sequence[LiveStream], seconds: float) -> bool:
    """Stop all streams at once; False when a thread of theirs hangs."""
    deadline = time.monotonic() + seconds
    _tell_to_stop(streams)
    ended = [stream.close(max(0.0, deadline - time.monotonic())) for stream in streams]
    return all(ended)


def _leave(code: int) -> None:
    """End the process although threads run: a library's blocking call cannot be ended."""
    for file in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if file is not None:
                file.flush()
    os._exit(code)


class _Stop:
    """What ends a watch early: Ctrl-C, SIGTERM, or its time.

    Signals only make a note, so that all is closed in order. Once one came, the process ends within
    a second, even if that hangs, and all further ones are ignored.

    Args:
        duration: seconds from entering on; None: for ever.
    """

    def __init__(self, duration: float | None) -> None:
        self.code: int | None = None
        """Exit code; None while nothing ended it."""
        self.pictures: Sequence[LiveOverlay] = ()
        """What is finished before a process that hangs is ended."""
        self._duration = duration
        self._deadline: float | None = None
        self._asked, self._over = Event(), Event()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        if self._duration is not None:
            self._deadline = time.monotonic() + self._duration
        if current_thread() is main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and `&` want it
                    self._previous[number] = signal.signal(number, self._signalled)
        Thread(target=self._guard, name="stop", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        is_signalled = self.code is not None and self.code > 128
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if is_signalled else handler or signal.SIG_DFL)
        self._over.set()
        self._asked.set()

    def is_due(self) -> bool:
        """Whether the watch is to end."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._ask(0)
        return self.code is not None

    def _signalled(self, number: int, _: FrameType | None) -> None:
        self._ask(128 + number)

    def _ask(self, code: int) -> None:
        # A second signal in the middle of `set` would wait for its lock for ever.
        if self.code is None:
            self.code = code
            self._asked.set()

    def _guard(self) -> None:
        self._asked.wait()
        deadline = time.monotonic() + _GRACE_SECONDS
        if self._over.wait(_RESCUE_SECONDS):
            return
        # In threads of their own: one that draws at this moment is waited for.
        rescues = [Thread(target=picture.close, daemon=True) for picture in self.pictures]
        for rescue in rescues:
            rescue.start()
        if not self._over.wait(max(0.0, deadline - time.monotonic())):
            for picture in self.pictures:
                picture.discard()
            os._exit(self.code or 0)
