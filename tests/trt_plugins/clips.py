"""Clips that try a selection and a packing: random ones, and ones made to be awkward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime import planner
from stts_export.runtime.planner import Float32Array
from tests.trt_plugins.cpu_plugin import Packed

_ODD_SCORES = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 100.0, 3e38, -3e38], np.float32
)
_ABOVE_FIRST_FRAME = 200


@dataclass(frozen=True)
class Clip:
    """Input of one selection."""

    scores: Float32Array
    """(T, W)."""
    kept: int
    refill: bool

    def __str__(self) -> str:
        frames, windows = self.scores.shape
        return f"{frames} frames of {windows} windows, {self.kept} kept, refill {self.refill}"


def random_clip(rng: np.random.Generator, max_frames: int = 60, max_windows: int = 100) -> Clip:
    """Scores of one of six kinds, a prune ratio in 0..0.95."""
    shape = (int(rng.integers(1, max_frames + 1)), int(rng.integers(1, max_windows + 1)))
    scores = _SCORES[rng.integers(len(_SCORES))](rng, shape).astype(np.float32)
    removed = planner.n_prune(shape[1], shape[0], rng.choice([0, 0.5, rng.uniform(0, 0.95)]))
    return Clip(scores, scores.size - removed, bool(rng.integers(2)))


def _uniform(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    return rng.random(shape)


def _ties(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.int64]:
    return rng.integers(0, rng.integers(1, 6), shape)


def _all_equal(rng: np.random.Generator, shape: tuple[int, int]) -> Float32Array:
    return np.full(shape, rng.choice(_ODD_SCORES), np.float32)


def _odd(rng: np.random.Generator, shape: tuple[int, int]) -> Float32Array:
    scores = rng.normal(size=shape).astype(np.float32)
    return np.where(rng.random(shape) < 0.5, rng.choice(_ODD_SCORES, shape), scores)


def _unlike_frames(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    return rng.random(shape) * rng.random((shape[0], 1)) ** 4


def _any_bits(rng: np.random.Generator, shape: tuple[int, int]) -> Float32Array:
    return rng.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32)


_SCORES = (_uniform, _ties, _all_equal, _odd, _unlike_frames, _any_bits)


def clip_of_counts(counts: list[int], windows: int, refill: bool) -> Clip:
    """A clip whose frames keep exactly so many windows, spread evenly; the first keeps none."""
    scores = np.zeros((len(counts) + 1, windows), np.float32)
    for frame, count in enumerate(counts, start=1):
        scores[frame, np.arange(count) * windows // max(count, 1)] = _ABOVE_FIRST_FRAME
    return Clip(scores, sum(counts), refill)


def awkward_clips() -> Iterator[Clip]:
    """Packings where a bin is just full, just too small, or a frame alone."""
    layouts = [
        (1, [1]), (1, [1] * 7), (9, [9]), (9, [0, 0, 9]), (9, [9, 9, 9]),
        (9, [5, 4, 5, 4]), (9, [5, 5, 4, 4, 1]), (9, [3] * 9), (9, [3] * 10), (9, [4] * 9),
        (9, [1] * 9), (9, [1] * 10), (9, [8, 1, 8, 1]), (9, [6, 3, 6, 3, 2, 1]),
        (9, [7, 5, 3, 2, 1]), (10, [5] * 8), (10, [6, 5, 5, 4]), (10, [4, 4, 4, 3, 3, 2]),
        (81, [81, 0, 41, 40, 27, 27, 27]), (81, [80, 79, 2, 1]), (81, [41] * 5 + [40] * 5),
        (400, [400, 200, 200, 133, 133, 134]), (400, [1] * 401), (2, [2, 1, 1, 1]),
    ]  # fmt: skip
    for windows, counts in layouts:
        for refill in (True, False):
            yield clip_of_counts(counts, windows, refill)
    for kept in (1, 80, 81, 82, 161, 162):  # the first frame wins all, up to its end
        yield Clip(np.zeros((2, 81), np.float32), kept, True)
    zeros = np.where(np.arange(24).reshape(3, 8) % 2 == 0, np.float32(0), np.float32(-0.0))
    yield Clip(zeros, 13, True)  # equal, so the lower index goes first
    alone = np.full((20, 16), -1, np.float32)
    alone[13] = np.nan  # one frame holds everything, above the first
    yield Clip(alone, 16, True)


def differences(given: Packed, clip: Clip, hidden: NDArray[Any] | None = None) -> list[str]:
    """Names of what is not as the host planner computes it."""
    with np.errstate(invalid="ignore"):  # a signalling NaN is a score like any other
        keep = planner.select(clip.scores, clip.scores.size - clip.kept)
    plan = planner.pack(keep, refill=clip.refill)
    free = plan.segment == planner.FREE
    expected: dict[str, NDArray[Any]] = {
        "segment": plan.segment,
        "kept_slot": plan.kept_slot,
        "kept_window": np.flatnonzero(keep),
    }
    if given.slot_window is not None:
        expected["slot_window"] = np.where(free, planner.FREE, plan.gather_window)
    if hidden is not None:
        rows = hidden.reshape(clip.scores.size, -1)[plan.gather_window]
        rows[free] = 0
        expected["bins"] = rows.reshape(-1, *hidden.shape[1:])
    return [
        name
        for name, value in expected.items()
        if not np.array_equal(_bits(getattr(given, name)), _bits(value))
    ]


def _bits(values: NDArray[Any]) -> NDArray[Any]:
    """Floats as integers, so that NaN equals itself."""
    return values if values.dtype.kind in "iu" else values.view(f"u{values.dtype.itemsize}")
