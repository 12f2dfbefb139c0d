"""The vision side of a session: lower, selection, upper; memory bounded by chunks.

Axes: T frames, W windows, G patches of a window, D vision width, C decoder width, K kept windows,
B bins; n crops of an image, N its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stts_export.config import VisionConfig
from stts_export.runtime import planner
from stts_export.runtime.decoder import Runner
from stts_export.tensors import ACTIVATION, CONNECTOR_CHUNK, Precision
from stts_export.tensors import LOWER_CHUNK as LOWER_CHUNK
from stts_export.tensors import UPPER_CHUNK as UPPER_CHUNK

Refill = Literal["reference", "off"]
OnProgress = Callable[[str, int, int], None]
"""(stage, done, total), called after every chunk."""


@dataclass(frozen=True)
class Runners:
    """The graphs of the vision side: `upper_frames`, or `upper` with what fills its bins.

    Both have a second output that only images use, `tapped`. For clips it is bound to memory that
    nobody reads, and so is the first one for images: left to itself an output would be allocated
    and copied call by call.
    """

    lower: Runner
    upper_frames: Runner | None = None
    """Frames of equal window count, planned and gathered on the host."""
    upper: Runner | None = None
    """Bins with a segment mask; `hidden` does not leave the runners' memory."""
    select_pack: Runner | None = None
    """Selects and fills bins by itself."""
    gather_windows: Runner | None = None
    """Fills bins as planned on the host."""
    connector: Runner | None = None
    """For images."""


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
    runners: Runners,
    config: VisionConfig,
    precision: Precision,
    frames: Any,
    count: int,
    *,
    refill: Refill = "reference",
    keep: NDArray[np.bool_] | None = None,
    on_progress: OnProgress | None = None,
) -> VisionOutput:
    """Encode one clip.

    Args:
        runners: the graphs.
        config: the tower.
        precision: of the graphs.
        frames: uint8 (T, height, width, 3) at the model's size, on the host or in the runners'
            memory.
        count: windows to remove.
        refill: "reference" gives a frame that is alone in its bin its removed windows back as
            context; "off" runs on kept windows only.
        keep: (T, W) decides in place of the scores.
        on_progress: called after every chunk.
    """
    started = time.perf_counter()
    hidden, scores = run_lower(runners.lower, config, precision, frames, count == 0, on_progress)
    host_scores = None if scores is None else runners.lower.to_host(scores)
    lowered = time.perf_counter() - started
    out = finish(
        runners,
        config,
        hidden,
        host_scores,
        count,
        device_scores=scores,
        refill=refill,
        keep=keep,
        on_progress=on_progress,
    )
    return replace(out, timings={"vision_lower": lowered, **out.timings})


def finish(
    runners: Runners,
    config: VisionConfig,
    hidden: Any,
    scores: NDArray[np.float32] | None,
    count: int,
    *,
    device_scores: Any = None,
    refill: Refill = "reference",
    keep: NDArray[np.bool_] | None = None,
    on_progress: OnProgress | None = None,
) -> VisionOutput:
    """Select the windows of a clip and run the part above the removal.

    Args:
        runners: the graphs.
        config: the tower.
        hidden: (T, W*G, D) from `run_lower`, in the runners' memory.
        scores: (T, W) on the host; None without a scorer.
        count: windows to remove.
        device_scores: the same in the runners' memory, where it is there.
        refill: as in `encode`.
        keep: (T, W) decides in place of the scores.
        on_progress: called after every chunk.
    """
    started = time.perf_counter()
    by_graph = runners.select_pack and count > 0 and keep is None and refill == "reference"
    bins: Bins | None = None
    if by_graph:
        assert runners.select_pack is not None
        given = scores if device_scores is None else device_scores
        keep, bins = select_pack(runners.select_pack, given, hidden, config, count)
    elif count == 0:
        keep = np.ones((len(hidden), config.windows), dtype=np.bool_)
    elif keep is None:
        assert scores is not None
        keep = planner.select(scores, count)
    if runners.upper_frames is not None:
        groups = planner.group_frames(keep, refill=refill == "reference")
        planned = time.perf_counter()
        features = run_upper(
            runners.upper_frames, hidden, groups, int(keep.sum()), config, on_progress
        )
    else:
        assert runners.upper is not None
        if bins is None:
            bins = fill_bins(runners.gather_windows, hidden, keep, refill == "reference")
        planned = time.perf_counter()
        features = run_upper_bins(runners.upper, bins, config, on_progress)
    timings = {"select": planned - started, "vision_upper": time.perf_counter() - planned}
    return VisionOutput(scores, keep, features, timings)


def encode_image(
    runners: Runners,
    config: VisionConfig,
    precision: Precision,
    crops: NDArray[np.uint8],
    pooled_patches: NDArray[np.int32],
    *,
    width: int,
    chunk: int = LOWER_CHUNK,
    on_progress: OnProgress | None = None,
) -> tuple[NDArray[Any], dict[str, float]]:
    """Encode one image, from which nothing is removed; only its tapped patches are held whole.

    Args:
        runners: the graphs, `connector` among them.
        config: the tower.
        precision: of the graphs.
        crops: uint8 (n, height, width, 3) at the model's size.
        pooled_patches: (N, P) the patches of a token: indices into the patches of all crops, row
            by row in each; -1 for none.
        width: C.
        chunk: most crops at once.
        on_progress: called after every chunk.

    Returns:
        (N, C) in the bundle's type, and seconds per stage.
    """
    started = time.perf_counter()
    upper = runners.upper_frames or runners.upper
    assert upper is not None
    assert runners.connector is not None
    patches = config.windows * config.patches_per_window
    taps = upper.zeros((len(crops), patches, _tapped_width(config)), ACTIVATION[precision])
    # Features of windows, which nobody reads either.
    unread = upper.zeros((min(len(crops), chunk), config.windows, width), ACTIVATION[precision])
    for start in range(0, len(crops), chunk):
        part = slice(start, min(start + chunk, len(crops)))
        hidden, _ = run_lower(runners.lower, config, precision, crops[part], plain=True)
        inputs = {"bins": hidden}
        if runners.upper_frames is None:
            inputs["segment"] = np.zeros((len(hidden), config.windows), np.int32)
        upper(inputs, {"tapped": taps[part], "packed_features": unread[: len(hidden)]})
        if on_progress:
            on_progress("image", part.stop, len(crops))
    seen = time.perf_counter()
    rows = taps.reshape(-1, _tapped_width(config))
    index = in_window_order(pooled_patches, config)
    parts = [
        runners.connector({"patches": rows, "pooled_patches": index[i : i + CONNECTOR_CHUNK]})
        for i in range(0, len(index), CONNECTOR_CHUNK)
    ]
    features = np.concatenate([part["features"] for part in parts])
    return features, {"image": seen - started, "connector": time.perf_counter() - seen}


def in_window_order(pooled_patches: NDArray[np.int32], config: VisionConfig) -> NDArray[np.int32]:
    """Turn indices of patches row by row into indices of the graphs' order, window by window."""
    (rows, columns), pool = config.grid, config.pool
    grid = np.arange(rows * columns).reshape(rows // pool, pool, columns // pool, pool)
    place = np.argsort(grid.swapaxes(1, 2).ravel())
    crop, patch = np.divmod(pooled_patches, rows * columns)
    index = crop * (rows * columns) + place[patch]
    return np.where(pooled_patches < 0, pooled_patches, index).astype(np.int32)


def _tapped_width(config: VisionConfig) -> int:
    return config.hidden_size * len(config.taps)


def run_lower(
    runner: Runner,
    config: VisionConfig,
    precision: Precision,
    frames: Any,
    plain: bool,
    on_progress: OnProgress | None = None,
) -> tuple[Any, Any]:
    """Run vision_lower chunk by chunk; each chunk hands its last frame's view to the next.

    Args:
        runner: the graph.
        config: the tower.
        precision: of the graph.
        frames: (T, height, width, 3), on the host or in the runner's memory.
        plain: nothing will be removed, so no frame gets a bias.
        on_progress: called after every chunk.

    Returns:
        In the runner's memory: hidden (T, W*G, D); scores (T, W), None without a scorer.
    """
    total = len(frames)
    hidden, scores = lower_buffers(runner, config, precision, total)
    fresh = np.full(total, plain)
    fresh[0] = True
    view = ScorersView(runner, config)
    for start in range(0, total, LOWER_CHUNK):
        chunk = slice(start, min(start + LOWER_CHUNK, total))
        lower_chunk(
            runner,
            frames[chunk],
            fresh[chunk],
            view,
            hidden[chunk],
            None if scores is None else scores[chunk],
        )
        if on_progress:
            on_progress("vision_lower", chunk.stop, total)
    return hidden, scores


def lower_buffers(
    runner: Runner, config: VisionConfig, precision: Precision, frames: int
) -> tuple[Any, Any]:
    """Memory of the runner for so many frames: hidden (T, W*G, D); scores (T, W) or None."""
    patches = config.windows * config.patches_per_window
    hidden = runner.zeros((frames, patches, config.hidden_size), ACTIVATION[precision])
    scores = runner.zeros((frames, config.windows), np.float32) if config.pruning else None
    return hidden, scores


class ScorersView:
    """What the scorer has seen of the frame before, (1, W, D), handed from call to call.

    Args:
        runner: the `vision_lower` graph.
        config: the tower.
    """

    def __init__(self, runner: Runner, config: VisionConfig) -> None:
        shape = (1, config.windows, config.hidden_size)
        number = 2 if config.pruning else 0
        self._buffers = [runner.zeros(shape, np.float32) for _ in range(number)]

    def bindings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of the next call."""
        if not self._buffers:
            return {}, {}
        seen, seen_next = self._buffers
        self._buffers = [seen_next, seen]
        return {"prev_pooled": seen}, {"last_pooled": seen_next}


def lower_chunk(
    runner: Runner,
    frames: Any,
    fresh: NDArray[np.bool_],
    view: ScorersView,
    hidden: Any,
    scores: Any,
) -> None:
    """Run vision_lower once.

    Args:
        runner: the graph.
        frames: (F, height, width, 3), on the host or in the runner's memory.
        fresh: (F,): no predecessor and no bias.
        view: of the frame before; becomes that of the last frame.
        hidden: (F, W*G, D) in the runner's memory, to write to.
        scores: (F, W) likewise; None without a scorer.
    """
    if isinstance(frames, np.ndarray):
        frames = np.ascontiguousarray(frames)
    inputs: dict[str, Any] = {"frames": frames}
    outputs = {"hidden": hidden}
    if scores is not None:
        seen, seen_next = view.bindings()
        inputs |= {"fresh": fresh, **seen}
        outputs |= {"scores": scores, **seen_next}
    runner(inputs, outputs)


@dataclass(frozen=True)
class Bins:
    """What vision_upper runs on, and where the features of kept windows are in its output."""

    chunks: Iterator[tuple[Any, Any]]
    """bins (b, W*G, D) and segment (b, W), up to `UPPER_CHUNK` bins at a time."""
    count: int
    """B."""
    kept_slot: NDArray[np.int32]
    """(K,) of B*W, frame-major."""


def select_pack(
    runner: Runner, scores: Any, hidden: Any, config: VisionConfig, count: int
) -> tuple[NDArray[np.bool_], Bins]:
    """Select, pack and gather by the graph of that name.

    Args:
        runner: the `select_pack` graph.
        scores: (T, W) in its memory.
        hidden: (T, W*G, D) in its memory.
        config: the tower.
        count: windows to remove.

    Returns:
        keep (T, W), and the bins in the runner's memory.
    """
    frames, windows = len(hidden), config.windows
    kept_count = np.array([frames * windows - count], np.int64)
    out = runner({"scores": scores, "hidden": hidden, "kept_count": kept_count})
    keep = np.zeros(frames * windows, dtype=np.bool_)
    keep[out["kept_window"]] = True
    total = int(out["bin_count"])
    chunks = ((out["bins"][chunk], out["segment"][chunk]) for chunk in _chunks(total))
    return keep.reshape(frames, windows), Bins(chunks, total, out["kept_slot"])


def fill_bins(
    runner: Runner | None,
    hidden: Any,
    keep: NDArray[np.bool_],
    refill: bool,
) -> Bins:
    """Plan on the host and gather by the graph `gather_windows`.

    Args:
        runner: the graph; None for a tower without a scorer, where every frame is left as its own
            bin: the same features, with the removed windows in a segment of their own.
        hidden: (T, W*G, D) in its memory.
        keep: (T, W).
        refill: as in `planner.pack`.
    """
    if runner is None or keep.all():
        segment, kept_slot = planner.unpacked(keep, refill=refill)
        whole = ((hidden[chunk], segment[chunk]) for chunk in _chunks(len(hidden)))
        return Bins(whole, len(hidden), kept_slot)
    plan = planner.pack(keep, refill=refill)
    return Bins(_gathered(runner, hidden, plan), len(plan.segment), plan.kept_slot)


def _gathered(runner: Runner, hidden: Any, plan: planner.PackPlan) -> Iterator[tuple[Any, Any]]:
    total = len(plan.segment)
    shape = (min(UPPER_CHUNK, total), *hidden.shape[1:])
    bins = runner.zeros(shape, hidden.dtype)
    for chunk in _chunks(total):
        gather = plan.gather_window[chunk]
        filled = bins[: len(gather)]
        runner({"hidden": hidden, "gather_window": gather}, {"bins": filled})
        yield filled, plan.segment[chunk]


def _chunks(total: int) -> Iterator[slice]:
    for start in range(0, total, UPPER_CHUNK):
        yield slice(start, min(start + UPPER_CHUNK, total))


def run_upper_bins(
    runner: Runner, bins: Bins, config: VisionConfig, on_progress: OnProgress | None = None
) -> NDArray[Any]:
    """Run vision_upper on bins with a segment mask.

    Args:
        runner: the `vision_upper` graph.
        bins: what it runs on.
        config: the tower.
        on_progress: called after every chunk.

    Returns:
        (K, C).
    """
    features: NDArray[Any] | None = None
    unread: Any = None
    done, total = 0, bins.count * config.windows
    for chunk, segment in bins.chunks:
        if unread is None or len(unread) < len(chunk):
            unread = runner.zeros((*chunk.shape[:2], _tapped_width(config)), chunk.dtype)
        outputs = runner({"bins": chunk, "segment": segment}, {"tapped": unread[: len(chunk)]})
        packed = outputs["packed_features"]  # (b, W, C)
        packed = packed.reshape(-1, packed.shape[-1])
        if features is None:
            features = np.empty((len(bins.kept_slot), packed.shape[-1]), packed.dtype)
        row = np.flatnonzero((bins.kept_slot >= done) & (bins.kept_slot < done + len(packed)))
        features[row] = packed[bins.kept_slot[row] - done]
        done += len(packed)
        if on_progress:
            on_progress("vision_upper", done, total)
    assert features is not None
    return features


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
    most = min(total, UPPER_CHUNK * config.windows) * config.patches_per_window
    unread = runner.zeros((most, _tapped_width(config)), hidden.dtype)
    done = 0
    for group in groups:
        frames, slots = group.gather_window.shape
        step = max(1, UPPER_CHUNK * config.windows // slots)
        for start in range(0, frames, step):
            rows = group.gather_window[start : start + step]
            bins = windows[rows].reshape(len(rows), -1, config.hidden_size)  # (m, n*G, D)
            tapped = unread[: bins.shape[0] * bins.shape[1]].reshape(*bins.shape[:2], -1)
            packed = runner({"bins": bins}, {"tapped": tapped})["packed_features"]  # (m, n, C)
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
