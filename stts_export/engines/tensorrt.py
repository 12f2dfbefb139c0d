"""TensorRT on the GPU that the engines will run on: Jetson and datacentre, versions 10.3 to 11.

Windows are selected and packed on the device by our plugin. TensorRT older than 10.15 has neither
attention nor an updated cache, and builds the decomposed graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stts_export.engines import cuda
from stts_export.engines.engine_build import Target
from stts_export.engines.library import INSTALL, MODULES, TENSORRT, import_library
from stts_export.engines.plugin import find_plugin
from stts_export.errors import InputError, MissingDependencyError
from stts_export.tensors import (
    CONNECTOR,
    DECODER,
    DECOMPOSED,
    GATHER_WINDOWS,
    SELECT_PACK,
    VISION_LOWER,
    VISION_UPPER,
    variant,
)

OLDEST, NEWEST_MAJOR = (10, 3), 11
CANONICAL = (10, 15)
"""The first version with the operators of the canonical graphs."""
GRAPHS = (VISION_LOWER, VISION_UPPER, CONNECTOR, SELECT_PACK, GATHER_WINDOWS, DECODER)
"""In building order."""


def graphs(version: str) -> tuple[str, ...]:
    """Names of the graphs that a version of TensorRT builds."""
    if _numbers(version) >= CANONICAL:
        return GRAPHS
    plain = (SELECT_PACK, GATHER_WINDOWS)
    return tuple(name if name in plain else variant(name, DECOMPOSED) for name in GRAPHS)


def targets(
    requested: Sequence[str],
    *,
    prunes: bool,
    plugin: Path | None = None,
    bundle: Path | None = None,
) -> tuple[Target, ...]:
    """Return what to build for: this machine's GPU.

    Args:
        requested: at most this machine's own, such as sm87.
        prunes: whether the model has a scorer, and so needs the plugin.
        plugin: see `plugin.find_plugin`.
        bundle: see `plugin.find_plugin`.

    Raises:
        InputError: another target, or a plugin that does not fit.
        MissingDependencyError: TensorRT, its version, cuda-python, a driver, a GPU or the plugin
            is missing.
    """
    version = str(import_library(TENSORRT).__version__)
    if _numbers(version) < OLDEST or _numbers(version)[0] > NEWEST_MAJOR:
        raise MissingDependencyError(
            f"version {version}",
            where=TENSORRT,
            allowed=f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST_MAJOR}.x",
            fix=INSTALL[TENSORRT],
        )
    major, minor = cuda.compute_capability()
    own = f"sm{major}{minor}"
    for name in requested:
        if name != own:
            raise InputError(
                f"target {name!r}, but this machine's GPU is {own}",
                where=TENSORRT,
                allowed=f"{own}: TensorRT builds on the GPU that the engines will run on",
                fix="leave --target out and build on the device, from this checkpoint's bundle; "
                "for targets of another back end run another build, with that back end alone",
            )
    library = find_plugin(plugin, bundle) if prunes else None
    return (Target(TENSORRT, MODULES[TENSORRT], version, own, graphs(version), plugin=library),)


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
