"""SttsSelectPack for the stand-in's engines: the plugin itself, on an emulated GPU."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.trt_plugins.cpu_build import build_cpu_library
from tests.trt_plugins.cpu_plugin import CpuPlugin


@functools.cache
def _plugin() -> CpuPlugin:
    with tempfile.TemporaryDirectory(prefix="stts-plugin-") as folder:
        return CpuPlugin(build_cpu_library(Path(folder)))  # loaded, it needs no file


def run(scores: Any, hidden: Any, kept_count: Any, *, refill: bool) -> tuple[Any, ...]:
    """Outputs of the plugin: bins, segment, kept_slot, kept_window, bin_count."""
    packed = _plugin().select_pack(scores, hidden, int(kept_count[0]), refill=refill)
    count = np.array(len(packed.segment), np.int32)
    return packed.bins, packed.segment, packed.kept_slot, packed.kept_window, count
