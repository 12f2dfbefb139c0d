"""What a checkpoint says about preparing video and images: taken over or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stts_export.config import VisionConfig
from stts_export.errors import InputError
from stts_export.preprocessing import (
    ImagePreprocessing,
    VideoPreprocessing,
    image_preprocessing,
    video_preprocessing,
)

VISION = VisionConfig((42, 84), 7, 32, 64, 2, 16, 6, (5,))


def _read(folder: Path, values: dict[str, Any]) -> VideoPreprocessing:
    (folder / "video_preprocessor_config.json").write_text(json.dumps(values))
    return video_preprocessing(folder, VISION)


def test_absent_file_and_absent_or_null_keys(tmp_path: Path):
    assert video_preprocessing(tmp_path, VISION) == VideoPreprocessing(None, 2.0)
    assert _read(tmp_path, {}) == VideoPreprocessing(None, 2.0)
    nothing = dict.fromkeys(["num_frames", "max_fps", "size", "image_mean", "pooling_size"])
    assert _read(tmp_path, nothing) == VideoPreprocessing(None, 2.0)


def test_settings_of_a_released_model(tmp_path: Path):
    values = {
        "num_frames": 384,
        "max_fps": 4,
        "sampling_fps": 2,
        "do_sample_frames": True,
        "frame_sample_mode": "uniform_last_frame",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": 42, "width": 84},
        "patch_size": 7,
        "pooling_size": [3, 3],
    }
    assert _read(tmp_path, values) == VideoPreprocessing(384, 4.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_frames", 0),
        ("num_frames", -3),
        ("num_frames", 8.0),
        ("num_frames", "8"),
        ("num_frames", True),
        ("max_fps", 0),
        ("max_fps", -1.0),
        ("max_fps", "2"),
        ("max_fps", True),
        ("max_fps", float("inf")),
        ("max_fps", float("nan")),
        ("frame_sample_mode", "fps"),
        ("image_mean", [0.48, 0.46, 0.41]),
        ("image_std", 0.5),
        ("size", {"height": 378, "width": 378}),
        ("size", 42),
        ("patch_size", 14),
        ("pooling_size", [2, 2]),
    ],
)
def test_other_values_name_key_and_file(tmp_path: Path, key: str, value: Any):
    with pytest.raises(InputError, match=rf"video_preprocessor_config\.json: {key} is") as error:
        _read(tmp_path, {key: value})
    assert "allowed" in str(error.value)


def _read_image(folder: Path, values: dict[str, Any]) -> ImagePreprocessing:
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    return image_preprocessing(folder, VISION)


def test_images_absent_file_and_absent_or_null_keys(tmp_path: Path):
    assert image_preprocessing(tmp_path, VISION) == ImagePreprocessing(8, (4, 4))
    assert _read_image(tmp_path, {}) == ImagePreprocessing(8, (4, 4))
    nothing = dict.fromkeys(["max_crops", "overlap_margins", "size", "pooling_size"])
    assert _read_image(tmp_path, nothing) == ImagePreprocessing(8, (4, 4))


def test_image_settings_of_a_released_model(tmp_path: Path):
    values = {
        "image_processor_type": "Molmo2ImageProcessor",
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "max_crops": 24,
        "overlap_margins": [1, 0],
        "patch_size": 7,
        "pooling_size": [2, 2],
        "resample": 2,
        "size": {"height": 42, "width": 84},
    }
    assert _read_image(tmp_path, values) == ImagePreprocessing(24, (1, 0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_crops", 0),
        ("max_crops", True),
        ("max_crops", 8.0),
        ("overlap_margins", [4]),
        ("overlap_margins", [4, -1]),
        ("overlap_margins", [4, True]),
        ("overlap_margins", 4),
        ("pooling_size", [3, 3]),
        ("resample", 3),
        ("do_convert_rgb", False),
        ("do_normalize", False),
        ("rescale_factor", 1.0),
        ("image_mean", [0.48, 0.46, 0.41]),
        ("patch_size", 14),
    ],
)
def test_other_image_values_name_key_and_file(tmp_path: Path, key: str, value: Any):
    with pytest.raises(InputError, match=rf"preprocessor_config\.json: {key} is") as error:
        _read_image(tmp_path, {key: value})
    assert "allowed" in str(error.value)


def test_settings_within_the_processors_file_come_first(tmp_path: Path):
    """transformers 5 writes one file."""
    both = {
        "use_frame_special_tokens": True,
        "image_processor": {"max_crops": 3},
        "video_processor": {"num_frames": 7},
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    assert _read(tmp_path, {"num_frames": 9}) == VideoPreprocessing(7, 2.0)
    assert _read_image(tmp_path, {"max_crops": 9}) == ImagePreprocessing(3, (4, 4))
    both["video_processor"] = {"max_fps": "x"}
    both["image_processor"] = [1]
    (tmp_path / "processor_config.json").write_text(json.dumps(both))
    with pytest.raises(
        InputError, match=r"processor_config\.json: video_processor: max_fps is 'x'"
    ):
        video_preprocessing(tmp_path, VISION)
    with pytest.raises(InputError, match="image_processor: is not a JSON object"):
        image_preprocessing(tmp_path, VISION)
