"""GStreamer pipelines as sources: for what FFmpeg does not decode, such as on Jetson's hardware."""

from __future__ import annotations

import os
import re
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from threading import Event
from typing import Any

import av
from av.codec.hwaccel import HWAccel
from av.container import InputContainer

from stts_export.errors import InputError, MissingDependencyError
from stts_export.live.sources.connection import Address, Connection, Patience
from stts_export.live.sources.failures import LostError, UnusableError
from stts_export.live.sources.frames import Extent
from stts_export.live.sources.network import ConnectedSource
from stts_export.live.sources.options import SourceOptions, refuse_cuda
from stts_export.live.sources.redaction import redacted_text, redacted_words, secrets_of

PROGRAM = "gst-launch-1.0"

_TRY = f"try it by itself with {PROGRAM}"

_GLANCE = 0.1
"""Seconds between two looks at `stop`."""
_EXIT = 2.0
"""Seconds that a pipeline gets to exit after it closed its output."""
_LINES = 50
"""Lines that are kept of what a pipeline says."""
_ENDLESS = frozenset(
    "rtspsrc rtmpsrc rtmp2src srtsrc udpsrc tcpclientsrc v4l2src libcamerasrc nvv4l2camerasrc "
    "nvarguscamerasrc".split()
)
"""Elements whose end is a loss: a server that dies is the end of the stream to rtspsrc."""
_HOPELESS = re.compile(
    r"erroneous pipeline|missing a plug-in|not-linked|not-negotiated|not-supported|unauthorized|"
    r"forbidden| \(4\d\d\)",
    re.IGNORECASE,
)
"""What a pipeline says that is wrong itself, or was refused by a server; all else may pass."""


class GStreamerSource(ConnectedSource):
    """Frames of a pipeline, which runs in a process of its own and decodes them itself.

    When a camera or a server is lost, or not there yet, the pipeline is started again as a network
    source is connected again; when another pipeline ends, so does the source.

    Args:
        pipeline: as gst-launch-1.0 takes it, up to an element that gives raw video.
        options: timeouts.

    Raises:
        InputError: it cannot be split into words, or is empty, or FFmpeg is to decode on the GPU.
        MissingDependencyError: gst-launch-1.0 is not installed.
    """

    gave_up_fix = f"{ConnectedSource.gave_up_fix}; {_TRY}"

    def __init__(self, pipeline: str, options: SourceOptions) -> None:
        self._words = _words(pipeline)
        name = "gst:" + " ".join(redacted_words(self._words))
        refuse_cuda(options, name, "the pipeline decodes")
        super().__init__(Address("", name, "matroska"), replace(options, decoder="software"))
        self.is_live = "filesrc" not in self._words
        if shutil.which(PROGRAM) is None:
            raise MissingDependencyError(
                f"{PROGRAM} is not installed",
                where=name,
                fix="sudo apt-get install gstreamer1.0-tools gstreamer1.0-plugins-good "
                "gstreamer1.0-plugins-bad gstreamer1.0-libav",
            )

    def connect(self, patience: Patience, acceleration: HWAccel | None, stop: Event) -> Connection:
        """Start the pipeline; raises what `Connection` does."""
        pipeline = _Pipeline(self._words, self.name, patience, stop)
        try:
            return _PipelineConnection(self._address, patience, pipeline)
        except BaseException as error:
            try:
                if isinstance(error, (LostError, UnusableError)) and not stop.is_set():
                    pipeline.check("the pipeline ends without a frame")
                raise
            finally:
                pipeline.close()


class _Pipeline:
    """A running pipeline; a file to read its output from, which waits no longer than it may.

    Args:
        words: of the pipeline.
        name: for messages.
        patience: how long to wait.
        stop: ends all waiting.
    """

    def __init__(self, words: list[str], name: str, patience: Patience, stop: Event) -> None:
        self.name = name
        self.seconds = patience.connect
        """To wait for output."""
        self.is_endless = not _ENDLESS.isdisjoint(words)
        self._secrets = secrets_of(words)
        self._stop = stop
        self._has_ended = False
        self._said: deque[str] = deque(maxlen=_LINES)
        self._output, write = os.pipe()
        try:
            self._process = _start(words, write)
        except OSError:
            os.close(self._output)
            raise
        finally:
            os.close(write)
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)
        self._listener = threading.Thread(
            target=self._said.extend, args=(self._process.stderr,), daemon=True
        )
        self._listener.start()

    def read(self, size: int) -> bytes:
        """Read what is there, up to a size; nothing at the end and after `stop`."""
        deadline = time.monotonic() + self.seconds
        while not self._stop.is_set():
            if self._poll.poll(_GLANCE * 1000):
                data = os.read(self._output, size)
                self._has_ended = not data
                return data
            if time.monotonic() > deadline:
                raise LostError("nothing came", self.seconds)
        return b""

    def check(self, ended: str | None = None) -> None:
        """See how the pipeline ended, if it did.

        Args:
            ended: what is wrong when it just ended; None when nothing is.

        Raises:
            LostError: its camera or server is away.
            UnusableError: it failed or should not have ended.
        """
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT if self._has_ended else 0)
        status = self._process.returncode
        reason = ended
        if status is not None:
            self._listener.join(_EXIT)
        if status:
            reason = f"the pipeline fails: {self._complaint(status)}"
        if status is not None and reason is not None:
            if self.is_endless and not any(map(_HOPELESS.search, self._said)):
                raise LostError(reason)
            raise UnusableError(InputError(reason, where=self.name, fix=_TRY))

    def _complaint(self, status: int) -> str:
        """The first line that says what is wrong, as others follow from it; or the last line."""
        lines = [line.strip() for line in self._said if line.strip()]
        telling = [line for line in lines if line.startswith(("ERROR: from", "WARNING: err"))]
        line = telling[0] if telling else lines[-1] if lines else f"exit status {status}"
        return redacted_text(line, self._secrets).rstrip(".")

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()
        self._listener.join()
        assert self._process.stderr is not None
        self._process.stderr.close()
        os.close(self._output)


class _PipelineConnection(Connection):
    """Reads the output of a pipeline, and closes it."""

    def __init__(self, address: Address, patience: Patience, pipeline: _Pipeline) -> None:
        self._pipeline = pipeline

        def opener(_: str, *, hwaccel: object, timeout: object, **settings: Any) -> InputContainer:
            container: InputContainer = av.open(pipeline, "r", **settings)
            return container

        super().__init__(address, patience, None, opener)
        pipeline.seconds = patience.read

    def __exit__(self, *details: object) -> None:
        super().__exit__(*details)
        self._pipeline.close()

    def reaches_end(self, extent: Extent) -> bool:
        """Whether the pipeline came to its end; raises what `_Pipeline.check` does."""
        self._pipeline.check()
        return not self._pipeline.is_endless


def _start(words: list[str], write: int) -> subprocess.Popen[str]:
    # Not to the standard output: some decoders print there.
    tail = "! videoconvert ! video/x-raw,format=I420 ! matroskamux streamable=true ! fdsink fd="
    return subprocess.Popen(
        [PROGRAM, "-q", *words, *f"{tail}{write}".split()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=[write],
        env=os.environ | {"LC_ALL": "C"},
        text=True,
        errors="replace",
    )


def _words(pipeline: str) -> list[str]:
    try:
        words = shlex.split(pipeline)
    except ValueError as error:
        raise InputError(
            f"the pipeline cannot be read: {error}", where="gst", fix="check its quotes"
        ) from None
    if not words:
        raise InputError(
            "the pipeline is empty", where="gst", allowed="gst:rtspsrc location=... ! ..."
        )
    return words
