"""The vision side of a session: lower, selection, upper; memory bounded by chunks.

Axes: T frames, W windows, G patches of a window, D vision width, C decoder width, K kept windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stts_export.config import VisionConfig
from stts_export.runtime import planner
from stts_export.runtime.decoder import Runner
from stts_export.tensors import ACTIVATION, Precision

Refill = Literal["reference", "off"]
OnProgress = Callable[[str, int, int], None]
"""(stage, done, total), called after every chunk."""

LOWER_CHUNK = 8
"""Frames per call of vision_lower."""
UPPER_CHUNK = 8
"""Bins' worth of windows per call of vision_upper."""


@dataclass(frozen=True)
class VisionOutput:
    """Scores, survivors and features of one clip."""

    scores: NDArray[np.float32] | None
    """(T, W); None when the model has no scorer."""
    keep: NDArray[np.bool_]
    """(T, W)."""
    features: NDArray[Any]
    """(K, C) in the bundle's type, frame-major."""
    timings: dict[str, float]
    """Seconds per stage."""


def encode(
    lower: Runner,
    upper: Runner,
    config: VisionConfig,
    precision: Precision,
    frames: NDArray[np.uint8],
    count: int,
    *,
    refill: Refill = "reference",
    keep: NDArray[np.bool_] | None = None,
    on_progress: OnProgress | None = None,
) -> VisionOutput:
    """Encode one clip.

    Args:
        lower: the `vision_lower` graph.
        upper: the `vision_upper-frames` graph.
        config: the tower.
        precision: of the graphs.
        frames: (T, height, width, 3) at the model's size.
        count: windows to remove.
        refill: "reference" gives a frame that is alone in its bin its removed windows back as
            context; "off" runs on kept windows only.
        keep: (T, W) decides in place of the scores.
        on_progress: called after every chunk.
    """
    started = time.perf_counter()
    hidden, scores = run_lower(lower, config, precision, frames, count == 0, on_progress)
    lowered = time.perf_counter()
    if count == 0:
        keep = np.ones((len(frames), config.windows), dtype=np.bool_)
    elif keep is None:
        assert scores is not None
        keep = planner.select(scores, count)
    groups = planner.group_frames(keep, refill=refill == "reference")
    planned = time.perf_counter()
    features = run_upper(upper, hidden, groups, int(keep.sum()), config, on_progress)
    timings = {
        "vision_lower": lowered - started,
        "select": planned - lowered,
        "vision_upper": time.perf_counter() - planned,
    }
    return VisionOutput(scores, keep, features, timings)


def run_lower(
    runner: Runner,
    config: VisionConfig,
    precision: Precision,
    frames: NDArray[np.uint8],
    plain: bool,
    on_progress: OnProgress | None = None,
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Run vision_lower chunk by chunk; each chunk hands its last frame's view to the next.

    Args:
        runner: the graph.
        config: the tower.
        precision: of the graph.
        frames: (T, height, width, 3).
        plain: nothing will be removed, so no frame gets a bias.
        on_progress: called after every chunk.

    Returns:
        hidden (T, W*G, D); scores (T, W), None without a scorer.
    """
    total, patches = len(frames), config.windows * config.patches_per_window
    hidden = np.empty((total, patches, config.hidden_size), ACTIVATION[precision])
    scores = np.empty((total, config.windows), np.float32) if config.pruning else None
    fresh = np.full(total, plain)
    fresh[0] = True
    pooled = np.zeros((1, config.windows, config.hidden_size), np.float32)
    for start in range(0, total, LOWER_CHUNK):
        chunk = slice(start, min(start + LOWER_CHUNK, total))
        inputs: dict[str, NDArray[Any]] = {"frames": frames[chunk]}
        if scores is not None:
            inputs |= {"fresh": fresh[chunk], "prev_pooled": pooled}
        outputs = runner(inputs)
        hidden[chunk] = outputs["hidden"]
        if scores is not None:
            scores[chunk] = outputs["scores"]
            pooled = outputs["last_pooled"]
        if on_progress:
            on_progress("vision_lower", chunk.stop, total)
    return hidden, scores


def run_upper(
    runner: Runner,
    hidden: NDArray[Any],
    groups: list[planner.FrameGroup],
    kept: int,
    config: VisionConfig,
    on_progress: OnProgress | None = None,
) -> NDArray[Any]:
    """Run vision_upper on frames of equal window count, which needs no mask.

    Args:
        runner: the `vision_upper-frames` graph.
        hidden: (T, W*G, D).
        groups: from `planner.group_frames`.
        kept: K.
        config: the tower.
        on_progress: called after every chunk.

    Returns:
        (K, C).
    """
    windows = hidden.reshape(len(hidden) * config.windows, -1)  # (T*W, G*D)
    features: NDArray[Any] | None = None
    total = sum(group.gather_window.size for group in groups)
    done = 0
    for group in groups:
        frames, slots = group.gather_window.shape
        step = max(1, UPPER_CHUNK * config.windows // slots)
        for start in range(0, frames, step):
            rows = group.gather_window[start : start + step]
            bins = windows[rows].reshape(len(rows), -1, config.hidden_size)  # (m, n*G, D)
            packed = runner({"bins": bins})["packed_features"]  # (m, n, C)
            if features is None:
                features = np.empty((kept, packed.shape[-1]), packed.dtype)
            target = group.feature_row[start : start + step]
            is_kept = target >= 0
            features[target[is_kept]] = packed[is_kept]
            done += rows.size
            if on_progress:
                on_progress("vision_upper", done, total)
    assert features is not None
    return features
