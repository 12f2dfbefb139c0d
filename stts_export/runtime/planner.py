"""Which windows of a clip survive, and where they go: NumPy, at window level, on the host.

Computes what `stts_export.model.pruning` defines, in about a millisecond for 256 frames.
Axes: T frames of a clip, W windows of a frame, B bins, K kept windows; m frames of n windows each
in a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError

FIRST_FRAME_SCORE = np.float32(100)
FREE = -1
"""Segment of a slot that holds nothing."""

BoolArray = NDArray[np.bool_]
Float32Array = NDArray[np.float32]
Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class PackPlan:
    """Bins of W slots, filled first-fit descending."""

    gather_window: Int32Array
    """(B, W): row of the clip's T*W windows that fills a slot; 0 for free slots."""
    segment: Int32Array
    """(B, W): frame that a slot belongs to, `FREE` for free slots."""
    kept_slot: Int32Array
    """(K,): index into the B*W slots of each kept window, frame-major."""


@dataclass(frozen=True)
class FrameGroup:
    """Frames that carry the same number of windows, so that they batch without a mask."""

    gather_window: Int32Array
    """(m, n): rows of the clip's T*W windows."""
    feature_row: Int32Array
    """(m, n): row among the K kept windows, -1 for windows that are context only."""


def n_prune(windows: int, frames: int, prune_ratio: float) -> int:
    """Windows to remove from a clip: trunc(f32(f32(W * ratio) * f32(T))) (spec 2.3).

    Raises:
        InputError: the ratio is outside [0, 1), or so close to 1 that no window would be left.
    """
    count = None
    if 0 <= prune_ratio < 1:
        count = int(np.float32(np.float32(windows * prune_ratio) * np.float32(frames)))
    if count is None or count >= windows * frames:
        raise InputError(
            f"prune ratio {prune_ratio!r}",
            where="prune_ratio",
            allowed="0 <= ratio < 1, the fraction of windows to remove",
            fix="0 keeps everything, 0.5 removes half",
        )
    return count


def select(scores: Float32Array, count: int) -> BoolArray:
    """Choose the windows that survive, globally over a clip.

    The first frame counts as score 100; of equal scores the lower index is removed first; a NaN
    counts as largest and -0 as 0.

    Args:
        scores: (T, W).
        count: windows to remove.

    Returns:
        keep, (T, W).
    """
    keep = np.ones(scores.size, dtype=np.bool_)
    if count > 0:
        raised = scores.astype(np.float32)
        raised[0] = FIRST_FRAME_SCORE
        key = _ordered_bits(raised.ravel())
        threshold = np.partition(key, count - 1)[count - 1]
        keep[key < threshold] = False
        ties = np.flatnonzero(key == threshold)
        keep[ties[: count - np.count_nonzero(key < threshold)]] = False
    return keep.reshape(scores.shape)


def _ordered_bits(values: Float32Array) -> NDArray[np.uint32]:
    """Map floats to integers of the same order: -0 equals 0, every NaN is largest."""
    bits = (values + np.float32(0)).view(np.uint32)
    ordered: NDArray[np.uint32] = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    ordered[np.isnan(values)] = np.uint32(0xFFFFFFFF)
    return ordered


@dataclass(frozen=True)
class Placement:
    """Where first-fit descending puts frames."""

    bin_of: Int64Array
    """(T,) bin of a frame, -1 for a frame without windows."""
    offset: Int64Array
    """(T,) first slot of a frame within its bin."""
    bins: int
    alone: BoolArray
    """(T,) whether a frame has its bin for itself."""


def place(counts: Int64Array, capacity: int) -> Placement:
    """Place frames first-fit descending: largest first, ties by index, first bin with room.

    Frames of one size fill bins in index order, each bin as far as it goes, so one pass over the
    bins per distinct size gives the serial result.

    Args:
        counts: (T,) windows per frame, at most `capacity`.
        capacity: slots of a bin.
    """
    by_size: dict[int, list[int]] = {}
    for frame, size in enumerate(counts.tolist()):
        by_size.setdefault(size, []).append(frame)
    by_size.pop(0, None)
    bin_of = [-1] * len(counts)
    offset = [0] * len(counts)
    used: list[int] = []
    members: list[int] = []
    for size in sorted(by_size, reverse=True):
        frames = by_size[size]
        # Every bin holds a frame of this size or larger: above half a bin no second one fits.
        placed, index = 0, len(used) if 2 * size > capacity else 0
        while placed < len(frames):
            if index == len(used):
                used.append(0)
                members.append(0)
            while used[index] + size <= capacity and placed < len(frames):
                bin_of[frames[placed]] = index
                offset[frames[placed]] = used[index]
                used[index] += size
                members[index] += 1
                placed += 1
            index += 1
    placement = np.array(bin_of, dtype=np.int64)
    alone = np.array([*members, 0], dtype=np.int64)[placement] == 1
    return Placement(placement, np.array(offset, dtype=np.int64), len(used), alone)


def _context(keep: BoolArray, placement: Placement, refill: bool) -> BoolArray:
    """Windows that the upper part runs on: kept ones, and all of a frame that is refilled."""
    return keep | placement.alone[:, None] if refill else keep


def pack(keep: BoolArray, *, refill: bool = True) -> PackPlan:
    """Pack kept windows into bins of W slots; see `stts_export.model.pruning.pack`.

    Args:
        keep: (T, W).
        refill: give a frame that is alone in its bin its removed windows back as context.
    """
    windows = keep.shape[1]
    placement = place(keep.sum(axis=1), windows)
    context = _context(keep, placement, refill)
    per_frame = context.sum(axis=1)

    row = np.flatnonzero(context)
    first_slot = placement.bin_of * windows + placement.offset
    first_row = np.cumsum(per_frame) - per_frame
    slot = np.arange(len(row)) + np.repeat(first_slot - first_row, per_frame)
    gather = np.zeros(placement.bins * windows, dtype=np.int32)
    segment = np.full(placement.bins * windows, FREE, dtype=np.int32)
    gather[slot] = row
    segment[slot] = np.repeat(np.arange(len(keep), dtype=np.int32), per_frame)
    kept_slot = slot[keep.ravel()[row]].astype(np.int32)
    return PackPlan(gather.reshape(-1, windows), segment.reshape(-1, windows), kept_slot)


def unpacked(keep: BoolArray, *, refill: bool = True) -> tuple[Int32Array, Int32Array]:
    """Leave every frame where it is: a bin per frame, in which removed windows attend apart.

    Gives the same features as `pack`: a slot's result depends only on the windows of its segment.

    Args:
        keep: (T, W).
        refill: as in `pack`.

    Returns:
        segment (T, W) and kept_slot (K,), as in `PackPlan`.
    """
    context = _context(keep, place(keep.sum(axis=1), keep.shape[1]), refill)
    frame = np.arange(len(keep), dtype=np.int32)[:, None]
    return np.where(context, frame, np.int32(FREE)), np.flatnonzero(keep).astype(np.int32)


def group_frames(keep: BoolArray, *, refill: bool = True) -> list[FrameGroup]:
    """Group frames by the number of windows they carry: the layout that needs no mask.

    Gives the same features as `pack`: a slot's result depends only on the windows of its frame.

    Args:
        keep: (T, W).
        refill: as in `pack`.

    Returns:
        Groups in ascending n; frames without windows are in none.
    """
    windows = keep.shape[1]
    context = _context(keep, place(keep.sum(axis=1), windows), refill)
    per_frame = context.sum(axis=1)
    order = np.argsort(per_frame, kind="stable")
    row = (order[:, None] * windows + np.arange(windows)).astype(np.int32)[context[order]]
    feature_row = np.where(keep, np.cumsum(keep).reshape(keep.shape) - 1, -1).astype(np.int32)
    features = feature_row.ravel()[row]
    groups = []
    start = 0
    for n, frames in zip(*np.unique(per_frame, return_counts=True), strict=True):
        stop = start + int(n * frames)
        if n > 0:
            shape = (int(frames), int(n))
            groups.append(
                FrameGroup(row[start:stop].reshape(shape), features[start:stop].reshape(shape))
            )
        start = stop
    return groups
