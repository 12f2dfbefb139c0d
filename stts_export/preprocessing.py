"""How a checkpoint samples and prepares video, from its `video_preprocessor_config.json`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stts_export.config import VisionConfig
from stts_export.errors import InputError
from stts_export.files import json_object

DEFAULT_MAX_FPS = 2.0

_FILE = "video_preprocessor_config.json"
_HALF = [0.5, 0.5, 0.5]  # the graphs normalise pixels to [-1, 1]


@dataclass(frozen=True)
class VideoPreprocessing:
    """What the checkpoint says about sampling."""

    num_frames: int | None = None
    """Longest clip in frames; None when the checkpoint does not say."""
    max_fps: float = DEFAULT_MAX_FPS


def video_preprocessing(folder: Path, vision: VisionConfig) -> VideoPreprocessing:
    """Read a checkpoint's settings; absent or null ones have the model family's values.

    Args:
        folder: the checkpoint folder.
        vision: the tower that the frames are for.

    Raises:
        InputError: a value has the wrong type, or asks for what the runtime does not do.
    """
    path = folder / _FILE
    values = {key: value for key, value in json_object(path).items() if value is not None}
    num_frames, max_fps = values.get("num_frames"), values.get("max_fps", DEFAULT_MAX_FPS)
    if num_frames is not None and (type(num_frames) is not int or num_frames < 1):
        raise _refused("num_frames", num_frames, path, "an integer, 1 or more")
    if type(max_fps) not in (int, float) or not 0 < max_fps < math.inf:
        raise _refused("max_fps", max_fps, path, "a positive number")
    _check_fixed(values, vision, path)
    return VideoPreprocessing(num_frames, float(max_fps))


def _check_fixed(values: dict[str, Any], vision: VisionConfig, path: Path) -> None:
    """Refuse settings that differ from what the graphs and the runtime do."""
    height, width = vision.image_size
    fixed: dict[str, Any] = {
        "frame_sample_mode": "uniform_last_frame",
        "image_mean": _HALF,
        "image_std": _HALF,
        "size": {"height": height, "width": width},
        "patch_size": vision.patch_size,
        "pooling_size": [vision.pool, vision.pool],
    }
    for key, allowed in fixed.items():
        if key in values and values[key] != allowed:
            raise _refused(key, values[key], path, f"{allowed!r}, or no such key")


def _refused(key: str, value: object, path: Path, allowed: str) -> InputError:
    return InputError(f"{key} is {value!r}", where=str(path), allowed=allowed)
