"""The plugin on the CPU, for NumPy arrays: stands in for the engine `select_pack`.

Axes: T frames, W windows of a frame, K kept windows, B bins of W slots, D width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime.planner import Float32Array, Int32Array

HIDDEN_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
UNTOUCHED = -7
"""In every integer of the outputs before a run."""


class _PlanInput(ctypes.Structure):
    _fields_ = [
        ("scores", ctypes.c_void_p),
        ("frames", ctypes.c_int32),
        ("windows", ctypes.c_int32),
        ("kept", ctypes.c_int32),
        ("refill", ctypes.c_int32),
    ]


class _PlanOutput(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("segment", "slot_window", "kept_slot", "kept_window", "bin_count")
    ]


class PluginError(Exception):
    """A call returned a status other than 0."""

    def __init__(self, status: int, fault: str) -> None:
        self.status = status
        super().__init__(f"status {status} {fault}".rstrip())


@dataclass(frozen=True)
class Packed:
    """Outputs of the plugin, cut to B bins."""

    segment: Int32Array
    """(B, W): frame of a slot, -1 for free slots."""
    kept_slot: Int32Array
    """(K,): index into the B*W slots of each kept window."""
    kept_window: Int32Array
    """(K,): index into the T*W windows."""
    slot_window: Int32Array | None = None
    """(B, W): window of a slot, -1 for free slots; of a plan alone."""
    bins: NDArray[Any] | None = None
    """(B, W*G, D), of the whole plugin."""


def max_bins(frames: int, windows: int, kept: int) -> int:
    """The bound on B that the plugin declares."""
    return min(frames, 2 * kept // windows + 1)


class CpuPlugin:
    """Calls into a library made by `build_cpu_library`."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.stts_emulation_fault.restype = ctypes.c_char_p
        self._library.stts_emulation_launches.restype = ctypes.c_int64
        self._library.stts_emulated_select_pack.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, *[ctypes.c_int64] * 5,
            ctypes.c_int, *[ctypes.c_void_p] * 5,
        ]  # fmt: skip

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.stts_emulation_launches())

    def schedule(self, seed: int) -> None:
        """Run the emulated threads in another order; 0 is by index."""
        self._library.stts_emulation_schedule(ctypes.c_uint32(seed))

    def fail_launch(self, others: int, error: int) -> None:
        """Make the launch after `others` more ones fail with a cudaError_t."""
        self._library.stts_emulation_fail_launch(others, error)

    def plan(
        self,
        scores: Float32Array,
        kept: int,
        *,
        refill: bool = True,
        threads: int | None = None,
        missing_bytes: int = 0,
    ) -> Packed:
        """Select and pack without moving tokens.

        Args:
            scores: (T, W).
            kept: K.
            refill: the plugin's attribute.
            threads: of the emulated block; None runs the algorithm serially.
            missing_bytes: how much smaller the workspace is than it must be.
        """
        frames, windows = scores.shape
        slots = (max_bins(frames, windows, kept), windows)
        given = _PlanInput(scores.ctypes.data, frames, windows, kept, refill)
        segment, slot_window = _untouched(slots), _untouched(slots)
        kept_slot, kept_window, bin_count = _untouched(kept), _untouched(kept), _untouched(1)
        results = (segment, slot_window, kept_slot, kept_window, bin_count)
        output = _PlanOutput(*(array.ctypes.data for array in results))
        if threads is None:
            status = self._library.stts_plan_serial(ctypes.byref(given), ctypes.byref(output))
        else:
            status = self._library.stts_plan_block(
                ctypes.byref(given), ctypes.byref(output), threads, missing_bytes
            )
        self._check(status)
        b = int(bin_count[0])
        return Packed(segment[:b], kept_slot, kept_window, slot_window=slot_window[:b])

    def select_pack(
        self,
        scores: Float32Array,
        hidden: NDArray[Any],
        kept: int,
        *,
        refill: int = True,
        hidden_type: str | None = None,
    ) -> Packed:
        """The whole plugin, driven as TensorRT does, from its creator to enqueue.

        Args:
            scores: (T, W).
            hidden: (T, W*G, D).
            kept: K.
            refill: the plugin's attribute.
            hidden_type: "bfloat16" for bits in a uint16 array; None takes the array's type.
        """
        frames, windows = scores.shape
        tokens, width = hidden.shape[1:]
        bound = max_bins(frames, windows, kept)
        bins = np.full((bound, tokens, width), UNTOUCHED).astype(hidden.dtype)
        segment, bin_count = _untouched((bound, windows)), _untouched(1)
        kept_slot, kept_window = _untouched(kept), _untouched(kept)
        status = self._library.stts_emulated_select_pack(
            np.ascontiguousarray(scores).ctypes.data, np.ascontiguousarray(hidden).ctypes.data,
            HIDDEN_TYPES[hidden_type or str(hidden.dtype)],
            frames, windows, tokens // windows, width, kept, refill,
            bins.ctypes.data, segment.ctypes.data, kept_slot.ctypes.data,
            kept_window.ctypes.data, bin_count.ctypes.data,
        )  # fmt: skip
        self._check(status)
        b = int(bin_count[0])
        return Packed(segment[:b], kept_slot, kept_window, bins=bins[:b])

    def _check(self, status: int) -> None:
        if status != 0:
            raise PluginError(status, self._library.stts_emulation_fault().decode())


def _untouched(shape: int | tuple[int, ...]) -> Int32Array:
    return np.full(shape, UNTOUCHED, np.int32)
