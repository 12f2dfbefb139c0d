"""A stand-in for `tensorrt` and `tensorrt_rtx`: their names, engines through ONNX Runtime.

`make_tensorrt("10.3")` makes a module to put into `sys.modules["tensorrt"]`. Its classes are the
shells of `api`, which refuse what that version's bindings do not have; behind them are
`building` and `running`. Its `standin` (a `State`) belongs to tests: calls, log, knobs.
"""

from __future__ import annotations

import types
from typing import Any

from tests.standins import building, running
from tests.standins.api import DimsValue, ModuleBuilder, load_api
from tests.standins.cuda import CudaStandin
from tests.standins.plan import volume
from tests.standins.plugins import PluginRegistry
from tests.standins.state import Logger, State

VERSIONS = ("10.3", "10.16", "11.4")


def make_host_memory(int8: Any) -> type[bytearray]:
    """The class IHostMemory: a buffer with `nbytes` and `dtype`, nothing else."""

    class IHostMemory(bytearray):
        __slots__ = ()

        @property
        def nbytes(self) -> int:
            return bytearray.__len__(self)

        @property
        def dtype(self) -> Any:
            return int8

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("__") or name in ("nbytes", "dtype"):
                return super().__getattribute__(name)
            raise AttributeError(f"'IHostMemory' object has no attribute {name!r}")

        def __len__(self) -> int:
            raise TypeError("object of type 'IHostMemory' has no len()")

        def __getitem__(self, index: Any) -> Any:
            raise TypeError("'IHostMemory' object is not subscriptable")

        def __iter__(self) -> Any:
            raise TypeError("'IHostMemory' object is not iterable")

        def __bool__(self) -> bool:
            return True

        def __repr__(self) -> str:
            return f"<IHostMemory of {self.nbytes} bytes>"

    return IHostMemory


def make_tensorrt(version: str, cuda: CudaStandin | None = None, **knobs: Any) -> types.ModuleType:
    """A module for `sys.modules["tensorrt"]`.

    Args:
        version: one of `VERSIONS`.
        cuda: the device; one of its own when None.
        knobs: fields of `State`.
    """
    return _make("tensorrt", version, cuda or CudaStandin(), knobs)


def make_tensorrt_rtx(
    cuda: CudaStandin | None = None, version: str = "1.7", **knobs: Any
) -> types.ModuleType:
    """A module for `sys.modules["tensorrt_rtx"]`; arguments as of `make_tensorrt`."""
    device = cuda or CudaStandin(compute_capability=(8, 9))
    return _make("tensorrt_rtx", version, device, knobs)


def _make(package: str, version: str, cuda: CudaStandin, knobs: dict[str, Any]) -> types.ModuleType:
    api = load_api(f"{package}-{version}")
    state = State(package, api["version"], cuda, **knobs)
    registry = PluginRegistry(state)
    implementations: dict[str, type] = {
        kind.API: kind for kind in (Logger, DimsValue, PluginRegistry)
    }
    for part in (*building.IMPLEMENTATIONS, *running.IMPLEMENTATIONS):
        implementations.setdefault(part.API, state.bind(part))
    builder = ModuleBuilder(api, package, implementations, state.calls.append)
    module = builder.build()
    state.module, state.builder, state.registry = module, builder, registry
    host_memory = make_host_memory(module.DataType.INT8)
    builder.types.kinds["IHostMemory"] = host_memory
    module.IHostMemory = host_memory  # type: ignore[attr-defined]
    builder.function("get_plugin_registry", lambda: registry)
    builder.function("get_builder_plugin_registry", lambda arg0: registry)
    builder.function("get_nv_onnx_parser_version", lambda: state.numbers[0] * 100)
    builder.function("init_libnvinfer_plugins", lambda logger, namespace: True)
    builder.function("volume", volume)
    builder.function("nptype", lambda trt_type: running.nptype(trt_type))
    module.DataType.itemsize = property(lambda this: running.itemsize(this))
    module.standin = state  # type: ignore[attr-defined]
    module.calls = state.calls  # type: ignore[attr-defined]
    return module
