"""Doing what is not done yet: training runs and examinations, in processes of one thread each.

What is finished stays in the work folder and is not done again. A folder belongs to one
configuration and one base; with another one it is refused, not used.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import yaml

from benchmarks.harness.evidence_plan import Examination, Training, changed_keys, digest, flat
from stts_export.errors import InputError, SttsError
from stts_export.files import json_object, write_json
from stts_export.training.folders import step_folders
from stts_export.training.state import STATE_FOLDER

Say = Callable[[str], None]

ROOT = Path(__file__).parents[2]
_LOG_LINES = 30


class JobError(SttsError):
    """A training run or an examination failed."""


class Workers(Protocol):
    """Who does the work. Calls come from several threads, as many as there are jobs."""

    def train(self, config: Path, run: Path, *, resume: bool, log: Path) -> None:
        """Train a configuration in a folder.

        Raises:
            JobError: it failed.
        """

    def work(self, task: Mapping[str, Any], log: Path) -> dict[str, Any]:
        """Do a task of `evidence_work`, and return its result.

        Raises:
            JobError: it failed.
        """

    def stop(self) -> None:
        """End what is being done, and refuse to begin anything more."""


class Processes:
    """Does every piece of work in a process of its own.

    Ctrl-C reaches them through `stop` alone: a training run saves when it hears it once.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def train(self, config: Path, run: Path, *, resume: bool, log: Path) -> None:
        """Train; see `Workers`."""
        words = ["stts_export.training", str(config), "-o", str(run)]
        self._do([*words, "--resume"] if resume else words, log)

    def work(self, task: Mapping[str, Any], log: Path) -> dict[str, Any]:
        """Do a task; see `Workers`."""
        told, result = log.with_suffix(".task.json"), log.with_suffix(".result.json")
        result.unlink(missing_ok=True)
        write_json(told, task)
        self._do(["benchmarks.harness.evidence_work", str(told), str(result)], log)
        found = json_object(result)
        told.unlink()
        result.unlink()
        return found

    def stop(self) -> None:
        """End all processes, and wait for them; see `Workers`."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        for process in running:
            process.wait()

    def _do(self, words: Sequence[str], log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        with log.open("ab") as file:
            with self._lock:
                if self._stopped:
                    raise JobError("was not begun: another one failed", where=str(log.parent))
                process = subprocess.Popen(
                    [sys.executable, "-m", *words],
                    stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                )  # fmt: skip
                self._running.append(process)
            try:
                code = process.wait()
            finally:
                with self._lock:
                    self._running.remove(process)
        if code:
            raise JobError(
                f"ended with exit code {code}; the end of {log}:\n{_end_of(log)}",
                where=" ".join(["python -m", *words]),
                fix="repair what it says, and give the same command again: it goes on from there",
            )


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"    {line}" for line in lines[-_LOG_LINES:])


def claim(training: Training) -> None:
    """Mark a folder as that of a training run; nothing happens when it is already.

    Raises:
        InputError: it belongs to another one.
    """
    file = training.folder / "identity.json"
    if file.exists():
        changed = changed_keys(flat(json_object(file)), flat(training.identity))
        if changed:
            raise InputError(
                f"holds a run with another {', '.join(changed)}",
                where=str(training.folder),
                fix="take another --work folder, or remove this one",
            )
    elif training.folder.exists() and any(training.folder.iterdir()):
        raise InputError(
            "holds something else than a run of the evidence",
            where=str(training.folder),
            fix="take another --work folder",
        )
    else:
        write_json(file, training.identity)


def is_trained(training: Training) -> bool:
    """Whether the model after the last step is there."""
    return (training.checkpoint / "training.json").exists()


def train(training: Training, workers: Workers, say: Say) -> None:
    """Train a run to its end, from where it stopped; nothing happens when it is finished.

    Raises:
        InputError: its folder belongs to another one.
        JobError: it failed, or was interrupted.
    """
    claim(training)
    if is_trained(training):
        return
    states = step_folders(training.run / STATE_FOLDER)
    if not states and training.run.exists():
        shutil.rmtree(training.run)  # it ended before it saved anything
    config = training.folder / "config.yaml"
    text = yaml.safe_dump(training.config.to_dict(), sort_keys=False)
    config.write_text(text, encoding="utf-8")
    done = int(states[-1].name.removeprefix("step")) if states else 0
    log = training.folder / "train.log"
    say(f"{training.name}: training from step {done} of {training.config.optim.steps}; see {log}")
    workers.train(config, training.run, resume=bool(states), log=log)
    if not is_trained(training):
        raise JobError(
            f"stopped before step {training.config.optim.steps}; see {log}",
            where=training.name,
            fix="give the same command again: it goes on from there",
        )


def examine(examination: Examination, clips: Path, workers: Workers) -> dict[str, Any]:
    """Return the result of an examination; made now, unless it is there already.

    Args:
        examination: of a finished run.
        clips: folder of the test clips.
        workers: who does it.

    Raises:
        JobError: it failed.
    """
    kept = json_object(examination.file)
    if kept.get("identity") == examination.identity:
        result: dict[str, Any] = kept["result"]
        return result
    log = examination.training.folder / f"{examination.name}.log"
    result = workers.work(examination_task(examination, clips), log)
    write_json(examination.file, {"identity": examination.identity, "result": result})
    return result


def examination_task(examination: Examination, clips: Path) -> dict[str, Any]:
    """Return what `evidence_work` is told about an examination."""
    return {
        "kind": "examine",
        "checkpoint": str(examination.training.checkpoint),
        "clips": str(clips),
        **examination.identity,
    }


@dataclass(frozen=True)
class Unit:
    """What is done in one piece, and reported when it is done."""

    name: str
    is_done: bool
    do: Callable[[], None]


def do_all(what: str, units: Sequence[Unit], jobs: int, workers: Workers, say: Say) -> None:
    """Do all units, several at once; the first that fails ends the others.

    Args:
        what: they are, for messages; plural.
        units: in the order in which they are begun.
        jobs: how many at once.
        workers: who is stopped when one fails or Ctrl-C comes.
        say: told what is done and what is left.

    Raises:
        JobError: one failed.
        KeyboardInterrupt: what was begun is saved.
    """
    left = [unit for unit in units if not unit.is_done]
    if len(left) < len(units):
        say(f"{what}: {len(units) - len(left)} of {len(units)} are there already")
    began = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {pool.submit(unit.do): unit for unit in left}
        try:
            for number, future in enumerate(as_completed(waiting), start=1):
                future.result()
                say(f"{waiting[future].name}: done; {_rest(number, len(left), began)}")
        except BaseException:
            for future in waiting:
                future.cancel()
            workers.stop()
            raise


def _rest(done: int, total: int, began: float) -> str:
    left = total - done
    if not left:
        return "nothing left"
    minutes = (time.monotonic() - began) / done * left / 60
    return f"{left} left, about {minutes:.0f} min"


def digest_of_files(files: Sequence[Path]) -> str:
    """Return twelve digits that stand for the content of files, by their names."""
    return digest({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
