"""What callers give to a session, checked: arrays, numbers, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.engines import cuda
from stts_export.errors import InputError

DEFAULT_FPS = 2.0
"""Frames per second assumed for arrays without timestamps: the model's own sampling rate."""


def is_text(prompt: object) -> bool:
    """A question or turns, rather than token ids: there is text somewhere, or a dict."""
    if isinstance(prompt, (list, tuple)):
        return any(map(is_text, prompt))
    return isinstance(prompt, (str, Mapping))


def as_integer(value: object, name: str, least: int = 1) -> int:
    """Return a number that counts something."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        allowed = f"an integer, {least} or more" if least else "an integer, 0 (none) or more"
        raise InputError(f"{name} is {value!r}", where=name, allowed=allowed)
    return int(value)


def as_ratio(value: object) -> float:
    """Return a prune ratio; its range is the planner's to check."""
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputError(
            f"prune ratio {value!r}", where="prune_ratio", allowed="a number, 0 <= ratio < 1"
        )
    return float(value)


def as_array(values: object, where: str) -> NDArray[Any]:
    """Return an array of what may be nested sequences."""
    try:
        return np.asarray(values)
    except ValueError:
        raise InputError(
            "the parts differ in shape", where=where, allowed="an array, or equally long sequences"
        ) from None


def host_array(value: object, where: str, allowed: str) -> NDArray[Any]:
    """Return an array of NumPy, or of any library that shares host memory through DLPack."""
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "__dlpack__") or cuda.is_on_device(value):
        what = "an array in the memory of a GPU" if cuda.is_on_device(value) else None
        raise InputError(
            f"got {what or type(value).__name__}",
            where=where,
            allowed=f"{allowed}: a NumPy array, or one on the host with DLPack",
        )
    try:
        array: NDArray[Any] = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the {type(value).__name__} cannot be read through DLPack: {error}",
            where=where,
            fix="pass a NumPy array",
        ) from None
    return array


def as_timestamps(
    given: Sequence[float] | NDArray[np.float64] | None, frames: int
) -> NDArray[np.float64]:
    """Return seconds (T,); those of the default rate when None."""
    if given is None:
        return np.arange(frames) / DEFAULT_FPS
    times = as_array(given, "timestamps")
    allowed = "one finite number of seconds per frame, 0 or more, not descending"
    if times.shape != (frames,) or times.dtype.kind not in "iuf":
        raise InputError(
            f"timestamps of shape {times.shape} and type {times.dtype} for {frames} frames",
            where="timestamps",
            allowed=allowed,
        )
    times = times.astype(np.float64)
    if not np.isfinite(times).all() or times[0] < 0 or (np.diff(times) < 0).any():
        raise InputError(f"the times are {times.tolist()}", where="timestamps", allowed=allowed)
    return times


def as_keep_mask(given: object, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask (T, W) with at least one window."""
    keep = as_array(given, "keep")
    if keep.shape != shape or keep.dtype != np.bool_ or not keep.any():
        raise InputError(
            f"a keep mask of shape {keep.shape} and type {keep.dtype}",
            where="keep",
            allowed=f"bool {shape} with at least one window",
        )
    return keep


def too_many_frames(frames: int, limit: int) -> InputError:
    """Return the error for more frames than a bundle takes."""
    return InputError(
        f"{frames} frames",
        where="max_frames",
        allowed=f"up to {limit}, the limit this bundle was built with",
        fix=f"sample fewer frames, or build with --max-frames {frames}",
    )
