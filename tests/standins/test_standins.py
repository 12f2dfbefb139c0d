"""Code under test finds the stand-ins, in this process and in its children."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

from tests.standins.fixtures import (
    child_calls,
    install_cuda,
    install_tensorrt,
    uninstall,
)


def test_imports_and_child_processes_find_them(monkeypatch: pytest.MonkeyPatch):
    cuda = install_cuda(monkeypatch, compute_capability=(8, 6))
    module = install_tensorrt(monkeypatch, "10.16", cuda)
    runtime = importlib.import_module("cuda.bindings").runtime

    assert importlib.import_module("tensorrt") is module
    assert runtime.standin is cuda
    program = (
        "import tensorrt; from cuda.bindings import runtime; tensorrt.Builder(tensorrt.Logger());"
        "print(tensorrt.__version__, runtime.standin.sm, tensorrt.standin.cuda is runtime.standin)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["10.16.1.11", "sm86", "True"], done.stderr
    assert [name for name, _ in child_calls()] == ["Logger", "Builder"]
    uninstall(monkeypatch, "tensorrt", "cuda")
    for name in ("tensorrt", "cuda.bindings"):
        with pytest.raises(ImportError):
            importlib.import_module(name)
