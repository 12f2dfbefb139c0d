"""A frame on its way from the reading thread to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """A frame at the model's size."""

    time: float
    index: int | None
    """Of the grid point; None for the end of the stream."""
    pixels: Any
    """uint8 (height, width, 3), or (1, height, width, 3) on a GPU."""
    arrived: float
    """When it was clear that it is a sample, by the monotonic clock."""
    size: tuple[int, int]
    """(height, width) of the source's frame."""
    offset: float | None
    """Time on the source's own clock minus `time`."""
