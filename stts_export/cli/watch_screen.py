"""What `stts-export watch` prints."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from threading import RLock
from traceback import format_exception
from types import TracebackType

from stts_export.cli.watch import say
from stts_export.errors import SttsError
from stts_export.live.events import LiveAnswer, LiveEnd, LiveEvent, LiveNotice, json_line
from stts_export.live.metrics import Watched

_REDRAW_SECONDS = 0.5
_JOINERS = "\u200c\u200d"
"""Not printable by themselves; words of some scripts, and emoji, are spelled with them."""
_UP, _CLEAR_BELOW = "\x1b[{}A", "\x1b[J"
_NO_WRAP, _WRAP = "\x1b[?7l", "\x1b[?7h"


class Screen:
    """Lines of events on stdout and stderr, and on a terminal a row per stream below them.

    Args:
        streams: what is watched.
        as_json: every event is a line of JSON on stdout.
    """

    def __init__(self, streams: Sequence[Watched], as_json: bool) -> None:
        self._streams = streams
        self._as_json = as_json
        self._is_terminal = sys.stderr.isatty()
        self._rows = 0
        self._drawn_at = -_REDRAW_SECONDS
        # Other threads log.
        self._lock = RLock()
        self._log_handlers = list(logging.getLogger().handlers) if self._is_terminal else []

    def __enter__(self) -> Screen:
        for handler in self._log_handlers:
            handler.addFilter(self._before_log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handler in self._log_handlers:
            handler.removeFilter(self._before_log)
        if kind is None:
            self.clear()

    def show(self, event: LiveEvent) -> None:
        """Print an event; why a stream failed is always said on stderr.

        Raises:
            BrokenPipeError: stdout takes nothing more, or was never there.
        """
        if self._as_json:
            self._tell(json_line(event))
        elif isinstance(event, LiveAnswer):
            self._tell(f"{self._name(event.stream)}{answer_line(event)}")
        elif isinstance(event, LiveNotice):
            self.print(f"{self._name(event.stream)}{notice_line(event)}")
        else:
            self.print(f"{self._name(event.stream)}{end_line(event)}")
        if isinstance(event, LiveEnd) and isinstance(event.error, SttsError):
            self.print(f"error: {event.error}")
        elif isinstance(event, LiveEnd) and event.error is not None:
            self.print("".join(format_exception(event.error)).rstrip())

    def print(self, line: str) -> None:
        """Print a line on stderr."""
        with self._lock:
            self.clear()
            say(line)

    def _tell(self, line: str) -> None:
        """Print a line on stdout."""
        with self._lock:
            self.clear()
            if sys.stdout is None:
                raise BrokenPipeError
            try:
                print(line, flush=True)
            except OSError as error:
                raise BrokenPipeError from error

    def refresh(self) -> None:
        """Draw the rows again where they are old or were cleared for a line."""
        if not self._is_terminal:
            return
        with self._lock:
            now = time.monotonic()
            if self._rows and now - self._drawn_at < _REDRAW_SECONDS:
                return
            self.clear()
            shown = self._streams[: max(1, shutil.get_terminal_size().lines - 1)]
            rows = [
                f"{_NO_WRAP}{self._name(stream.name)}{status(stream)}{_WRAP}" for stream in shown
            ]
            self._draw("\n".join(rows))
            self._rows, self._drawn_at = len(rows), now

    def clear(self) -> None:
        """Remove the rows."""
        with self._lock:
            if self._rows:
                up = _UP.format(self._rows - 1) if self._rows > 1 else ""
                self._draw(f"\r{up}{_CLEAR_BELOW}")
                self._rows = 0

    def _draw(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()

    def _name(self, name: str) -> str:
        return f"[{plain(name)}] " if len(self._streams) > 1 else ""

    def _before_log(self, _: logging.LogRecord) -> bool:
        self.clear()
        return True


def plain(text: str) -> str:
    """Return a text of one line that cannot steer a terminal: what is not printable is escaped."""
    return "".join(
        character
        if character.isprintable() or character in _JOINERS
        else character.encode("unicode_escape").decode()
        for character in text
    )


def answer_line(answer: LiveAnswer) -> str:
    """An answer for people."""
    return (
        f"{answer.start:.1f}-{answer.end:.1f} s  {plain(answer.text)}   "
        f"(kept {answer.kept_windows}/{answer.total_windows}, ratio {answer.prune_ratio:.2f}, "
        f"{answer.latency:.2f} s)"
    )


def notice_line(notice: LiveNotice) -> str:
    """A notice for people."""
    when = "" if notice.time is None else f"{notice.time:.1f} s  "
    return f"{when}{notice.kind}: {plain(notice.message)}"


def end_line(end: LiveEnd) -> str:
    """The end of a stream, with what became of its frames."""
    when = "before its first frame" if end.time is None else f"at {end.time:.1f} s"
    counts = end.counters
    return (
        f"ended {when}: {counts.decoded} frames, {counts.sampled} sampled, "
        f"{counts.dropped} dropped, {counts.answers} answers"
    )


def status(stream: Watched) -> str:
    """How a stream is doing: its row on the terminal."""
    counts, answer = stream.counters, stream.last_answer
    parts = [
        "no frame yet" if stream.time is None else f"{stream.time:.1f} s",
        f"{counts.sampled} frames",
        f"{counts.dropped} dropped",
        f"queue {stream.queue_depth}",
    ]
    if answer is not None:
        kept = answer.kept_windows / max(answer.total_windows, 1)
        parts.append(f"kept {kept:.2f}, ratio {answer.prune_ratio:.2f}, {answer.latency:.2f} s")
    return "  ".join(parts)
