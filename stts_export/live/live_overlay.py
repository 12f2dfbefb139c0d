"""Pictures of what was pruned, while a stream runs."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from glob import escape
from pathlib import Path
from threading import Lock
from types import TracebackType

import av
import numpy as np
from numpy.typing import NDArray

from stts_export.errors import SttsError
from stts_export.live.events import LiveAnswer
from stts_export.runtime.drawing import PAPER, strip_height, text_block
from stts_export.runtime.overlay import (
    SHOWN_WIDTH,
    page,
    scaled,
    text_scale,
    write_contact_sheet,
)
from stts_export.runtime.writing import VideoWriter, check_writable, finished_file

_log = logging.getLogger(__name__)

_TALLEST = 3 * SHOWN_WIDTH
_LAST_SECONDS = 1.0
"""How long the only frame of a video is on screen."""
# Fragments: an ordinary file's index grows in memory for as long as the stream runs, and moves
# the whole file at its end.
_FRAGMENTS = {"movflags": "frag_keyframe+delay_moov+default_base_moof"}


class LiveOverlay:
    """Observer of a stream that draws which windows were kept.

    OUT.mp4 shows each frame once, at its time, with the mask and the text of the first answer that
    saw it; it appears at `close`. OUT.png beside it, or alone, is the contact sheet of the newest
    answer's window. What cannot be written is reported once; the stream goes on without pictures.

    Args:
        out_path: OUT.mp4 or OUT.png.
        grid: (rows, columns) of windows.

    Raises:
        InputError: `out_path` has another suffix, or cannot be written.
    """

    def __init__(self, out_path: str | os.PathLike[str], grid: tuple[int, int]) -> None:
        path = Path(out_path)
        self._sheet = path.with_suffix(".png")
        check_writable(path, (".mp4", ".png"))
        check_writable(self._sheet, (".png",))
        self._video = _Video(path, grid) if path.suffix.lower() == ".mp4" else None
        self._grid = grid
        self._lock = Lock()
        self._is_over = False
        self.written: list[Path] = []
        """Files that are there."""

    def __enter__(self) -> LiveOverlay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(
        self, answer: LiveAnswer, frames: NDArray[np.uint8], frame_size: tuple[int, int]
    ) -> None:
        """Draw an answer.

        Args:
            answer: what was kept, and the text.
            frames: (T, height, width, 3) RGB at the model's size.
            frame_size: (height, width) of the source's frames.
        """
        with self._lock:
            if self._is_over:
                return
            try:
                if self._video:
                    self._video.add(answer, frames, frame_size)
                write_contact_sheet(
                    self._sheet, frames, answer.keep, self._grid, answer.timestamps,
                    frame_size=frame_size, title=answer.text,
                )  # fmt: skip
            except SttsError as error:
                _log.warning("%s\n  the stream goes on without pictures", error)
                self._finish()
            else:
                if not self.written:
                    self.written.append(self._sheet)

    def close(self) -> None:
        """Finish the video; answers that still come are not drawn."""
        with self._lock:
            if not self._is_over:
                self._finish()

    def discard(self) -> None:
        """Remove what is half written, at once: for a process that is about to end.

        After it, nothing can be drawn.
        """
        # Nothing is waited for: who draws may hang.
        for half in self._sheet.parent.glob(f".{escape(self._sheet.stem)}.partial-{os.getpid()}.*"):
            half.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._is_over = True
        try:
            if self._video and self._video.finish():
                self.written.insert(0, self._video.path)
        except SttsError as error:
            _log.warning("%s", error)


class _Video:
    """Frames in the shape of the source, in a file that appears when it is finished."""

    def __init__(self, path: Path, grid: tuple[int, int]) -> None:
        self.path = path
        self._grid = grid
        self._files = ExitStack()
        """What is open; an error closes it and removes what was written."""
        self._writer: VideoWriter | None = None
        self._box = (0, 0)
        """(height, width) that every frame is fitted into."""
        self._last: tuple[float, NDArray[np.uint8]] | None = None
        self._step = _LAST_SECONDS

    def add(
        self, answer: LiveAnswer, frames: NDArray[np.uint8], frame_size: tuple[int, int]
    ) -> None:
        """Write the frames that no earlier answer saw."""
        writer, self._writer = self._writer, None
        with self._files.pop_all() as files:
            if writer is None:
                writer = self._start(files)
                self._box = _fitted(frame_size, (_TALLEST, SHOWN_WIDTH))
            for place, seconds in enumerate(answer.timestamps.tolist()):
                if self._last is not None and seconds <= self._last[0]:
                    continue
                keep = answer.keep[place].reshape(self._grid)
                frame = scaled(frames[place], _fitted(frame_size, self._box))
                picture = self._page(page(frame, keep, seconds), answer.text)
                writer.write(picture, seconds)
                if self._last is not None:
                    self._step = seconds - self._last[0]
                self._last = (seconds, picture)
            self._files, self._writer = files.pop_all(), writer

    def _start(self, files: ExitStack) -> VideoWriter:
        partial = files.enter_context(finished_file(self.path, ".mp4"))
        container = av.open(str(partial.absolute()), "w", options=_FRAGMENTS)
        return VideoWriter(files.enter_context(container))

    def _page(self, drawn: NDArray[np.uint8], text: str) -> NDArray[np.uint8]:
        """Put a title above, and all on a page of one size."""
        height, width = self._box
        scale = text_scale(width)
        title_height = len(text_block("word " * width, width, scale))
        size = (title_height + height + strip_height(scale), width, 3)
        sheet = np.full(size, PAPER, dtype=np.uint8)
        title = text_block(text, width, scale)
        sheet[: len(title)] = title
        sheet[title_height : title_height + drawn.shape[0], : drawn.shape[1]] = drawn
        return sheet

    def finish(self) -> bool:
        """Complete the file; False when there is none."""
        if self._writer is None or self._last is None:
            return False
        seconds, picture = self._last
        with self._files.pop_all():
            # The last frame stays for as long as the one before it did.
            self._writer.write(picture, seconds + self._step)
            self._writer.finish()
        return True


def _fitted(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) in the shape of `size` that is in a box."""
    scale = min(box[0] / size[0], box[1] / size[1])
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
