"""Puts the stand-ins where `import tensorrt` and `from cuda.bindings import runtime` look.

In a test: `cuda = install_cuda(monkeypatch)`, `trt = install_tensorrt(monkeypatch, "10.3", cuda)`.
Child processes find them as well. The fixtures are for tests that need no other knobs:

    from tests.standins.fixtures import cuda_standin, tensorrt_standin  # noqa: F401
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stts_export import __version__
from tests.standins.cuda import CudaStandin, make_cuda
from tests.standins.environment import CHILDREN, VARIABLE, packages, settings
from tests.standins.state import State
from tests.standins.tensorrt import make_tensorrt, make_tensorrt_rtx

ROOT = Path(__file__).parents[2]


class _Folder:
    """Exists until nothing refers to it."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="stts-standins-"))

    def __del__(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


_folder: Any = None
"""Of the calls that child processes make during a test."""


def install_cuda(
    monkeypatch: pytest.MonkeyPatch, version: str = "13.4", **knobs: Any
) -> CudaStandin:
    """Put a CUDA stand-in into `sys.modules` and before child processes; knobs of `CudaStandin`."""
    runtime = make_cuda(version, **knobs)
    _forget(monkeypatch, "cuda")
    for module in packages(runtime):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    _for_children(monkeypatch, "cuda", version, knobs)
    standin: CudaStandin = runtime.standin
    return standin


def install_tensorrt(
    monkeypatch: pytest.MonkeyPatch, version: str, cuda: CudaStandin, **knobs: Any
) -> types.ModuleType:
    """Put a `tensorrt` into `sys.modules` and before child processes; knobs of `State`.

    Args:
        monkeypatch: pytest's.
        version: "10.3", "10.16" or "11.4".
        cuda: from `install_cuda`.
        knobs: fields of `State` (in a child as they are now).
    """
    module = make_tensorrt(version, cuda, **knobs)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    _for_children(monkeypatch, "tensorrt", version, knobs)
    return module


def install_tensorrt_rtx(
    monkeypatch: pytest.MonkeyPatch, cuda: CudaStandin, version: str = "1.7", **knobs: Any
) -> types.ModuleType:
    """Put a `tensorrt_rtx` into `sys.modules` and before child processes; knobs of `State`."""
    module = make_tensorrt_rtx(cuda, version, **knobs)
    _forget(monkeypatch, "tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    _for_children(monkeypatch, "tensorrt_rtx", version, knobs)
    return module


def uninstall(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make imports of these packages fail, as where they are not installed."""
    for name in names:
        _forget(monkeypatch, name)
        monkeypatch.setitem(sys.modules, name, None)


def child_calls() -> list[tuple[str, dict[str, str]]]:
    """What child processes called of TensorRT: name, and arguments as text."""
    file = Path(settings()["calls"])
    if not file.exists():
        return []
    return [(name, arguments) for name, arguments in map(json.loads, file.read_text().splitlines())]


def plugin_library(folder: Path, version: str = __version__, *, exports: bool = True) -> Path:
    """Compile a library that looks like the plugin: its version, and the functions it exports.

    Args:
        folder: where to put `libstts_plugins.so`.
        version: what it says of itself.
        exports: False leaves out what TensorRT looks for.
    """
    source = folder / "plugin.c"
    text = f'const char* sttsPluginsVersion(void) {{ return "{version}"; }}\n'
    if exports:
        text += "void* getCreators(int* n) { *n = 0; return 0; }\n"
        text += "void setLoggerFinder(void* f) { (void)f; }\n"
    source.write_text(text)
    library = folder / "libstts_plugins.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def _forget(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


def _for_children(
    monkeypatch: pytest.MonkeyPatch, package: str, version: str, knobs: dict[str, Any]
) -> None:
    values = settings()
    if "calls" not in values:
        monkeypatch.setattr(sys.modules[__name__], "_folder", _Folder())
        values["calls"] = str(_folder.path / "calls.jsonl")
    values[package] = {"version": version, "knobs": knobs}
    monkeypatch.setenv(VARIABLE, json.dumps(values))
    paths = [str(CHILDREN / package), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    if str(ROOT) not in paths:
        paths.append(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def cuda_standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaStandin]:
    """A device of SM 8.7 with 1 GiB; the test fails where memory was misused."""
    standin = install_cuda(monkeypatch)
    yield standin
    standin.assert_no_violation()


@pytest.fixture
def tensorrt_standin(monkeypatch: pytest.MonkeyPatch, cuda_standin: CudaStandin) -> State:
    """TensorRT 10.3 on that device."""
    state: State = install_tensorrt(monkeypatch, "10.3", cuda_standin).standin
    return state
