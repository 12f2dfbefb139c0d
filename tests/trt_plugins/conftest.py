"""The plugin, built once per test run by the `release` preset and shared by its workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


def tool_environment(**changes: str) -> dict[str, str]:
    """As `make` calls tools: the virtual environment's first, no CUDA settings of the caller."""
    bins = Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if name not in ("CUDAARCHS",)}
    return {**kept, "PATH": f"{bins}{os.pathsep}{os.environ['PATH']}", **changes}


def run(*command: str | Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and all output of a command in the repository's root."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=env or tool_environment(), check=False, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="session")
def plugin_build(shared_folder: Path) -> Path:
    """Build folder of the `release` preset; `configure.log` is what CMake said; read only."""
    build = shared_folder / "plugin_build"
    with FileLock(str(build) + ".lock"):
        if not (build / "libstts_plugins.so").exists():
            status, said = run("cmake", "--preset", "release", "-B", build)
            assert status == 0, said
            (build / "configure.log").write_text(said, encoding="utf-8")
            status, said = run("cmake", "--build", build)
            assert status == 0, said
    return build


@pytest.fixture(scope="session")
def plugin(plugin_build: Path) -> Path:
    """The shipped libstts_plugins.so."""
    return plugin_build / "libstts_plugins.so"
