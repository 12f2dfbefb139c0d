"""Frames that have been through `vision_lower`, in memory of a fixed size.

Axes: T frames of a window, W windows of patches, G patches of a window, D vision width.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.config import VisionConfig
from stts_export.live.sample import Sample
from stts_export.runtime import vision
from stts_export.runtime.decoder import Runner
from stts_export.tensors import LOWER_CHUNK, Precision


@dataclass
class LowerFrame:
    """A frame that waits for questions."""

    time: float
    pixels: Any
    """uint8 (height, width, 3) at the model's size, or (1, height, width, 3) on a GPU."""
    scores: NDArray[np.float32] | None
    """(W,); None without a scorer."""
    slot: int
    is_fresh: bool
    """It ran as the first frame of a clip."""
    users: int = field(default=1)
    """Who still needs its hidden tokens."""


class FrameStore:
    """Runs `vision_lower` on frames as they come, into slots that are used again.

    One thread runs frames; any thread may hold and release them.

    Args:
        runner: the `vision_lower` graph.
        config: the tower.
        precision: of the graph.
        slots: frames whose hidden tokens are there at a time.
        longest: most frames of a clip that is gathered.
        plain: nothing will be removed, so that every frame is fresh.
    """

    def __init__(
        self,
        runner: Runner,
        config: VisionConfig,
        precision: Precision,
        *,
        slots: int,
        longest: int,
        plain: bool,
    ) -> None:
        self._runner = runner
        self._plain = plain
        self._hidden, self._scores = vision.lower_buffers(runner, config, precision, slots)
        self._clip, self._clip_scores = vision.lower_buffers(runner, config, precision, longest)
        self._view = vision.ScorersView(runner, config)
        self._apart = vision.ScorersView(runner, config)
        """For frames that are run again, outside the order of the stream."""
        self._taken = np.zeros(slots, dtype=np.bool_)
        self._next = 0
        self._changed = threading.Condition()

    def room(self, wanted: int, timeout: float) -> int:
        """Wait for free slots; return how many frames can be run at once, at most `wanted`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._taken[self._next], timeout)
            part = self._taken[self._next : self._next + min(wanted, LOWER_CHUNK)]
            return int(np.argmax(part)) if part.any() else len(part)

    def run(self, samples: Sequence[Sample], *, begins_clip: bool) -> list[LowerFrame]:
        """Run samples for which there is room; each frame is held once.

        Args:
            samples: in order.
            begins_clip: the first of them is the first frame of a clip.
        """
        slots = slice(self._next, self._next + len(samples))
        scores = None if self._scores is None else self._scores[slots]
        fresh = np.full(len(samples), self._plain)
        fresh[0] |= begins_clip
        batch = _batch([sample.pixels for sample in samples])
        vision.lower_chunk(self._runner, batch, fresh, self._view, self._hidden[slots], scores)
        host = None if scores is None else self._runner.to_host(scores).copy()
        with self._changed:
            self._taken[slots] = True
            self._next = slots.stop % len(self._taken)
        return [
            LowerFrame(
                sample.time,
                sample.pixels,
                None if host is None else host[place],
                slots.start + place,
                bool(fresh[place]),
            )
            for place, sample in enumerate(samples)
        ]

    def on_host(self, pixels: Any) -> NDArray[np.uint8]:
        """Pixels of a frame, (height, width, 3), also of one on a GPU."""
        if isinstance(pixels, np.ndarray):
            return pixels
        host: NDArray[np.uint8] = self._runner.to_host(pixels)[0]
        return host

    def hold(self, frames: Sequence[LowerFrame]) -> None:
        """Keep frames for one more user."""
        with self._changed:
            for frame in frames:
                frame.users += 1

    def release(self, frames: Sequence[LowerFrame]) -> None:
        """Take one user away; slots without any are free."""
        with self._changed:
            for frame in frames:
                frame.users -= 1
                if frame.users == 0:
                    self._taken[frame.slot] = False
            self._changed.notify_all()

    def as_clip(
        self, frames: Sequence[LowerFrame], *, restart: int
    ) -> tuple[Any, NDArray[np.float32] | None]:
        """Lay frames side by side, as `vision.run_lower` on them alone would have left them.

        The result is overwritten by the next call.

        Args:
            frames: T held ones, in order.
            restart: how many of them, from the first, are run again as fresh: 1 where a clip begins
                here that did not when they came, T when nothing will be removed from it.

        Returns:
            hidden (T, W*G, D) in the runner's memory, and scores (T, W).
        """
        hidden = self._clip[: len(frames)]
        scores = None
        if self._scores is not None:
            scores = np.stack([frame.scores for frame in frames if frame.scores is not None])
        step = LOWER_CHUNK if isinstance(frames[0].pixels, np.ndarray) else 1
        for start in range(0, restart, step):
            part = slice(start, min(start + step, restart))
            again = None if self._clip_scores is None else self._clip_scores[part]
            batch = _batch([frame.pixels for frame in frames[part]])
            fresh = np.ones(part.stop - part.start, dtype=np.bool_)
            vision.lower_chunk(self._runner, batch, fresh, self._apart, hidden[part], again)
            if again is not None and scores is not None:
                scores[part] = self._runner.to_host(again)
        place = restart
        while place < len(frames):
            first, stop = frames[place].slot, place + 1
            while stop < len(frames) and frames[stop].slot == first + stop - place:
                stop += 1
            run = slice(first, first + stop - place)
            self._runner.copy(hidden[place:stop], self._hidden[run])
            place = stop
        return hidden, scores


def _batch(pixels: Sequence[Any]) -> Any:
    """One array of frames; those on a GPU come one at a time."""
    if len(pixels) == 1 and not isinstance(pixels[0], np.ndarray):
        return pixels[0]
    return np.stack(pixels)
