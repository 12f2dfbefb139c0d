"""CPU time of calls, their summary, and the machine they ran on.

CPU time, not wall time: on a shared machine the clock also counts what others do.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cpu_time(call: Callable[[], T]) -> tuple[T, float]:
    """Run `call`; returns its result and the seconds that all threads of this process spent."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and range, with the samples in the order they were taken."""
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": list(samples),
    }


def machine() -> dict[str, Any]:
    """Processor and versions: without them a time means nothing."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "onnxruntime", "stts-export")},
    }


def _cpu_model() -> str:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:  # cloud machines hide the product's name
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name
