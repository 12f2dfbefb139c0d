"""Clips through `trt_plugins/device`: the kernels on a device, without TensorRT."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tests.trt_plugins.clips import Clip, differences
from tests.trt_plugins.cpu_plugin import Packed

_TIMEOUT = 300
"""Seconds: a kernel that hangs must not hang the tests."""


def check_clips(
    command: Sequence[str | Path],
    folder: Path,
    clips: Sequence[tuple[Clip, int]],
    *,
    poison: bool = True,
) -> None:
    """Run the program on clips with random hidden tokens, and compare with the host planner.

    Args:
        command: the program, and what it runs under.
        folder: for its files.
        clips: each with the bytes of a window, an even number.
        poison: fill device memory first, so that what is not written shows in the results.
    """
    rng = np.random.default_rng(len(clips))
    hidden = [
        rng.integers(0, 256, (*clip.scores.shape, width), dtype=np.uint8) for clip, width in clips
    ]
    with (folder / "cases").open("wb") as file:
        for (clip, width), rows in zip(clips, hidden, strict=True):
            file.write(struct.pack("<5i", *clip.scores.shape, width, clip.kept, clip.refill))
            file.write(clip.scores.tobytes() + rows.tobytes())
    done = subprocess.run(
        [*map(str, command), "run", str(folder / "cases"), str(folder / "results")],
        capture_output=True, text=True, check=False, timeout=_TIMEOUT,
        env=os.environ | ({} if poison else {"STTS_NO_POISON": "1"}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "results").open("rb") as file:
        for (clip, width), rows in zip(clips, hidden, strict=True):
            assert not differences(_packed(file, clip, width), clip, rows), f"{clip}, {width} bytes"
        assert not file.read()


def _packed(file: IO[bytes], clip: Clip, width: int) -> Packed:
    windows = clip.scores.shape[1]
    bins = int(_read(file, np.int32, 1)[0])
    rows = _read(file, np.uint8, bins, windows, width)
    segment = _read(file, np.int32, bins, windows)
    kept_slot, kept_window = (_read(file, np.int32, clip.kept) for _ in range(2))
    return Packed(segment, kept_slot, kept_window, bins=rows)


def _read(file: IO[bytes], dtype: Any, *shape: int) -> NDArray[Any]:
    count = int(np.prod(shape))
    data = file.read(count * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype, count).reshape(shape)
