"""Which windows of a clip survive: the model's choice, and what it is compared with.

All keep the same number of windows, so only the choice differs. They act at three places:

* `stts`, `random` and `uniform-frames` are a mask between the two parts of the tower.
* `tome` acts there too, and kept windows become averages of what was merged into them.
* `evs` acts after the whole tower, which runs as if nothing were removed, without the log-bias.

NumPy only: bundles are evaluated where there is no PyTorch. Training keeps to the same plans.
Axes: T frames, W windows of a frame, G patches of a window, D vision width, C decoder width,
K kept windows. "Row" t*W + w is window w of frame t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError, did_you_mean
from stts_export.runtime import planner

STTS, RANDOM, UNIFORM_FRAMES, TOME, EVS = "stts", "random", "uniform-frames", "tome", "evs"
SELECTORS = (STTS, RANDOM, UNIFORM_FRAMES, TOME, EVS)

_MERGED_AT_ONCE = 8
"""A round of `tome` merges one of so many windows."""
_SIMILARITY_DIGITS = 5
"""Cosines that differ by less than fp32 rounding are ties, which the index decides."""

BoolArray = NDArray[np.bool_]
Float32Array = NDArray[np.float32]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class Selection:
    """What survives of a clip."""

    keep: BoolArray
    """(T, W), K of them True."""
    merged_into: Int64Array | None = None
    """(T*W,) the kept row that each row is averaged into, its own for kept ones; None where
    windows are dropped."""


def check_selector(name: str) -> None:
    """Refuse what is none of `SELECTORS`.

    Raises:
        InputError: there is no such selector.
    """
    if name not in SELECTORS:
        raise InputError(
            f"unknown selector {name!r}{did_you_mean(name, SELECTORS)}",
            where="selector",
            allowed=" or ".join(SELECTORS),
        )


def after_tower(name: str) -> bool:
    """Whether a selector drops features, with nothing removed in the tower."""
    return name == EVS


def needs_hidden(name: str) -> bool:
    """Whether `select_windows` needs the hidden vectors of windows."""
    return name == TOME


def select_windows(
    name: str,
    shape: tuple[int, int],
    count: int,
    *,
    scores: Float32Array | None = None,
    hidden: NDArray[Any] | None = None,
    rng: np.random.Generator | None = None,
) -> Selection:
    """Choose between the two parts of the tower.

    Args:
        name: one of `SELECTORS` that is not `after_tower`.
        shape: (T, W).
        count: windows to remove, 0 <= count < T*W.
        scores: (T, W) of the scorer, for `stts`.
        hidden: (T*W, D), mean over a window's patches of the output of the lower part, where
            `needs_hidden`.
        rng: decides for `random`.

    Raises:
        InputError: no such selector here, or no scores for `stts`.
    """
    check_selector(name)
    if name == STTS:
        if scores is None:
            raise InputError(
                "there are no scores: the model has no scorer",
                where=f"selector {STTS}",
                allowed=" or ".join(other for other in SELECTORS if other != STTS),
            )
        return Selection(planner.select(scores, count))
    if name == RANDOM:
        assert rng is not None
        return Selection(random_windows(shape, count, rng))
    if name == UNIFORM_FRAMES:
        return Selection(uniform_frames(shape, count))
    if name == TOME:
        assert hidden is not None
        return merged_windows(hidden, shape, count)
    raise InputError(
        f"{name} chooses after the tower", where="select_windows", fix="use `select_features`"
    )


def random_windows(shape: tuple[int, int], count: int, rng: np.random.Generator) -> BoolArray:
    """Keep the first frame, as the scores would, and random windows of the others.

    Only where fewer windows than a frame has are kept does chance decide within the first frame.

    Args:
        shape: (T, W).
        count: windows to remove.
        rng: source of chance; the same state gives nested masks for different counts.

    Returns:
        (T, W).
    """
    frames, windows = shape
    order = rng.permutation(frames * windows)
    # A stable sort by "later frame" keeps the random order within the first frame and the others.
    order = order[np.argsort(order >= windows, kind="stable")]
    keep = np.zeros(frames * windows, dtype=np.bool_)
    keep[order[: len(order) - count]] = True
    return keep.reshape(shape)


def uniform_frames(shape: tuple[int, int], count: int) -> BoolArray:
    """Keep whole frames at even distances, as a lower frame rate would.

    K // W frames from the first to the last, the first alone where it is one. The K % W windows
    that are left over are spread evenly over one further frame, the one farthest from all others
    (the earliest of equals, and the first frame where no whole one is kept).

    Args:
        shape: (T, W).
        count: windows to remove.

    Returns:
        (T, W).
    """
    frames, windows = shape
    whole, rest = divmod(frames * windows - count, windows)
    chosen = _spread(frames, whole)
    keep = np.zeros(shape, dtype=np.bool_)
    keep[chosen] = True
    if rest:
        distance = np.abs(np.arange(frames)[:, None] - chosen[None, :])
        further = int(distance.min(axis=1, initial=frames).argmax())
        keep[further, _spread(windows, rest)] = True
    return keep


def _spread(length: int, number: int) -> Int64Array:
    """Return `number` different indices below `length`, both ends among them from two on."""
    steps = max(number - 1, 1)
    # Rounded to the nearest in integers; steps of one or more never meet.
    return (2 * np.arange(number) * (length - 1) + steps) // (2 * steps)


def merged_windows(hidden: NDArray[Any], shape: tuple[int, int], count: int) -> Selection:
    """Merge similar windows, after Token Merging (ToMe, arXiv 2210.09461).

    Bipartite soft matching by rounds: what is left is split into two sets, every window of one
    finds the most similar one of the other by the cosine of their hidden vectors, and the most
    similar pairs merge. A merged window's vector is the average over its members.

    Where this differs from the paper, which merges a little in every block of a tower:
    everything is merged at one place, so a round merges only an eighth of what is left and the
    sets are drawn anew; windows are matched over the whole clip, and the sets alternate along time
    at each place, since the neighbour in time is what a window most resembles; hidden vectors are
    compared, not keys; and no attention is weighted by the size of what was merged. Of all that
    merged into one the earliest stays. No frame is protected.

    Args:
        hidden: (T*W, D).
        shape: (T, W).
        count: windows to remove.

    Returns:
        The windows that stay, and where the others went.
    """
    frames, windows = shape
    # Averages have the direction of sums, and cosines ask for nothing else.
    sums = hidden.astype(np.float32)
    into = np.arange(frames * windows)
    left = into.reshape(shape).T.flatten()  # place by place, each in time
    kept = len(left) - count
    while len(left) > kept:
        targets, sources = left[::2], left[1::2]
        merges = min(len(left) - kept, len(sources), -(-len(left) // _MERGED_AT_ONCE))
        similarity = np.round(_unit(sums[sources]) @ _unit(sums[targets]).T, _SIMILARITY_DIGITS)
        nearest = similarity.argmax(axis=1)
        best = similarity[np.arange(len(sources)), nearest]
        chosen = np.argsort(-best, kind="stable")[:merges]
        for source, target in zip(sources[chosen], targets[nearest[chosen]], strict=True):
            sums[target] += sums[source]
            into[source] = target
        left = left[into[left] == left]
    while not np.array_equal(into, into[into]):
        into = into[into]
    earliest = np.full(len(into), len(into))
    np.minimum.at(earliest, into, np.arange(len(into)))
    into = earliest[into]
    return Selection((into == np.arange(len(into))).reshape(shape), into)


def merge(rows: NDArray[Any], selection: Selection) -> NDArray[Any]:
    """Average the patches of windows into the windows that stay, patch by patch.

    Args:
        rows: (T*W, G, D) output of the lower part.
        selection: of these windows.

    Returns:
        The same shape and type. Rows that do not stay are as they were: refill may give them back
        as context. `rows` itself where nothing was merged.
    """
    into = selection.merged_into
    if into is None:
        return rows
    sums = rows.astype(np.float32)
    for row in np.flatnonzero(into != np.arange(len(into))):
        sums[into[row]] += rows[row]
    merged = rows.copy()
    stays = np.flatnonzero(selection.keep)
    sizes = np.bincount(into, minlength=len(into))[stays].astype(np.float32)
    merged[stays] = (sums[stays] / sizes[:, None, None]).astype(rows.dtype)
    return merged


def select_features(features: NDArray[Any], shape: tuple[int, int], count: int) -> Selection:
    """Drop what repeats the frame before, after Efficient Video Sampling (arXiv 2510.14624).

    The windows whose feature is most similar, by its cosine, to that of the same window one frame
    before are dropped; of equally similar ones the lower index first. The first frame goes last.
    The paper compares pixels; its implementations in inference servers compare features, as this
    does.

    Args:
        features: (T*W, C) of a tower from which nothing was removed.
        shape: (T, W).
        count: features to drop, 0 <= count < T*W.
    """
    unit = _unit(features.reshape(*shape, -1).astype(np.float32))
    similarity = np.round((unit[1:] * unit[:-1]).sum(axis=-1), _SIMILARITY_DIGITS)
    change = np.zeros(shape, dtype=np.float32)
    change[1:] = 1 - similarity
    return Selection(planner.select(change, count))


def _unit(vectors: Float32Array) -> Float32Array:
    """Scale vectors (..., D) to length 1; zero ones stay zero."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, np.finfo(np.float32).tiny)


def check_selectors(names: Sequence[str]) -> tuple[str, ...]:
    """Return each of the names once.

    Raises:
        InputError: there are none, or one is no selector.
    """
    if not names:
        raise InputError("no selector", where="selector", allowed=" or ".join(SELECTORS))
    for name in names:
        check_selector(name)
    return tuple(dict.fromkeys(names))
