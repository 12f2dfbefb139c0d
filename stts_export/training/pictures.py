"""Pictures of the windows that a model in training keeps."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.runtime.overlay import write_contact_sheet
from stts_export.training.examples import VideoInput

PICTURE_FOLDER = "pictures"


def picture_file(run: Path, step: int) -> Path:
    """Name of a step's picture; names sort by step."""
    return run / PICTURE_FOLDER / f"step{step:07d}.png"


def kept_windows_picture(
    clip: VideoInput,
    scores: NDArray[np.float32] | None,
    keep: NDArray[np.bool_],
    window_grid: tuple[int, int],
    path: Path,
    title: str | None = None,
) -> None:
    """Write a PNG with the frames of a clip, removed windows darkened, as `run --overlay` does.

    Args:
        clip: T frames.
        scores: (T, W) marks each window after the first frame, relative to the clip's lowest and
            highest score; None where nothing is scored.
        keep: (T, W) True for windows that stay, row by row.
        window_grid: (rows, columns) of windows.
        path: the .png to write, in a folder that is made where there is none.
        title: text above the frames.

    Raises:
        InputError: the shapes do not fit, a score is not finite, or `path` does not end in .png or
            cannot be written.
    """
    if scores is not None and not np.isfinite(scores).all():
        raise InputError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} scores are not finite",
            where=str(path),
        )
    with suppress(OSError):  # writing there says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(
        path, clip.frames, keep, window_grid, clip.timestamps, scores=scores, title=title
    )
