"""Building in a child process: whatever happens to it, we get one error and no half file."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stts_export.engines import worker
from stts_export.engines.network import EngineJob
from stts_export.engines.worker import run_job
from stts_export.errors import InputError, MissingDependencyError
from stts_export.tensors import GraphSpec


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineJob:
    """A job for a library that `_library` writes."""
    (tmp_path / "modules").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    return EngineJob(
        "odd_tensorrt",
        GraphSpec("vision_lower", (), ()),
        tmp_path / "model.onnx",
        tmp_path / "vision_lower.engine",
        (),
    )


def _library(job: EngineJob, body: str) -> None:
    folder = job.onnx.parent / "modules"
    (folder / "odd_tensorrt.py").write_text(f"import os, signal, sys, time\n{body}\n")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("os.abort()", r"odd_tensorrt crashed \(SIGABRT\) while building it"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"was killed \(SIGKILL\).*too little memory"),
        ("os._exit(7)", "odd_tensorrt ended with status 7"),
        ("print('terminate called'); sys.stdout.flush(); os.abort()", "printed: terminate called"),
        ("raise ValueError('no idea')", "ended with status 1.*no idea"),
    ],
)
def test_the_death_of_the_child_is_one_error(job: EngineJob, body: str, message: str):
    _library(job, body)
    partial = job.engine.with_name("vision_lower.engine.partial")
    partial.write_bytes(b"half")
    with pytest.raises(InputError, match=f"(?s){message}") as error:
        run_job(job)
    assert "fix:" in str(error.value)
    assert not partial.exists()
    assert not job.engine.exists()


@pytest.mark.parametrize("body", ["raise OSError('libcudart.so.13: cannot open')", None])
def test_a_library_that_is_not_there(job: EngineJob, body: str | None):
    if body:
        _library(job, body)
    with pytest.raises(MissingDependencyError, match="odd_tensorrt: cannot be imported"):
        run_job(job)


def test_an_interruption_ends_the_child(job: EngineJob, monkeypatch: pytest.MonkeyPatch):
    _library(job, f"open({str(job.onnx)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")

    def interrupted(*_: object) -> None:
        deadline = time.monotonic() + 60
        while not (job.onnx.exists() and job.onnx.read_text()) and time.monotonic() < deadline:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    with pytest.raises(ProcessLookupError):
        os.kill(int(job.onnx.read_text()), 0)


def test_the_child_finds_the_package_from_anywhere(
    job: EngineJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    _library(job, "raise ImportError('found')")
    with pytest.raises(MissingDependencyError, match="found"):
        run_job(job)


def test_the_child_needs_neither_torch_nor_onnx(job: EngineJob):
    code = "import sys, stts_export.engines.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "transformers"} & set(done.stdout.split())
