"""Progress of long steps on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

Report = Callable[[int], None]

WRITING = "weights of "
"""Beginning of what `build` reports while it writes the weights of a graph."""

_QUIET_SECONDS = 2.0
_LINE_SECONDS = 5.0
_BAR_CELLS = 24


class Progress:
    """Counts steps of one task; says nothing when the task ends within two seconds.

    Args:
        label: what is going on.
        total: number of steps.
        unit: what a step is, plural.
        enabled: False silences it.
        started: when the task began, by `time.monotonic`; now when None.
    """

    def __init__(
        self,
        label: str,
        total: int,
        unit: str = "steps",
        enabled: bool = True,
        started: float | None = None,
    ) -> None:
        self.label = label
        self.total = total
        self.unit = unit
        self._terminal = sys.stderr.isatty()
        self._enabled = enabled
        self._started = time.monotonic() if started is None else started
        self._last = self._started
        self._shown = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._terminal:
            sys.stderr.write("\n")

    def update(self, done: int) -> None:
        """Report that `done` of the steps are finished."""
        now = time.monotonic()
        if not self._enabled or now - self._started < _QUIET_SECONDS:
            return
        if not self._terminal and now - self._last < _LINE_SECONDS and done < self.total:
            return
        self._last = now
        self._shown = True
        seconds = now - self._started
        left = f", {seconds * (self.total - done) / done:.0f} s left" if done > 0 else ""
        text = f"{self.label}: {done}/{self.total} {self.unit} in {seconds:.0f} s{left}"
        if self._terminal:
            filled = _BAR_CELLS * done // max(self.total, 1)
            bar = "#" * filled + "-" * (_BAR_CELLS - filled)
            sys.stderr.write(f"\r\x1b[K[{bar}] {text}")
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()
