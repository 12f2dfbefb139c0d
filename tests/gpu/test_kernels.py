"""The plugin's kernels on the device against the host planner, and under compute-sanitizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trt_plugins.clips import Clip, awkward_clips, clip_of_counts, random_clip
from tests.trt_plugins.device_program import check_clips

_WIDTHS = (2, 4, 6, 8, 16, 36, 48)
"""Bytes of a window: every width of access."""


def test_kernels_equal_the_host_planner(device_program: Path, tmp_path: Path):
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"seed {seed}")  # shown when it fails
    rng = np.random.default_rng(seed)
    clips = [random_clip(rng) for _ in range(300)]
    clips += [random_clip(rng, max_frames=512, max_windows=400) for _ in range(10)]
    clips += awkward_clips()
    check_clips(
        [device_program], tmp_path,
        [(clip, _WIDTHS[number % len(_WIDTHS)]) for number, clip in enumerate(clips)],
    )  # fmt: skip


def test_rows_of_the_real_model(device_program: Path, tmp_path: Path):
    """9 patches, 1152 wide, fp16: what the so400m tower gathers."""
    rng = np.random.default_rng(5)
    clips = [Clip(rng.random((64, 81), np.float32), kept, True) for kept in (1, 2592, 64 * 81)]
    check_clips([device_program], tmp_path, [(clip, 9 * 1152 * 2) for clip in clips])


def test_most_frames_and_windows(device_program: Path, tmp_path: Path):
    rng = np.random.default_rng(6)
    shapes = [(4096, 9), (3, 4096)]
    clips = [
        Clip(rng.random(shape, np.float32), shape[0] * shape[1] // 2, True) for shape in shapes
    ]
    check_clips([device_program], tmp_path, [(clip, 16) for clip in clips])


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(device_program: Path, tmp_path: Path, tool: str):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    rng = np.random.default_rng(9)
    clips = [random_clip(rng) for _ in range(6)]
    clips += [clip_of_counts([81, 0, 41, 40, 27, 27, 27], 81, refill) for refill in (True, False)]
    check_clips(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", device_program], tmp_path,
        [(clip, _WIDTHS[number % len(_WIDTHS)]) for number, clip in enumerate(clips)],
        poison=tool != "initcheck",  # which takes it for an initialisation
    )  # fmt: skip
