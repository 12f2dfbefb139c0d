"""What a prompt is about: videos and images, encoded or about to be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stts_export.engines.cuda import DeviceArray
from stts_export.errors import InputError
from stts_export.runtime.prompt import ImageTokens, Subtitle, VideoTokens
from stts_export.runtime.video import VideoClip

NOT_PRUNED = "nothing was removed: images are not pruned"
_NO_VISUAL = "nothing was removed: the prompt is about no video"
_CLIP_DIMENSIONS = 4


@dataclass(frozen=True)
class EncodedClip:
    """The vision side of a clip, ready for any number of questions."""

    scores: NDArray[np.float32] | None
    """(T, W) in (0, 1), high = important; None when the model has no scorer."""
    keep: NDArray[np.bool_]
    """(T, W): windows that survived."""
    features: NDArray[Any]
    """(K, C), frame-major, in the bundle's type."""
    timestamps: NDArray[np.float64]
    """(T,) seconds."""
    prune_ratio: float
    note: str | None
    """Why nothing was removed, or None when something was."""
    timings: dict[str, float]
    """Seconds per stage."""

    @property
    def kept_windows(self) -> int:
        """K: windows that survived."""
        return len(self.features)

    @property
    def total_windows(self) -> int:
        """T * W: windows of the clip."""
        return self.keep.size

    @property
    def tokens(self) -> VideoTokens:
        """What a prompt says about it."""
        return VideoTokens(self.timestamps, self.keep.shape[1])


@dataclass(frozen=True)
class EncodedImage:
    """The vision side of an image, ready for any number of questions; it is never pruned."""

    features: NDArray[Any]
    """(N, C): of the whole image at low resolution, then of its crops together; row by row, in
    the bundle's type."""
    grid: tuple[int, int, int, int]
    """Rows and columns of these tokens: of the whole image, then of the crops together."""
    crops: int
    """Pieces at the model's size that were seen, the whole image among them."""
    timings: dict[str, float]
    """Seconds per stage."""
    note: str = NOT_PRUNED

    @property
    def keep(self) -> NDArray[np.bool_]:
        """(N,): all True."""
        return np.ones(len(self.features), dtype=np.bool_)

    @property
    def tokens(self) -> ImageTokens:
        """What a prompt says about it."""
        return ImageTokens(self.grid)


Encoded = EncodedClip | EncodedImage


@dataclass(frozen=True)
class ClipRequest:
    """A clip to encode, checked."""

    frames: NDArray[np.uint8] | DeviceArray
    timestamps: NDArray[np.float64]
    windows: int
    """W, of a frame."""
    prune_ratio: float
    count: int
    """Windows to remove."""
    mask: NDArray[np.bool_] | None
    """(T, W) decides in place of the scores."""
    note: str | None
    """Why nothing will be removed, or None when something will."""

    @property
    def tokens(self) -> VideoTokens:
        """What a prompt says about it."""
        return VideoTokens(self.timestamps, self.windows)

    @property
    def total(self) -> int:
        """Windows of the clip."""
        return len(self.timestamps) * self.windows


@dataclass(frozen=True)
class ImageRequest:
    """An image to encode, checked."""

    image: NDArray[np.uint8]
    """(height, width, 3)."""
    grid: tuple[int, int, int, int]
    """Rows and columns of its tokens: of the whole image, then of its crops together."""

    count = 0
    """Tokens to remove."""

    @property
    def tokens(self) -> ImageTokens:
        """What a prompt says about it."""
        return ImageTokens(self.grid)

    @property
    def total(self) -> int:
        """Tokens of the image."""
        return _tokens(self.grid)


Request = Encoded | ClipRequest | ImageRequest
"""One video or image of a prompt, checked."""


@dataclass(frozen=True)
class VisualSummary:
    """What became of one video or image of a prompt."""

    kind: Literal["video", "image"]
    frames: int
    """Sampled frames; of an image the pieces that were seen, the whole image among them."""
    kept_windows: int
    """Tokens in the prompt."""
    total_windows: int
    """Windows before removal; of an image as many as are kept."""
    prune_ratio: float
    note: str | None
    """Why nothing was removed, or None when something was."""


@dataclass(frozen=True)
class Totals:
    """What became of all videos of a prompt; images are not counted."""

    frames: int
    kept_windows: int
    total_windows: int
    prune_ratio: float
    """The ratio of all videos; where they differ, the fraction of windows that was removed."""
    note: str | None
    """Why nothing was removed, or None when something was."""


def as_list(given: object) -> list[Any]:
    """Split what a prompt is about; a list of pictures of equal size is one clip's frames.

    Args:
        given: one visual, or a list or tuple in which at least one element is encoded, a file, a
            `VideoClip` or an array (T, height, width, 3); an empty one for a prompt of text alone.
    """
    if isinstance(given, (list, tuple)) and (not given or any(map(_is_visual, given))):
        return list(given)
    return [given]


def _is_visual(value: object) -> bool:
    kinds = (EncodedClip, EncodedImage, VideoClip, str, Path)
    return isinstance(value, kinds) or getattr(value, "ndim", None) == _CLIP_DIMENSIONS


def _is_image(value: object) -> bool:
    return isinstance(value, EncodedImage) or (isinstance(value, VideoClip) and value.is_image)


def _tokens(grid: tuple[int, int, int, int]) -> int:
    return grid[0] * grid[1] + grid[2] * grid[3]


def check_settings(
    visuals: Sequence[object], prune_ratio: float | None, max_frames: int | None
) -> None:
    """Refuse settings of steps that were done already; images have none of these steps.

    Args:
        visuals: what a prompt is about.
        prune_ratio: a valid one, or None when not asked for.
        max_frames: a valid one, or None when not asked for.

    Raises:
        InputError: a clip is encoded or sampled already.
    """
    for visual in visuals:
        if _is_image(visual):
            continue
        if prune_ratio is not None and isinstance(visual, EncodedClip):
            raise InputError(
                f"prune_ratio {prune_ratio!r} for a clip that is encoded already",
                where="generate",
                fix="give the ratio to `encode`",
            )
        if max_frames is not None and not isinstance(visual, (str, Path)):
            raise InputError(
                f"max_frames {max_frames!r} for a clip that is sampled already",
                where="generate",
                fix="give the limit to `read_video`, or pass the video file",
            )


def check_encoded(visual: Encoded, windows: int, width: int, dtype: str) -> None:
    """Refuse what a session of another bundle has encoded.

    Args:
        visual: an encoded clip or image.
        windows: W of the bundle.
        width: C of the bundle.
        dtype: of the bundle's features.

    Raises:
        InputError: the shape or the type of its features is not what the bundle gives.
    """
    if isinstance(visual, EncodedImage):
        rows, fits = _tokens(visual.grid), True
    else:
        rows, fits = int(visual.keep.sum()), visual.keep.shape[1:] == (windows,)
    features = visual.features
    if not fits or features.shape != (rows, width) or features.dtype != dtype:
        seen = "" if fits else f" of frames in {visual.keep.shape[-1]} windows"
        raise InputError(
            f"an encoded {'image' if isinstance(visual, EncodedImage) else 'clip'} with features "
            f"of shape {features.shape} and type {features.dtype}{seen}",
            where="clip",
            allowed=f"({rows}, {width}) of type {dtype}, {windows} windows a frame: what "
            "this bundle gives",
            fix="encode it with a session of this bundle",
        )


def with_subtitles(
    visuals: Sequence[VideoTokens | ImageTokens], subtitles: Sequence[Subtitle]
) -> list[VideoTokens | ImageTokens]:
    """Give a prompt's first video its subtitles, if there are any.

    `PromptBuilder.build` refuses them where the prompt is about anything else too.

    Raises:
        InputError: there is no video, or they are no subtitles.
    """
    given = list(visuals)
    if not subtitles:
        return given
    if not isinstance(subtitles, (list, tuple)) or not all(
        isinstance(line, Subtitle) for line in subtitles
    ):
        raise InputError(
            f"the subtitles are {subtitles!r:.80}",
            where="subtitles",
            allowed="a list of Subtitle",
            fix="read_subtitles reads them from a file",
        )
    for index, visual in enumerate(given):
        if isinstance(visual, VideoTokens):
            given[index] = replace(visual, subtitles=tuple(subtitles))
            return given
    raise InputError(
        "subtitles in a prompt without a video", where="prompt", allowed="subtitles of a video"
    )


def summary(visual: Encoded) -> VisualSummary:
    """Sum up one visual of a prompt."""
    kept = len(visual.features)
    if isinstance(visual, EncodedImage):
        return VisualSummary("image", visual.crops, kept, kept, 0.0, visual.note)
    return VisualSummary(
        "video", len(visual.keep), kept, visual.total_windows, visual.prune_ratio, visual.note
    )


def totals(visuals: Sequence[VisualSummary]) -> Totals:
    """Sum up the videos of a prompt."""
    videos = [visual for visual in visuals if visual.kind == "video"]
    kept = sum(video.kept_windows for video in videos)
    total = sum(video.total_windows for video in videos)
    ratios = {video.prune_ratio for video in videos}
    removed = (total - kept) / total if total else 0.0
    notes = list(dict.fromkeys(visual.note for visual in visuals if visual.note is not None))
    return Totals(
        sum(video.frames for video in videos),
        kept,
        total,
        ratios.pop() if len(ratios) == 1 else removed,
        None if kept < total else "; ".join(notes) or _NO_VISUAL,
    )


def added_timings(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Seconds per stage, over all parts."""
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, spent in part.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return seconds
