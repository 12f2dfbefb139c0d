"""Which moments of a video the model sees (the reference's `uniform_last_frame` mode)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError


def sample_times(duration: float, max_frames: int, max_fps: float = 2.0) -> NDArray[np.float64]:
    """Target times for a clip of known duration.

    At most `max_fps` samples a second, and the end of the clip; a clip too long for that gets
    `max_frames` samples spread evenly from 0 to `duration`, both included.

    Args:
        duration: end of the last frame minus start of the first, in seconds.
        max_frames: upper limit of the number of samples.
        max_fps: upper limit of samples per second.

    Returns:
        (T,) float64 seconds from the first frame, ascending, 1 <= T <= max_frames. A clip of
        duration 0 gives [0].

    Raises:
        InputError: the duration is negative or not finite, or a limit is not positive.
    """
    _check_limits(max_frames, max_fps)
    if not (math.isfinite(duration) and duration >= 0):
        raise InputError(
            f"duration is {duration}", where="sample_times", allowed="0 or more seconds"
        )
    if (max_frames - 1) / max_fps < duration:
        return np.linspace(0.0, duration, max_frames, dtype=np.float64)
    times = np.arange(0.0, duration, 1 / max_fps, dtype=np.float64)
    # A duration of exactly (max_frames - 1) / max_fps may round to one step too many.
    return np.append(times[: max_frames - 1], duration)


def _check_limits(max_frames: int, max_fps: float) -> None:
    if max_frames < 1:
        raise InputError(f"max_frames is {max_frames}", where="sampling", allowed="1 or more")
    if not (math.isfinite(max_fps) and max_fps > 0):
        raise InputError(f"max_fps is {max_fps}", where="sampling", allowed="a positive rate")
