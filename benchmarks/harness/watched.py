"""Run a command and watch its memory from outside."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_EVERY_SECONDS = 0.02


def watched(command: Sequence[str]) -> dict[str, Any]:
    """Run a command; what it writes to stderr is passed on.

    Memory is the command's own process; what it starts itself does not count.

    Returns:
        `seconds`; `cpu_seconds`; `peak_anonymous`, `peak_file` and `peak_resident`, the largest
        samples of anonymous memory, of pages of files (which the system drops when it needs them)
        and of both together, in bytes; `ru_maxrss` of the kernel; and `stages`, the same from each
        line of stderr that looks like "[1/5] name" to the next.

    Raises:
        RuntimeError: the command failed.
    """
    started = time.perf_counter()
    stages = [_Stage("start", started)]
    written: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        readers = (
            threading.Thread(target=_follow, args=(child, stages)),
            threading.Thread(target=written.extend, args=(child.stdout,)),
        )
        for reader in readers:
            reader.start()
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            stages[-1].sample(child.pid)
            time.sleep(_EVERY_SECONDS)
        ended = time.perf_counter()
        child.returncode = os.waitstatus_to_exitcode(status)
        for reader in readers:
            reader.join()
    if child.returncode:
        raise RuntimeError(f"exit code {child.returncode}: {' '.join(command)}")
    ends = [*(stage.started for stage in stages[1:]), ended]
    return {
        "seconds": round(ended - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **{f"peak_{kind}": max(stage.peak[kind] for stage in stages) for kind in _KINDS},
        "ru_maxrss": usage.ru_maxrss * 1024,
        "stages": [stage.row(end) for stage, end in zip(stages, ends, strict=True)],
        "output": "".join(written),
    }


_KINDS = {"anonymous": ("RssAnon",), "file": ("RssFile",), "resident": ("RssAnon", "RssFile")}


class _Stage:
    def __init__(self, name: str, started: float) -> None:
        self.name = name
        self.started = started
        self.peak = dict.fromkeys(_KINDS, 0)

    def sample(self, pid: int) -> None:
        try:
            lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:  # it has ended
            return
        found = dict(line.split(":", 1) for line in lines)
        for kind, names in _KINDS.items():
            size = sum(int(found[name].split()[0]) for name in names if name in found) * 1024
            self.peak[kind] = max(self.peak[kind], size)

    def row(self, ended: float) -> dict[str, Any]:
        peaks = {f"peak_{kind}": size for kind, size in self.peak.items()}
        return {"stage": self.name, "seconds": round(ended - self.started, 1), **peaks}


def _follow(child: subprocess.Popen[str], stages: list[_Stage]) -> None:
    """Pass lines on; begin a stage where one says so."""
    assert child.stderr is not None
    for line in child.stderr:
        print(line, end="", flush=True)
        number, bracket, name = line.strip().partition("] ")
        if bracket and number.startswith("["):
            stage = _Stage(name, time.perf_counter())
            stage.sample(child.pid)  # it may be over before the next sample
            stages.append(stage)
