"""What passes through a pruned model while it answers: magnitudes of every layer's input.

Statistics are collected as the model is deployed. Videos are decoded, sampled and resized as at run
time; the upper part of the tower sees the windows that survive and no padding; the decoder sees the
shortened prompt and some tokens of its own answer. So ranges are those of the rows that will be
there, and rows that are removed do not widen them.

Axes: R rows, L tokens, d width of a head.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor, nn

from stts_export.calibration.clips import CalibrationClip, OnProgress
from stts_export.calibration.layers import input_groups
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import whole
from stts_export.machine import return_freed_memory
from stts_export.model.vlm import SttsModel
from stts_export.runtime.demux import UnreliableTimesError
from stts_export.runtime.planner import n_prune
from stts_export.runtime.video import VideoClip
from stts_export.training.answerers import encode
from stts_export.training.checkpoint_answerer import CheckpointAnswerer
from stts_export.training.selectors import STTS

SCHEMA = 1
"""Of the files; one of another schema is not read."""
ROWS = 256
"""Sampled rows of an input, over all clips, at most."""
NEW_TOKENS = 8
"""Of every answer at most: enough for the decoder's single steps to be seen."""

_GOLDEN = (math.sqrt(5) - 1) / 2
BROKEN = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What reading a damaged npz file, or any other file, raises."""

Float32Array = NDArray[np.float32]


@dataclass(frozen=True)
class InputStatistics:
    """Of one tensor that one or more linear layers read, over all its rows."""

    amax: Float32Array
    """(in,) largest magnitude of each channel."""
    mean_abs: Float32Array
    """(in,) mean magnitude of each channel."""
    count: int
    """Rows that were seen."""
    rows: Float32Array
    """(R, in), up to `ROWS` of them, spread over clips and calls."""


@dataclass(frozen=True)
class ModelStatistics:
    """Of a model, over some clips."""

    inputs: dict[str, InputStatistics]
    """By the first layer of each of `layers.input_groups`."""
    ranges: dict[str, float]
    """Largest magnitude of what a linear layer gives ("NAME"), protected ones included, and of what
    a norm takes in ("NAME:in"): what a format without scales has to hold."""
    keys: dict[int, Float32Array]
    """Layer of the decoder -> (kv_heads, d) largest magnitude of the cached, rotated keys."""
    values: dict[int, Float32Array]
    """The same of the cached values."""
    clips: int
    windows: tuple[int, int]
    """Kept, and in all."""

    def to_file(self, path: Path) -> None:
        """Write an npz file, whole."""
        _write(path, self, "")

    @staticmethod
    def from_file(path: Path) -> ModelStatistics:
        """Read what `to_file` wrote.

        Raises:
            InputError: it is missing, damaged or something else.
        """
        return _read(path)[0]


def merge(parts: Sequence[ModelStatistics]) -> ModelStatistics:
    """Put statistics of the same model over different clips together.

    Nothing but the order and choice of the sampled rows depends on the order of the parts.

    Args:
        parts: one or more.
    """
    first = parts[0]
    kept, total = (sum(part.windows[which] for part in parts) for which in (0, 1))
    return ModelStatistics(
        {name: _merged([part.inputs[name] for part in parts]) for name in first.inputs},
        {name: max(part.ranges[name] for part in parts) for name in first.ranges},
        {layer: _largest([part.keys[layer] for part in parts]) for layer in first.keys},
        {layer: _largest([part.values[layer] for part in parts]) for layer in first.values},
        sum(part.clips for part in parts),
        (kept, total),
    )


def _merged(parts: Sequence[InputStatistics]) -> InputStatistics:
    sums = np.stack([part.mean_abs.astype(np.float64) * part.count for part in parts])
    count = sum(part.count for part in parts)
    # Sorted, so that rounding does not depend on the order of the clips.
    mean = np.sort(sums, axis=0).sum(axis=0) / count
    rows = np.concatenate([part.rows for part in parts])
    return InputStatistics(
        _largest([part.amax for part in parts]),
        mean.astype(np.float32),
        count,
        rows[evenly_spaced(len(rows), ROWS)],
    )


def _largest(arrays: Sequence[Float32Array]) -> Float32Array:
    largest: Float32Array = np.maximum.reduce(arrays)
    return largest


def evenly_spaced(count: int, most: int) -> NDArray[np.int64]:
    """Return ascending numbers below `count`: all of them, or `most` that are evenly spaced."""
    if count <= most:
        return np.arange(count)
    return (2 * np.arange(most) + 1) * count // (2 * most)


def collect(
    model: SttsModel,
    answerer: CheckpointAnswerer,
    clips: Sequence[CalibrationClip],
    ratio: float,
    cache: Path,
    *,
    key: str,
    on_progress: OnProgress | None = None,
) -> ModelStatistics:
    """Collect statistics of a model that answers one question about each clip.

    The statistics of every clip are kept in a file, and are not collected again when they are
    there: an interrupted run goes on where it was.

    Args:
        model: in fp32; its weights may be on disk (`streamed_model`).
        answerer: of the same model.
        clips: one or more.
        ratio: fraction of windows to remove.
        cache: folder for the files, made when it is not there.
        key: says which checkpoint it is and how the answerer is set up; statistics of another key
            are not used.
        on_progress: called after every clip.

    Raises:
        InputError: a clip cannot be read or is an image, a prompt does not fit the model, the ratio
            is out of range, the model has no scorer, or an activation is NaN or infinite.
    """
    if model is not answerer.model:
        raise ValueError("the answerer is of another model")
    n_prune(model.config.vision.windows, 1, ratio)
    cache.mkdir(parents=True, exist_ok=True)
    share = max(1, ROWS // len(clips))
    parts = []
    for done, clip in enumerate(clips, start=1):
        made_from = _made_from(clip, ratio, key, share)
        file = cache / f"{made_from}.npz"
        known = _known(file, made_from)
        if known is None:
            known = _clip_statistics(answerer, clip, ratio, share)
            _write(file, known, made_from)
            return_freed_memory()
        parts.append(known)
        if on_progress is not None:
            on_progress(done, len(clips))
    return merge(parts)


def _made_from(clip: CalibrationClip, ratio: float, key: str, share: int) -> str:
    """Hash all that the statistics of a clip depend on."""
    values = [SCHEMA, clip.sha256, clip.prompt, ratio, key, share, NEW_TOKENS]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _known(file: Path, made_from: str) -> ModelStatistics | None:
    """Return kept statistics; None where there are none, or what is there is something else."""
    try:
        statistics, origin = _read(file)
    except InputError:
        return None
    return statistics if origin == made_from else None


def _clip_statistics(
    answerer: CheckpointAnswerer, clip: CalibrationClip, ratio: float, share: int
) -> ModelStatistics:
    """Have one question answered, and watch."""
    video = read_clip(answerer, clip.video)
    observer = _Observer(answerer.config, share, clip.name)
    with _observed(answerer, observer):
        tower = answerer.tower(video)
        rng = np.random.default_rng(0)  # chance decides nothing for this selector
        encoded = encode(tower, video.timestamps, ratio, STTS, rng)
        answerer.answers(encoded, [clip.prompt], [NEW_TOKENS])
    return observer.statistics((encoded.kept_windows, encoded.total_windows))


def read_clip(answerer: CheckpointAnswerer, file: Path) -> VideoClip:
    """Read a video; errors say what can be done about it."""
    fix = "repair the file, or leave it out of the calibration clips"
    try:
        video = answerer.read(file)
    except InputError as error:
        raise InputError(
            error.message, where=error.where, allowed=error.allowed, fix=error.fix or fix
        ) from None
    except (av.FFmpegError, OSError, UnreliableTimesError) as error:
        raise InputError(f"cannot be decoded: {error}", where=str(file), fix=fix) from None
    if video.is_image:
        raise InputError(
            "is an image, from which nothing is removed",
            where=str(file),
            allowed="a video",
            fix="leave it out of the calibration clips",
        )
    return video


@contextmanager
def _observed(answerer: CheckpointAnswerer, observer: _Observer) -> Iterator[None]:
    """Have an observer see all tensors that it keeps statistics of."""
    hooks = []
    try:
        for name, module in answerer.model.named_modules():
            if isinstance(module, nn.Linear):
                hooks.append(module.register_forward_hook(_linear_hook(observer, name)))
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                hooks.append(module.register_forward_pre_hook(_norm_hook(observer, name)))
        answerer.cache_observer = observer.cached
        yield
    finally:
        answerer.cache_observer = None
        for hook in hooks:
            hook.remove()


def _linear_hook(observer: _Observer, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _, inputs, output: observer.linear(name, inputs[0], output)


def _norm_hook(observer: _Observer, name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _, inputs: observer.norm(name, inputs[0])


class _Observer:
    """Statistics of one clip, while its tensors pass.

    Args:
        config: of the model.
        share: sampled rows of an input at most.
        clip: its name, for messages.
    """

    def __init__(self, config: ModelConfig, share: int, clip: str) -> None:
        self._clip = clip
        self._inputs = {group[0]: _Input(share) for group in input_groups(config)}
        self._ranges: dict[str, float] = {}
        self._cached: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})

    def linear(self, name: str, x: Tensor, output: Tensor) -> None:
        """Take note of what a linear layer reads and gives."""
        if name in self._inputs:
            largest = self._inputs[name].add(x.flatten(0, -2))
            self._check_finite(largest, f"the input of {name}")
        self._note_range(name, output, f"the output of {name}")

    def norm(self, name: str, x: Tensor) -> None:
        """Take note of what a norm reads."""
        self._note_range(f"{name}:in", x, f"the input of {name}")

    def cached(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take note of what is added to the cache, (N, kv_heads, L, d) each."""
        for known, what in zip(self._cached, (keys, values), strict=True):
            largest = what.abs().amax((0, 2))
            known[layer] = torch.maximum(known[layer], largest) if layer in known else largest

    def _note_range(self, key: str, x: Tensor, what: str) -> None:
        low, high = x.aminmax()
        largest = float(torch.maximum(-low, high))
        self._check_finite(largest, what)
        self._ranges[key] = max(largest, self._ranges.get(key, 0.0))

    def _check_finite(self, largest: float, what: str) -> None:
        if not math.isfinite(largest):
            raise InputError(
                f"{what} has NaN or infinite values",
                where=f"clip {self._clip}",
                fix="the weights are damaged, or training went wrong: use another checkpoint",
            )

    def statistics(self, windows: tuple[int, int]) -> ModelStatistics:
        """Sum up."""
        keys, values = (
            {layer: largest.cpu().numpy() for layer, largest in sorted(known.items())}
            for known in self._cached
        )
        inputs = {name: one.statistics() for name, one in self._inputs.items()}
        return ModelStatistics(inputs, dict(self._ranges), keys, values, 1, windows)


class _Input:
    """Statistics of one input, call by call.

    Of each call up to `share` evenly spaced rows are candidates. Of all candidates those stay whose
    number times the golden ratio has the smallest fractional part: however many come, they are
    spread evenly over them, and no more than `share` have to be held.

    Args:
        share: sampled rows at most.
    """

    def __init__(self, share: int) -> None:
        self._share = share
        self._count = self._candidates = 0
        self._amax: Tensor | None = None
        self._sums: Tensor | None = None
        self._ranks: NDArray[np.float64] = np.empty(0)
        self._rows: Float32Array | None = None

    def add(self, x: Tensor) -> float:
        """Add (R, in) rows; returns their largest magnitude, not finite if one of them is not."""
        magnitude = x.abs()
        amax = magnitude.amax(0)
        sums = magnitude.sum(0, dtype=torch.float64)
        self._amax = amax if self._amax is None else torch.maximum(self._amax, amax)
        self._sums = sums if self._sums is None else self._sums + sums
        self._count += len(x)
        self._sample(x)
        return float(amax.amax())

    def _sample(self, x: Tensor) -> None:
        rows = evenly_spaced(len(x), self._share)
        numbers = np.arange(self._candidates, self._candidates + len(rows))
        self._candidates += len(rows)
        before = len(self._ranks)
        ranks = np.concatenate([self._ranks, numbers * _GOLDEN % 1])
        kept = np.sort(ranks.argsort(kind="stable")[: self._share])
        new = rows[kept[kept >= before] - before]
        if len(new) == 0:
            return
        taken = x[torch.from_numpy(new).to(x.device)].float().cpu().numpy()
        old = taken[:0] if self._rows is None else self._rows[kept[kept < before]]
        self._ranks, self._rows = ranks[kept], np.concatenate([old, taken])

    def statistics(self) -> InputStatistics:
        """Sum up; every layer runs for every clip."""
        assert self._amax is not None
        assert self._sums is not None
        assert self._rows is not None
        mean = (self._sums / self._count).float()
        return InputStatistics(
            self._amax.float().cpu().numpy(), mean.cpu().numpy(), self._count, self._rows
        )


def _write(path: Path, statistics: ModelStatistics, made_from: str) -> None:
    """Write statistics, and what they were made from, whole."""
    described = {
        "schema": SCHEMA,
        "made_from": made_from,
        "clips": statistics.clips,
        "windows": statistics.windows,
        "inputs": {name: one.count for name, one in statistics.inputs.items()},
        "ranges": statistics.ranges,
        "layers": list(statistics.keys),
    }
    # NumPy's stubs take the names of arrays for its own arguments.
    arrays: dict[str, Any] = {"description": np.array(json.dumps(described))}
    for name, one in statistics.inputs.items():
        for part in ("amax", "mean_abs", "rows"):
            arrays[f"{part}:{name}"] = getattr(one, part)
    for layer, keys in statistics.keys.items():
        arrays[f"keys:{layer}"], arrays[f"values:{layer}"] = keys, statistics.values[layer]
    # Opened here: NumPy would put another suffix behind the name.
    with whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> tuple[ModelStatistics, str]:
    """Read statistics, and what they were made from.

    Raises:
        InputError: it is missing, damaged or something else.
    """
    try:
        with path.open("rb") as file, NpzFile(file, allow_pickle=False) as arrays:
            described = json.loads(arrays["description"].item())
            if described["schema"] != SCHEMA:
                raise ValueError(f"its schema is {described['schema']}, not {SCHEMA}")
            return _statistics(described, arrays), str(described["made_from"])
    except BROKEN as error:
        raise InputError(
            f"cannot be read as statistics of a model: {error}",
            where=str(path),
            fix="calibrate again",
        ) from None


def _statistics(described: Mapping[str, Any], arrays: NpzFile) -> ModelStatistics:
    inputs = {
        name: InputStatistics(
            arrays[f"amax:{name}"], arrays[f"mean_abs:{name}"], int(count), arrays[f"rows:{name}"]
        )
        for name, count in described["inputs"].items()
    }
    layers = [int(layer) for layer in described["layers"]]
    kept, total = described["windows"]
    return ModelStatistics(
        inputs,
        {name: float(largest) for name, largest in described["ranges"].items()},
        {layer: arrays[f"keys:{layer}"] for layer in layers},
        {layer: arrays[f"values:{layer}"] for layer in layers},
        int(described["clips"]),
        (int(kept), int(total)),
    )
