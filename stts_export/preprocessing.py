"""How a checkpoint prepares video and images, from its preprocessors' files.

`video_preprocessor_config.json` and `preprocessor_config.json`; in folders that transformers 5 has
written both are sections of `processor_config.json`, which come first there and here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stts_export.config import VisionConfig
from stts_export.errors import InputError
from stts_export.files import json_object
from stts_export.tensors import IMAGE_POOL

DEFAULT_MAX_FPS = 2.0
DEFAULT_MAX_CROPS = 8
DEFAULT_OVERLAP_MARGINS = (4, 4)

_COMBINED = "processor_config.json"
_HALF = [0.5, 0.5, 0.5]  # the graphs normalise pixels to [-1, 1]
_BILINEAR = 2  # PIL's number


@dataclass(frozen=True)
class VideoPreprocessing:
    """What the checkpoint says about sampling."""

    num_frames: int | None = None
    """Longest clip in frames; None when the checkpoint does not say."""
    max_fps: float = DEFAULT_MAX_FPS


@dataclass(frozen=True)
class ImagePreprocessing:
    """What the checkpoint says about cutting images into crops."""

    max_crops: int = DEFAULT_MAX_CROPS
    overlap_margins: tuple[int, int] = DEFAULT_OVERLAP_MARGINS
    """Patches at the left and right (top and bottom) of a crop that its neighbour has too."""


def video_preprocessing(folder: Path, vision: VisionConfig) -> VideoPreprocessing:
    """Read a checkpoint's settings; absent or null ones have the model family's values.

    Args:
        folder: the checkpoint folder.
        vision: the tower that the frames are for.

    Raises:
        InputError: a value has the wrong type, or asks for what the runtime does not do.
    """
    values, where = _settings(folder, "video_preprocessor_config.json", "video_processor")
    num_frames, max_fps = values.get("num_frames"), values.get("max_fps", DEFAULT_MAX_FPS)
    if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
        raise _refused("num_frames", num_frames, where, "an integer, 1 or more")
    if type(max_fps) not in (int, float) or not 0 < max_fps < math.inf:
        raise _refused("max_fps", max_fps, where, "a positive number")
    sampling = {"frame_sample_mode": "uniform_last_frame"}
    _check_fixed(values, sampling | _fixed(vision, vision.pool), where)
    return VideoPreprocessing(num_frames, float(max_fps))


def image_preprocessing(folder: Path, vision: VisionConfig) -> ImagePreprocessing:
    """Read a checkpoint's settings; absent or null ones have the model family's values.

    Args:
        folder: the checkpoint folder, or a bundle's `config/`.
        vision: the tower that the crops are for.

    Raises:
        InputError: a value has the wrong type, or asks for what the runtime does not do.
    """
    values, where = _settings(folder, "preprocessor_config.json", "image_processor")
    max_crops = values.get("max_crops", DEFAULT_MAX_CROPS)
    if type(max_crops) is not int or max_crops < 1:
        raise _refused("max_crops", max_crops, where, "an integer, 1 or more")
    margins = values.get("overlap_margins", list(DEFAULT_OVERLAP_MARGINS))
    match margins:
        case [int(before), int(after)] if min(before, after) >= 0 and bool not in map(
            type, margins
        ):
            pass
        case _:
            raise _refused("overlap_margins", margins, where, "two integers, 0 or more")
    _check_fixed(values, {"do_convert_rgb": True} | _fixed(vision, IMAGE_POOL), where)
    return ImagePreprocessing(max_crops, (before, after))


def _settings(folder: Path, file: str, section: str) -> tuple[dict[str, Any], str]:
    """Return a preprocessor's values that are not null, and a name for error messages."""
    combined = json_object(folder / _COMBINED).get(section)
    if combined is None:
        values, where = json_object(folder / file), str(folder / file)
    else:
        values, where = combined, f"{folder / _COMBINED}: {section}"
        if not isinstance(values, dict):
            raise InputError("is not a JSON object", where=where)
    return {key: value for key, value in values.items() if value is not None}, where


def _fixed(vision: VisionConfig, pool: int) -> dict[str, Any]:
    """Return the settings that the graphs and the runtime have built in."""
    height, width = vision.image_size
    return {
        "image_mean": _HALF,
        "image_std": _HALF,
        "size": {"height": height, "width": width},
        "patch_size": vision.patch_size,
        "pooling_size": [pool, pool],
        "resample": _BILINEAR,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }


def _check_fixed(values: dict[str, Any], fixed: dict[str, Any], where: str) -> None:
    for key, allowed in fixed.items():
        if key in values and values[key] != allowed:
            raise _refused(key, values[key], where, f"{allowed!r}, or no such key")


def _refused(key: str, value: object, where: str, allowed: str) -> InputError:
    return InputError(f"{key} is {value!r}", where=where, allowed=allowed)
