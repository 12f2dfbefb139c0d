"""What the stand-ins' own tests share."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tests.standins.cuda import CudaStandin, MisuseError
from tests.standins.tensorrt import VERSIONS, make_tensorrt, make_tensorrt_rtx

ALL = (*VERSIONS, "rtx")


def make(version: str, cuda: CudaStandin | None = None, **knobs: Any) -> ModuleType:
    if version == "rtx":
        return make_tensorrt_rtx(cuda, **knobs)
    return make_tensorrt(version, cuda, **knobs)


@pytest.fixture(params=ALL)
def trt(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Every version; at the end nothing was misused that the test did not ask for."""
    module = make(request.param)
    yield module
    module.standin.cuda.assert_no_violation()


def misuse(cuda: CudaStandin, text: str, call: Callable[[], Any]) -> None:
    """Expect a violation, and forget it."""
    with pytest.raises(MisuseError, match=text):
        call()
    assert cuda.violations
    cuda.violations.clear()


def installed(package: str, version: str) -> bool:
    try:
        return importlib.metadata.version(package).startswith(version)
    except importlib.metadata.PackageNotFoundError:
        return False
