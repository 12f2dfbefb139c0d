"""Stand-in GPUs with a TensorRT, and bundles with engines for them."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_bundle
from tests.standins.cuda import CudaStandin
from tests.standins.fixtures import (
    install_cuda,
    install_tensorrt,
    install_tensorrt_rtx,
    plugin_library,
)

RTX = "rtx"
VERSIONS = ("10.3", "11.4", RTX)
"""Decomposed graphs and two caches; a cache updated in place; no plugin."""


@dataclasses.dataclass
class Machine:
    """A stand-in GPU with a TensorRT."""

    cuda: CudaStandin
    trt: types.ModuleType
    backend: str

    def open(self, bundle: Path, **settings: Any) -> Session:
        return Session.open(bundle, backend=self.backend, **settings)


def machine_of(patch: pytest.MonkeyPatch, version: str, **knobs: Any) -> Machine:
    if version == RTX:
        cuda = install_cuda(patch, **{"compute_capability": (8, 9), **knobs})
        return Machine(cuda, install_tensorrt_rtx(patch, cuda), "tensorrt-rtx")
    cuda = install_cuda(patch, **knobs)
    return Machine(cuda, install_tensorrt(patch, version, cuda), "tensorrt")


def build_engines(source: Path, folder: Path, version: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        machine = machine_of(patch, version)
        plugin = None
        if version != RTX:
            (folder.parent / "plugin").mkdir(exist_ok=True)
            plugin = plugin_library(folder.parent / "plugin")
        targets = ("sm89",) if version == RTX else ()
        spec = BuildSpec(backends=(machine.backend,), targets=targets, plugin=plugin)
        return bundle_from_bundle(source, folder, spec)
