"""Building in a child process: whatever happens to it, we get one error and no half file."""

from __future__ import annotations

import fcntl
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
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


_KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("answer", ['["fraction", 0.', '["built", "8004', "", "["])
def test_a_child_that_dies_while_it_answers(job: EngineJob, answer: str):
    _library(job, f"os.write(int(sys.argv[1]), {answer.encode()!r}); {_KILLED}")
    with pytest.raises(InputError, match=r"was killed \(SIGKILL\)"):
        run_job(job)


def test_a_full_disk_is_an_error_of_the_disk(job: EngineJob):
    _library(job, "def __getattr__(name): raise OSError(28, 'No space left on device')")
    with pytest.raises(OSError, match="No space left on device") as error:
        run_job(job)
    assert (error.value.errno, error.value.filename) == (28, str(job.engine))


def test_the_child_ends_with_its_parent(job: EngineJob, tmp_path: Path):
    lock = tmp_path / "lock"
    _library(
        job,
        f"import fcntl\nfile = open({str(lock)!r}, 'w')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', file=file, flush=True)\ntime.sleep(600)",
    )
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    code = (
        "import pickle, sys; from stts_export.engines.worker import run_job; "
        "run_job(pickle.load(open(sys.argv[1], 'rb')))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.pickle")])
    try:
        _wait(lambda: lock.exists() and lock.read_text() == "locked\n")
    finally:
        parent.kill()
        parent.wait()
    with lock.open() as file:

        def free() -> bool:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        _wait(free)


def _wait(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_the_child_imports_what_its_parent_does(
    job: EngineJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for folder in (tmp_path, tmp_path / "modules" / "late"):
        folder.mkdir(exist_ok=True)
        (folder / "json.py").write_text("raise ImportError('not the json that was meant')")
    (tmp_path / "modules" / "late" / "late_module.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules" / "late")])
    _library(job, "import late_module; raise ImportError('found')")
    with pytest.raises(MissingDependencyError, match="found"):
        run_job(job)


def test_the_child_needs_neither_torch_nor_onnx(job: EngineJob):
    code = "import sys, stts_export.engines.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "onnx", "onnxruntime", "transformers"} & set(done.stdout.split())
