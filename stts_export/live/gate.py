"""Leaving out frames in which nothing has changed, before the model sees them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_CELL = 8
"""Pixels of a side that are averaged, so that sensor noise does not count."""


class Gate:
    """Lets frames through that differ from the last one that went through.

    Args:
        levels: largest difference of any cell's mean, of 255, from which a frame is new.
        longest: samples after which one goes through anyway, so that no window is empty.
    """

    def __init__(self, levels: float, longest: int) -> None:
        self._levels = levels
        self._longest = longest
        self._passed: NDArray[np.float32] | None = None
        self._closed_for = 0

    def passes(self, frame: NDArray[np.uint8]) -> bool:
        """Whether a frame, (height, width, 3), is to go through the model."""
        cells = _cells(frame)
        is_new = (
            self._passed is None
            or self._passed.shape != cells.shape
            or float(np.abs(cells - self._passed).max()) >= self._levels
        )
        self._closed_for += 1
        if not is_new and self._closed_for < self._longest:
            return False
        self._passed, self._closed_for = cells, 0
        return True


def _cells(frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Means of cells, (rows, columns, 3)."""
    height, width = (max(1, side // _CELL) for side in frame.shape[:2])
    cell = frame.shape[0] // height, frame.shape[1] // width
    whole = frame[: height * cell[0], : width * cell[1]]
    cells = whole.reshape(height, cell[0], width, cell[1], 3)
    means: NDArray[np.float32] = cells.mean(axis=(1, 3), dtype=np.float32)
    return means
