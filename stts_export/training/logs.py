"""What a run tells while it trains: its log, curves for TensorBoard, and progress.

`log.jsonl` has one JSON object a line: "step" (optimizer steps done), "seconds" of training so far,
"kind" of line, and that kind's values; null stands for what is not finite. TensorBoard shows the
same values, named kind/value, from `tensorboard/`.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import av

from stts_export.errors import InputError
from stts_export.files import whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG_FILE = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_DISK_FIX = "free some space, or make the folder writable, and go on with --resume"
_CLEAR_LINE = "\r\x1b[K"


class RunLog:
    """Log, curves and progress of a run; `record` and `picture` are for its main process.

    Nothing is written before them. With the first `record`, lines of the log that lie beyond `done`
    go, so that a resumed run has each step once.

    Args:
        run: folder of the run.
        steps: optimizer steps of the whole run.
        done: optimizer steps that the run begins with; 0 unless it is resumed.
        quiet: print no progress.

    Raises:
        InputError: the folder has a log that cannot be read.
    """

    def __init__(self, run: Path, steps: int, *, done: int = 0, quiet: bool = False) -> None:
        self.run = run
        self.steps = steps
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._line = ""
        """Progress that is on the terminal's last line."""
        self._kept: list[dict[str, Any]] | None = [
            entry for entry in read_log(run) if entry["step"] <= done
        ]
        """What is left of an earlier log, until it has been cut."""
        self._curves: SummaryWriter | None = None
        self._purge_step = done + 1 if done else None
        """Step from which on TensorBoard forgets earlier points, until it was told."""
        self._writes_curves = True

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def record(self, step: int, seconds: float, kind: str, values: Mapping[str, float]) -> None:
        """Add a line to the log, and a point to each curve.

        Call it before the checkpoint of the same step is saved: what comes later is recorded again
        when a run is resumed there.

        Args:
            step: optimizer steps done.
            seconds: of training so far.
            kind: "train", "dev" or the like.
            values: numbers by name; one named "step", "seconds" or "kind" stands on the line as
                kind/name.

        Raises:
            InputError: the run's folder cannot be written to.
        """
        head = {"step": step, "seconds": round(seconds, 3), "kind": kind}
        # Types of questions are names too, and come from anywhere.
        entry = {
            f"{kind}/{name}" if name in head else name: _json_number(value)
            for name, value in values.items()
        }
        with _writing(self.run):
            self._append({**head, **entry})
            if curves := self._opened_curves():
                for name, value in values.items():
                    curves.add_scalar(f"{kind}/{name}", value, step)
                curves.flush()

    def picture(self, step: int, file: Path, tag: str = "kept windows") -> None:
        """Show a PNG in TensorBoard, where that is installed.

        Args:
            step: optimizer steps done.
            file: the picture.
            tag: its name in TensorBoard.

        Raises:
            InputError: the run's folder cannot be written to, or there is no such picture.
        """
        with _writing(self.run):
            if curves := self._opened_curves():
                with av.open(str(file)) as container:
                    image = next(container.decode(video=0)).to_ndarray(format="rgb24")
                curves.add_image(tag, image, step, dataformats="HWC")
                curves.flush()

    def progress(
        self, step: int, values: Mapping[str, float], seconds_per_step: float | None = None
    ) -> None:
        """Say how far the run is: a line that changes on a terminal, a new line elsewhere.

        Args:
            step: optimizer steps done.
            values: see `progress_line`.
            seconds_per_step: pace, for the time that is left.
        """
        if self._quiet:
            return
        line = progress_line(step, self.steps, values, seconds_per_step)
        if self._is_terminal:
            # A line that wraps could not be cleared.
            self._line = line[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(_CLEAR_LINE + self._line)
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """Print a line that stays, above the progress."""
        if self._quiet:
            return
        clear = _CLEAR_LINE if self._line else ""
        sys.stderr.write(f"{clear}{text}\n{self._line}")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line of progress, and TensorBoard's file."""
        if self._line:
            self._line = ""
            sys.stderr.write("\n")
        if self._curves is not None:
            with _writing(self.run):
                self._curves.close()
            self._curves = None

    def _append(self, entry: Mapping[str, Any]) -> None:
        self.run.mkdir(parents=True, exist_ok=True)
        file = self.run / LOG_FILE
        if self._kept is not None:
            with whole(file) as partial:
                partial.write_text("".join(map(_json_line, self._kept)), encoding="utf-8")
            self._kept = None
        with file.open("a", encoding="utf-8") as log:
            log.write(_json_line(entry))

    def _opened_curves(self) -> SummaryWriter | None:
        if self._curves is None and self._writes_curves:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                self._writes_curves = False
                _warn_of_missing_curves(error)
                return None
            folder = self.run / TENSORBOARD_FOLDER
            self._curves = SummaryWriter(str(folder), purge_step=self._purge_step)
            self._purge_step = None
        return self._curves


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log in order, none when there is no log.

    A last line that was cut short, by a kill or a full disk, is left out.

    Raises:
        InputError: the log cannot be read, or another line is none of a log.
    """
    file = run / LOG_FILE
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(file)) from None
    entries = [_log_entry(line) for line in lines]
    last = entries.pop()
    if None in entries:
        raise InputError(
            f"line {entries.index(None) + 1} is no line of a training log",
            where=str(file),
            allowed='JSON objects with a whole number "step"',
            fix="remove that line, or move the file away",
        )
    return [entry for entry in [*entries, last] if entry is not None]


def progress_line(
    step: int, steps: int, values: Mapping[str, float], seconds_per_step: float | None = None
) -> str:
    """Return how far a run is, in at most about 160 columns.

    Args:
        step: optimizer steps done.
        steps: of the whole run.
        values: what is shown, as far as it is there: loss and its parts answer_loss,
            similarity_loss and label_loss; accuracy; score_low, score_high and score_spread;
            kept_low and kept_high, the kept fraction of a frame; tokens_per_second,
            clips_per_second; broken, the examples left out.
        seconds_per_step: pace, for the time that is left.
    """

    def shown(text: str, *names: str) -> str:
        """Fill in values; nothing when one is absent."""
        is_there = all(name in values for name in names)
        return text.format(*(values[name] for name in names)) if is_there else ""

    left = ""
    if seconds_per_step is not None:
        left = f"{_duration((steps - step) * seconds_per_step)} left"
    losses = _joined(
        " ",
        shown("answer {:.3g}", "answer_loss"),
        shown("sim {:.3g}", "similarity_loss"),
        shown("label {:.3g}", "label_loss"),
    )
    spread = shown("std {:.3f}", "score_spread")
    clips = shown("{:.1f} clips/s", "clips_per_second")
    return _joined(
        "  ",
        _joined(" ", f"step {step}/{steps}", left),  # first: a narrow terminal cuts the rest
        _joined(" ", shown("loss {:.3g}", "loss"), losses and f"({losses})"),
        shown("acc {:.2f}", "accuracy"),
        _joined(" ", shown("scores {:.3f}..{:.3f}", "score_low", "score_high"), spread),
        shown("kept {:.2f}..{:.2f}", "kept_low", "kept_high"),
        _joined(" ", shown("{:,.0f} tok/s", "tokens_per_second"), clips),
        shown("{:.0f} broken", "broken") if values.get("broken") else "",
    )


def _warn_of_missing_curves(error: ImportError) -> None:
    print(
        f"TensorBoard gets no curves, only {LOG_FILE} is written: {error}\n"
        "  fix: pip install 'stts-export[tensorboard]'",
        file=sys.stderr,
    )


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot be written to: {error.strerror or error}",
            where=error.filename or str(run),
            fix=_DISK_FIX,
        ) from None


def _json_number(value: float) -> float | None:
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _json_line(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _log_entry(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; None when it is not one."""
    try:
        entry = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, dict) and type(entry.get("step")) is int
    return entry if is_entry else None


def _joined(separator: str, *parts: str) -> str:
    return separator.join(filter(None, parts))


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
