"""Drawing of kept and removed windows over a frame."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime.font import GLYPH_HEIGHT, draw_text, text_width

Colour = tuple[int, int, int]

PAPER: Colour = (22, 24, 29)
INK: Colour = (235, 236, 240)
FAINT: Colour = (150, 154, 164)
ACCENT: Colour = (255, 196, 61)
_BAR: Colour = (58, 62, 72)
# Removed windows: luma between these levels, so that their content can still be made out.
_DARK = np.linspace(14, 96, 256).astype(np.uint8)
_SCORE_COLOURS = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)


@dataclass(frozen=True)
class FrameLabel:
    """What stands below a frame."""

    seconds: float
    kept: int
    total: int

    @property
    def time(self) -> str:
        """The time as the prompt prints it."""
        return f"{self.seconds:.1f} s"

    @property
    def count(self) -> str:
        """Kept and total windows."""
        return f"{self.kept}/{self.total}"


def draw_windows(
    frame: NDArray[np.uint8],
    keep: NDArray[np.bool_],
    scores: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]:
    """Return a frame with removed windows darkened and a line around what is kept.

    Args:
        frame: (height, width, 3) RGB.
        keep: (rows, columns) True for windows that stay.
        scores: (rows, columns) in 0..1; a chip in each window shows its score, from violet over
            green to yellow.
    """
    height, width = frame.shape[:2]
    rows = np.arange(height) * keep.shape[0] // height
    columns = np.arange(width) * keep.shape[1] // width
    kept = keep[rows][:, columns]
    red, green, blue = np.moveaxis(frame.astype(np.uint16), -1, 0)
    luma = (54 * red + 183 * green + 19 * blue) >> 8
    drawn = np.where(kept[..., None], frame, _DARK[luma][..., None])
    if not keep.all():
        _draw_lines(drawn, kept, np.diff(rows) != 0, np.diff(columns) != 0)
    if scores is not None:
        _draw_scores(drawn, scores)
    return drawn


def _draw_lines(
    drawn: NDArray[np.uint8],
    kept: NDArray[np.bool_],
    row_ends: NDArray[np.bool_],
    column_ends: NDArray[np.bool_],
) -> None:
    below = np.flatnonzero(row_ends) + 1
    right = np.flatnonzero(column_ends) + 1
    # Between removed windows a faint grid, around kept ones the accent colour.
    for at in below:
        removed = ~kept[at - 1] & ~kept[at]
        drawn[at, removed] = drawn[at, removed] // 2 + 28
    for at in right:
        removed = ~kept[:, at - 1] & ~kept[:, at]
        drawn[removed, at] = drawn[removed, at] // 2 + 28
    thick = max(1, min(kept.shape) // 300)
    for at in below:
        edge = kept[at - 1] != kept[at]
        drawn[at - thick // 2 : at - thick // 2 + thick, edge] = ACCENT
    for at in right:
        edge = kept[:, at - 1] != kept[:, at]
        drawn[edge, at - thick // 2 : at - thick // 2 + thick] = ACCENT


def _draw_scores(drawn: NDArray[np.uint8], scores: NDArray[np.float32]) -> None:
    rows, columns = scores.shape
    height, width = drawn.shape[:2]
    side = max(2, min(height // rows, width // columns) // 4)
    level = np.clip(scores, 0, 1) * (len(_SCORE_COLOURS) - 1)
    lower = np.minimum(level.astype(int), len(_SCORE_COLOURS) - 2)
    share = (level - lower)[..., None]
    colours = (1 - share) * _SCORE_COLOURS[lower] + share * _SCORE_COLOURS[lower + 1]
    for row in range(rows):
        for column in range(columns):
            top, left = -(-row * height // rows) + side, -(-column * width // columns) + side
            drawn[top : top + side, left : left + side] = colours[row, column]


def label_strip(label: FrameLabel, width: int, scale: int) -> NDArray[np.uint8]:
    """Return (strip_height(scale), width, 3): time, a bar of the kept share, kept and total."""
    strip = np.full((strip_height(scale), width, 3), PAPER, dtype=np.uint8)
    margin = 4 * scale
    right = width - margin - text_width(label.count, scale) + scale
    draw_text(strip, label.time, margin, margin, scale=scale, colour=INK)
    draw_text(strip, label.count, margin, max(right, 0), scale=scale, colour=INK)
    # All bars of a video start at the same place, whatever the time's length.
    start = 2 * margin + text_width("0000.0 s", scale)
    end = width - 2 * margin - text_width(f"{label.total}/{label.total}", scale)
    if end - start > 4 * scale:
        bar = strip[margin + 2 * scale : margin + 5 * scale, start:end]
        bar[:] = _BAR
        bar[:, : round((end - start) * label.kept / label.total)] = ACCENT
    return strip


def text_block(text: str, width: int, scale: int, colour: Colour = INK) -> NDArray[np.uint8]:
    """Return (height, width, 3) with a text in up to three lines."""
    margin = 4 * scale
    room = max((width - 2 * margin) // text_width("x", scale), 4)
    lines = textwrap.wrap(text, room, max_lines=3, placeholder="...") or [""]
    step = (GLYPH_HEIGHT + 3) * scale
    height = strip_height(scale) + step * (len(lines) - 1)
    block = np.full((height, width, 3), PAPER, dtype=np.uint8)
    for number, line in enumerate(lines):
        draw_text(block, line, margin + number * step, margin, scale=scale, colour=colour)
    return block


def strip_height(scale: int) -> int:
    """Height in pixels of a line of text with its margins."""
    return (GLYPH_HEIGHT + 8) * scale
