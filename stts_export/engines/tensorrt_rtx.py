"""TensorRT for RTX: engines for RTX GPUs, built on any machine, with or without a GPU.

Plugins abort its parser, so windows are selected and packed on the host. Every profile of an
engine has weights of its own, whatever `extra_memory_target` says; and kernels are compiled for the
shapes at hand, where the engine runs. So there is one profile.
"""

from __future__ import annotations

from collections.abc import Sequence

from stts_export.engines import cuda
from stts_export.engines.engine_build import Target
from stts_export.engines.library import MODULES, TENSORRT_RTX, import_library
from stts_export.errors import InputError, MissingDependencyError
from stts_export.tensors import CONNECTOR, DECODER, GATHER_WINDOWS, VISION_LOWER, VISION_UPPER

TARGETS = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""Streaming multiprocessor versions that it builds for. Of sm75 it says so too, and then has no
fp32 matrix product, which the scorer needs at every precision."""
GRAPHS = (VISION_LOWER, VISION_UPPER, CONNECTOR, GATHER_WINDOWS, DECODER)
"""In building order."""


def targets(requested: Sequence[str]) -> tuple[Target, ...]:
    """Return what to build for.

    Args:
        requested: such as sm89; the GPU of this machine when empty.

    Raises:
        InputError: a target that this library does not build for, or none on a machine without a
            GPU.
        MissingDependencyError: the package is not installed.
    """
    for name in requested or ():
        _check(name)
    version = str(import_library(TENSORRT_RTX).__version__)
    return tuple(
        Target(
            TENSORRT_RTX,
            MODULES[TENSORRT_RTX],
            version,
            name,
            GRAPHS,
            (name.upper(),),
            one_profile=True,
        )
        for name in requested or (_own(),)
    )


def _check(name: str) -> None:
    if name not in TARGETS:
        raise InputError(
            f"target {name!r}",
            where=TENSORRT_RTX,
            allowed=", ".join(TARGETS),
            fix="for other GPUs run another build, on the device, with --backend tensorrt",
        )


def _own() -> str:
    try:
        major, minor = cuda.compute_capability()
    except MissingDependencyError as error:
        raise InputError(
            f"no target is given, and this machine has no usable GPU ({error.message})",
            where=TENSORRT_RTX,
            allowed=", ".join(TARGETS),
            fix="pass --target, such as --target sm89,sm120",
        ) from None
    name = f"sm{major}{minor}"
    _check(name)
    return name
