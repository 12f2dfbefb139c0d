"""Builds one engine in a child process, so that no crash or memory of the library reaches ours."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

from stts_export.engines.network import Built, EngineJob, build_engine
from stts_export.errors import InputError, MissingDependencyError, SttsError

log = logging.getLogger(__name__)

OnFraction = Callable[[float], None]
_TAIL = 2000  # characters of what a dead child printed
_PR_SET_PDEATHSIG = 1
_ERRORS = {error.__name__: error for error in (InputError, MissingDependencyError)}


def run_job(job: EngineJob, on_fraction: OnFraction | None = None) -> Built:
    """Build an engine in a child process.

    An exception raised meanwhile, Ctrl-C included, ends the child; the engine file is written
    whole or not at all.

    Args:
        job: what to build.
        on_fraction: called with the finished fraction.

    Raises:
        InputError: the library refuses; or the child died, from lack of memory or a crash.
        MissingDependencyError: the library cannot be imported.
        OSError: a file cannot be read or written.
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as printed, os.fdopen(reader, encoding="utf-8") as answers:
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _program(), str(writer)],
                stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=(writer,),
                start_new_session=True,  # Ctrl-C reaches us alone, and we end the child
            )  # fmt: skip
        finally:
            os.close(writer)
        try:
            _send(child, job)
            result = _follow(answers, on_fraction or (lambda _: None))
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            job.engine.with_name(job.engine.name + ".partial").unlink(missing_ok=True)
        if result is None:
            raise _death(status, job, printed)
    return result


def _program() -> str:
    """Let the child import what this process imports, in the same order."""
    paths = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
    return (
        f"import sys; sys.path[:] = {paths!r}; "
        "from stts_export.engines import worker; worker.main(int(sys.argv[1]))"
    )


def _send(child: subprocess.Popen[bytes], job: EngineJob) -> None:
    assert child.stdin is not None
    try:
        with child.stdin as stream:
            stream.write(pickle.dumps(job))
    except BrokenPipeError:
        pass  # the child is dead; its status says why


def _follow(answers: IO[str], on_fraction: OnFraction) -> Built | None:
    """Read the child's lines until it ends; None when it ended without a result."""
    result: Built | None = None
    on_fraction(0.0)
    for line in answers:
        if not line.endswith("\n"):
            return None  # the child died while it wrote
        kind, value = json.loads(line)
        if kind == "fraction":
            on_fraction(value)
        elif kind == "disk":
            raise OSError(*value)
        elif kind == "error":
            raise _ERRORS[value.pop("type")](**value)
        else:
            result = pickle.loads(bytes.fromhex(value))
    if result is not None:
        on_fraction(1.0)
        for warning in result.warnings:
            log.warning("%s", warning)
    return result


def _death(status: int, job: EngineJob, printed: IO[bytes]) -> SttsError:
    printed.seek(0)
    tail = printed.read().decode(errors="replace").strip()[-_TAIL:]
    said = f"; it printed: {tail}" if tail else ""
    if status == -signal.SIGKILL:
        return InputError(
            f"the process that built it with {job.module} was killed (SIGKILL), "
            f"most likely because the machine has too little memory{said}",
            where=str(job.onnx),
            fix="free memory, build for shorter clips (--max-frames), or build on another machine",
        )
    if status < 0:
        ended = f"crashed ({signal.Signals(-status).name})"
    else:
        ended = f"ended with status {status}"
    return InputError(
        f"{job.module} {ended} while building it{said}",
        where=str(job.onnx),
        fix=f"report this, with the version of {job.module}; the bundle still builds without it",
    )


def main(answers: int) -> None:
    """Build the job on standard input; answer in lines of JSON on the file descriptor."""
    # Without its parent it would write where the next build does.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(answers, "w", encoding="utf-8", buffering=1) as stream:

        def answer(kind: str, value: Any) -> bool:
            try:
                stream.write(json.dumps([kind, value]) + "\n")
            except BrokenPipeError:
                return False
            return True

        job: EngineJob = pickle.load(sys.stdin.buffer)
        try:
            trt = import_module(job.module)
        except (ImportError, OSError) as error:
            answer("error", {"type": "MissingDependencyError", "where": job.module,
                             "message": f"cannot be imported: {error}"})  # fmt: skip
            return
        try:
            # When nobody listens any more, the answer to the library is to stop.
            built = build_engine(trt, job, lambda fraction: answer("fraction", fraction))
        except SttsError as error:
            names = ("message", "where", "allowed", "fix")
            words = {name: getattr(error, name) for name in names}
            answer("error", {"type": type(error).__name__, **words})
            return
        except OSError as error:
            if error.errno is None:
                raise
            file = os.fsdecode(error.filename or job.engine)
            answer("disk", [error.errno, error.strerror, file])
            return
        answer("built", pickle.dumps(built).hex())
