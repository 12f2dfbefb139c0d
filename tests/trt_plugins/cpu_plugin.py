"""The plugin on the CPU, for NumPy arrays: stands in for the engine `select_pack`.

Axes: T frames, W windows of a frame, K kept windows, B bins of W slots, D width.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.runtime.planner import Float32Array, Int32Array

GUARD_DAMAGED = -3
"""Status when something was written outside of the workspace or of an output."""

HIDDEN_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2}
UNTOUCHED = -7
"""In every value of the outputs, and of the guards around them, before a run."""

_GUARD = 64
"""Values on either side of an output: with any type, it begins 16 bytes aligned."""


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


class _Output:
    """Memory of one output between two guards, as TensorRT would give it to the plugin.

    Args:
        shape: the largest that the plugin may fill.
        dtype: of the values.
        shift: values by which it begins later than at an aligned address.
    """

    def __init__(self, shape: int | tuple[int, ...], dtype: Any = np.int32, shift: int = 0) -> None:
        count = shape if isinstance(shape, int) else math.prod(shape)
        self._memory = np.full(shift + count + 2 * _GUARD, UNTOUCHED).astype(dtype)
        self._begin = _GUARD + shift
        self.array = self._memory[self._begin : self._begin + count].reshape(shape)

    @property
    def address(self) -> int:
        """Of the first value."""
        return self.array.ctypes.data

    def is_guarded(self, rows: int) -> bool:
        """Whether nothing was written but its first `rows`."""
        end = self._begin + self.array[:rows].size
        outside = np.concatenate([self._memory[: self._begin], self._memory[end:]])
        return bool(np.all(outside == np.asarray(UNTOUCHED).astype(outside.dtype)))


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
        outputs = {
            "segment": _Output(slots), "slot_window": _Output(slots),
            "kept_slot": _Output(kept), "kept_window": _Output(kept), "bin_count": _Output(1),
        }  # fmt: skip
        output = _PlanOutput(*(one.address for one in outputs.values()))
        if threads is None:
            status = self._library.stts_plan_serial(ctypes.byref(given), ctypes.byref(output))
        else:
            status = self._library.stts_plan_block(
                ctypes.byref(given), ctypes.byref(output), threads, missing_bytes
            )
        return self._packed(status, outputs)

    def select_pack(
        self,
        scores: Float32Array,
        hidden: NDArray[Any],
        kept: int,
        *,
        refill: int = True,
        hidden_type: str | None = None,
        hidden_shift: int = 0,
        bins_shift: int = 0,
    ) -> Packed:
        """The whole plugin, driven as TensorRT does, from its creator to enqueue.

        Args:
            scores: (T, W).
            hidden: (T, W*G, D).
            kept: K.
            refill: the plugin's attribute.
            hidden_type: "bfloat16" for bits in a uint16 array; None takes the array's type.
            hidden_shift: values by which `hidden` begins later than at an aligned address.
            bins_shift: the same of `bins`.
        """
        frames, windows = scores.shape
        tokens, width = hidden.shape[1:]
        bound = max_bins(frames, windows, kept)
        source = _Output(hidden.shape, hidden.dtype, hidden_shift)
        source.array[:] = hidden
        outputs = {
            "bins": _Output((bound, tokens, width), hidden.dtype, bins_shift),
            "segment": _Output((bound, windows)),
            "kept_slot": _Output(kept), "kept_window": _Output(kept), "bin_count": _Output(1),
        }  # fmt: skip
        status = self._library.stts_emulated_select_pack(
            np.ascontiguousarray(scores).ctypes.data, source.address,
            HIDDEN_TYPES[hidden_type or str(hidden.dtype)],
            frames, windows, tokens // windows, width, kept, refill,
            *(one.address for one in outputs.values()),
        )  # fmt: skip
        return self._packed(status, outputs)

    def _packed(self, status: int, outputs: dict[str, _Output]) -> Packed:
        if status != 0:
            raise PluginError(status, self._library.stts_emulation_fault().decode())
        bins = int(outputs["bin_count"].array[0])
        arrays = {}
        for name, output in outputs.items():
            of_bins = name in ("segment", "slot_window", "bins")
            arrays[name] = output.array[:bins] if of_bins else output.array
            if not output.is_guarded(len(arrays[name])):
                raise PluginError(GUARD_DAMAGED, f"outside of {name}")
        del arrays["bin_count"]
        return Packed(**arrays)
