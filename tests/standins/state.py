"""What the parts of one stand-in share, and what tests may look at and turn."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from tests.standins import onnx_model
from tests.standins.api import Call, WeakShell
from tests.standins.cuda import CudaStandin


@dataclass
class State:
    """What a test may look at and turn.

    A knob may be changed at any time.
    """

    package: str
    version: str
    cuda: CudaStandin
    calls: list[Call] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    """(severity, text) of everything that was logged, whatever the logger made of it."""
    build_bytes: int = 1 << 20
    """What a build needs: of the workspace limit, and of free device memory."""
    context_bytes: int = 1 << 16
    """Activations of an execution context."""
    fail_build: str | None = None
    """Makes builds fail with this error."""
    fail_execute: str | None = None
    """Makes execute_async_v3 and set_optimization_profile_async fail with this error."""
    build_messages: list[tuple[str, str]] = field(default_factory=list)
    """Logged by every build: (severity, text)."""
    executions: list[str] = field(default_factory=list)
    """Names of the engines that ran, in order."""
    module: Any = None
    builder: Any = None
    """The `ModuleBuilder`."""
    registry: Any = None
    loggers: list[Any] = field(default_factory=list)
    _bound: dict[type, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.version.split(".")[:3])

    @property
    def is_rtx(self) -> bool:
        return self.package == "tensorrt_rtx"

    def called(self, name: str) -> list[dict[str, Any]]:
        """Arguments of every call of `Class.method` (`Builder` for a constructor)."""
        return [call.arguments for call in self.calls if call.name == name]

    def error(self, text: str) -> None:
        """Log an error through the logger that was used last, as TensorRT has one a process."""
        self.log("ERROR", text)

    def log(self, severity: str, text: str) -> None:
        self.messages.append((severity, text))
        if not self.loggers:
            return
        logger = self.loggers[-1]
        kind = getattr(self.module.ILogger.Severity, severity)
        if isinstance(logger, Logger):
            logger.log(kind, text)
            return
        if type(logger).log is self.module.ILogger.log:
            print(f'Tried to call pure virtual function "ILogger::log": {text}', file=sys.stderr)
            return
        logger.log(kind, text)

    def use_logger(self, logger: Any) -> None:
        """Make a logger the one that errors go to."""
        if logger is None:
            raise TypeError("__init__(): logger is None")
        self.loggers.append(logger)

    def need_device(self, function: str) -> None:
        """Fail as the bindings do where a constructor of the library returns nothing."""
        if not self.cuda.driver or not self.cuda.devices:
            code = 100 if self.cuda.driver else 35
            self.error(
                f"{function}: Error Code 6: API Usage Error (CUDA initialization failure with"
                f" error: {code})"
            )
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def member(self, enum: str, name: str) -> Any:
        """Member of one of the module's enums."""
        return getattr(getattr(self.module, enum), name)

    def host_memory(self, data: bytes) -> Any:
        """An IHostMemory."""
        return self.module.IHostMemory(data)

    def operators(self) -> onnx_model.Operators:
        """What the version's parser takes."""
        return onnx_model.operators_of(self.numbers, is_rtx=self.is_rtx)

    def bind(self, kind: type[Part]) -> Any:
        """Subclass of an implementation that knows this state."""
        if kind not in self._bound:
            self._bound[kind] = type(kind.__name__, (kind,), {"state": self})
        return self._bound[kind]


class Part(WeakShell):
    """Base of the implementations; `State.bind` makes a subclass that knows its module."""

    API: str
    state: State

    def make(self, kind: type[Part], *args: Any, **kwargs: Any) -> Any:
        """Another part of the same module."""
        return self.state.bind(kind)(*args, **kwargs)


class Logger:
    """The bindings' own logger: to standard output."""

    API = "Logger"

    def __init__(self, min_severity: Any = None) -> None:
        self.min_severity = min_severity
        self.printed: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        limit = 2 if self.min_severity is None else int(self.min_severity)
        if int(severity) <= limit:
            self.printed.append(msg)
            print(f"[TRT] [{severity.name[0]}] {msg}")
