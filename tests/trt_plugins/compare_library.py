"""Compares a CPU build of the plugin with the host planner, for the mutation test.

`python -m tests.trt_plugins.compare_library LIBRARY` prints the first difference and exits with 1
if there is one. A process of its own: a changed plugin may do anything.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.trt_plugins.clips import Clip, awkward_clips, differences, random_clip
from tests.trt_plugins.cpu_plugin import CpuPlugin, PluginError

_SHIFTS = ((0, 0), (1, 0), (0, 1), (2, 4))
"""Values by which hidden and bins begin later than at an aligned address."""


def compare(plugin: CpuPlugin) -> Iterator[str]:
    """What is wrong, clip by clip."""
    rng = np.random.default_rng(5)
    random = [random_clip(rng, 20, 40) for _ in range(60)]
    for clip in [*awkward_clips(), *random]:
        yield from _wrong(plugin, clip)
    for number, clip in enumerate(random[:20]):
        plugin.schedule(number)
        for threads in (32, 256):
            yield from _wrong(plugin, clip, threads)
        for hidden_shift, bins_shift in _SHIFTS:
            yield from _wrong_bins(plugin, clip, rng, hidden_shift, bins_shift)


def _wrong(plugin: CpuPlugin, clip: Clip, threads: int | None = None) -> Iterator[str]:
    packed = plugin.plan(clip.scores, clip.kept, refill=clip.refill, threads=threads)
    for name in differences(packed, clip):
        yield f"{name} of {clip}, {threads or 'serial'}"


def _wrong_bins(
    plugin: CpuPlugin, clip: Clip, rng: np.random.Generator, hidden_shift: int, bins_shift: int
) -> Iterator[str]:
    frames, windows = clip.scores.shape
    hidden = rng.normal(size=(frames, windows * 2, 12)).astype(np.float16)
    packed = plugin.select_pack(
        clip.scores, hidden, clip.kept, refill=clip.refill,
        hidden_shift=hidden_shift, bins_shift=bins_shift,
    )  # fmt: skip
    for name in differences(packed, clip, hidden):
        yield f"{name} of {clip}, whole plugin, shifted by {hidden_shift} and {bins_shift}"


def main() -> None:
    """Compare until the first difference."""
    try:
        difference = next(compare(CpuPlugin(Path(sys.argv[1]))), None)
    except PluginError as error:
        difference = str(error)
    if difference is not None:
        print(difference)
        sys.exit(1)


if __name__ == "__main__":
    main()
