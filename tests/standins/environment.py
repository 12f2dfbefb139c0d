"""The stand-ins of a child process, as the parent's test set them up in an environment variable."""

from __future__ import annotations

import functools
import json
import os
import types
from pathlib import Path
from typing import Any

from tests.standins.api import Call
from tests.standins.cuda import CudaStandin, make_cuda
from tests.standins.tensorrt import make_tensorrt, make_tensorrt_rtx

VARIABLE = "STTS_STANDINS"
CHILDREN = Path(__file__).parent / "children"


def settings() -> dict[str, Any]:
    """What `fixtures.install_*` put down: by package its version and knobs; `calls`, a file."""
    values: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))
    return values


@functools.cache
def cuda_module() -> types.ModuleType:
    """The child's `cuda.bindings.runtime`."""
    values = settings()["cuda"]
    if "compute_capability" in values["knobs"]:
        values["knobs"]["compute_capability"] = tuple(values["knobs"]["compute_capability"])
    return make_cuda(values["version"], **values["knobs"])


def cuda_package() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """`cuda`, `cuda.bindings`, `cuda.bindings.runtime`."""
    return packages(cuda_module())


def packages(
    runtime: types.ModuleType,
) -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """`cuda`, `cuda.bindings`, `cuda.bindings.runtime` around the last."""
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.__path__ = []
    bindings.__path__ = []
    package.bindings = bindings  # type: ignore[attr-defined]
    bindings.runtime = runtime  # type: ignore[attr-defined]
    bindings.__version__ = runtime.standin.api["version"]  # type: ignore[attr-defined]
    return package, bindings, runtime


def tensorrt_module(package: str) -> types.ModuleType:
    """The child's `tensorrt` or `tensorrt_rtx`."""
    values = settings()
    device: CudaStandin = cuda_module().standin
    wanted = values[package]
    if package == "tensorrt":
        module = make_tensorrt(wanted["version"], device, **wanted["knobs"])
    else:
        module = make_tensorrt_rtx(device, wanted["version"], **wanted["knobs"])
    module.standin.builder.record = functools.partial(_note, Path(values["calls"]))
    return module


def _note(file: Path, call: Call) -> None:
    with file.open("a") as stream:
        arguments = {name: repr(value) for name, value in call.arguments.items()}
        stream.write(json.dumps([call.name, arguments]) + "\n")
