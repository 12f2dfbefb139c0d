"""The program of the GPU lane, compiled for the CPU: its files, its checks and its JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bench_plugin import kernel_times
from stts_export.errors import SttsError
from tests.trt_plugins.clips import Clip, awkward_clips, random_clip
from tests.trt_plugins.cpu_build import build_device_program
from tests.trt_plugins.device_program import check_clips


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_device_program(tmp_path_factory.mktemp("device"))


def test_clips_equal_the_host_planner(program: Path, tmp_path: Path):
    rng = np.random.default_rng(1)
    clips = [random_clip(rng, max_frames=12, max_windows=30) for _ in range(10)]
    clips += list(awkward_clips())[:20]
    check_clips([program], tmp_path, [(clip, 2 * (1 + n % 8)) for n, clip in enumerate(clips)])


def test_a_wrong_window_is_noticed(program: Path, tmp_path: Path):
    """The lane compares what the program wrote: one that is run on other scores fails."""
    scores = np.random.default_rng(2).random((6, 9), np.float32)
    wrong = tmp_path / "wrong.sh"
    wrong.write_text(
        "#!/bin/sh\n"
        f"python3 -c \"import sys; d=bytearray(open(sys.argv[1],'rb').read()); "
        'd[20+36:20+216]=bytes(180); open(sys.argv[1],\'wb\').write(d)" "$2"\n'
        f'exec {program} "$@"\n'
    )
    wrong.chmod(0o755)
    with pytest.raises(AssertionError, match="6 frames of 9 windows"):
        check_clips([wrong], tmp_path, [(Clip(scores, 27, True), 16)])


def test_times_are_json_and_errors_have_a_message(program: Path, tmp_path: Path):
    times = kernel_times(program, 2, 3)
    assert (times["frames"], times["windows"], times["kept"]) == (2, 81, 81)
    assert times["bytes"] == times["bins"] * 81 * times["window_bytes"]
    assert json.dumps(times)
    with pytest.raises(SttsError, match="sizes must be positive"):
        kernel_times(program, 2, 0)
    cut = tmp_path / "cut"
    cut.write_bytes(b"\1\0\0\0")
    done = subprocess.run(
        [program, "run", cut, tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ends early" in done.stderr
