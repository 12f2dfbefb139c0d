"""The folder that a build writes: worked on beside its name, locked, and published when complete.

Nothing that is not ours is ever removed, and nothing is written where the build reads.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stts_export.bundle import GRAPH_FOLDER, is_bundle
from stts_export.engines.engine_set import ENGINE_FOLDER
from stts_export.errors import InputError
from stts_export.files import check_utf8, json_object, write_json

log = logging.getLogger(__name__)

STAMP, LOCK = "build.json", "build.lock"
"""In the working folder only: what is being built, and the lock of the build that does it."""
CALIBRATION_FOLDER = "calibration"
"""In the working folder only: a build's own calibration."""
NUMERICS = "numerics.json"
"""In the working folder only: digest of the number formats that its graphs were written with."""


def check_name(output: Path) -> None:
    """Refuse what cannot be the name of a bundle."""
    check_utf8(output)
    if output.name in ("", ".."):
        raise InputError(
            "is not the name of a new folder", where=str(output), allowed="a name, such as bundle"
        )


def check_apart(output: Path, read: Iterable[Path], what: str) -> None:
    """Refuse to write where the checkpoint or bundle is read from."""
    for folder in (output, output.with_name(output.name + ".partial")):
        target = Path(os.path.realpath(folder))
        for path in read:
            real = Path(os.path.realpath(path))
            if target.is_relative_to(real) or real.is_relative_to(target):
                raise InputError(
                    f"overlaps the {what} ({path})",
                    where=str(folder),
                    fix=f"choose an output outside the {what}",
                )


def check_paths(output: Path, force: bool) -> None:
    """Refuse an output that cannot be written, or whose writing would remove what is not ours."""
    _check_output(output, force)
    partial = output.with_name(output.name + ".partial")
    if os.path.lexists(partial) and not _is_working_folder(partial):
        raise InputError(
            "exists and is not an unfinished build",
            where=str(partial),
            fix="move it away, or choose another output",
        )
    _old_name(output).exists()  # OSError when the name is too long
    parent = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError("is not a folder", where=str(parent), fix="choose another output")


def _check_output(output: Path, force: bool) -> None:
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not is_bundle(output):
        kind = "a symbolic link" if output.is_symlink() else "not a bundle"
        raise InputError(
            f"exists already and is {kind}; only bundles are ever replaced",
            where=str(output),
            fix="choose another name",
        )
    if not force:
        raise InputError(
            "exists already",
            where=str(output),
            fix="choose another name, or add --force to replace the bundle",
        )


def _is_working_folder(partial: Path) -> bool:
    """Whether a folder was made by a build of ours: it holds the stamp, or nothing of a user's."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {path.name for path in partial.iterdir()}
    return STAMP in names or names <= {LOCK, f"{STAMP}.partial"}


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Keep other builds out of the working folder; the lock goes with the process."""
    path = partial / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the build that held the lock may have finished.
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(
                "another build or conversion is writing here",
                where=str(partial),
                fix="wait for it, or choose another output",
            )
        yield


def prepare(partial: Path, fingerprint: dict[str, Any]) -> None:
    """Make the working folder, or keep one that an equal build left unfinished."""
    stamp = json.loads(json.dumps(fingerprint))
    try:
        resumable = json.loads((partial / STAMP).read_text(encoding="utf-8")) == stamp
    except (OSError, ValueError):
        resumable = False
    if not resumable:
        write_json(partial / STAMP, {})  # ours, and nothing to go on from
        _empty(partial)
    (partial / GRAPH_FOLDER).mkdir(exist_ok=True)
    write_json(partial / STAMP, stamp)


def _empty(partial: Path) -> None:
    """Remove what another build left."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (STAMP, LOCK):
            path.unlink()


def publish(partial: Path, output: Path, force: bool) -> None:
    """Give the working folder its final name; an existing bundle goes when that is done."""
    _check_output(output, force)  # it may have appeared during the build
    replaces = output.exists()
    old = _old_name(output)
    try:
        if replaces:
            output.rename(old)
        partial.rename(output)
    except BaseException:
        if replaces and not output.exists():
            old.rename(output)
        raise
    for name in (STAMP, LOCK, NUMERICS):
        (output / name).unlink(missing_ok=True)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            log.warning("%s, the bundle before, could not be removed", old)


def _old_name(output: Path) -> Path:
    return output.with_name(f"{output.name}.old-{os.getpid()}")


def keep_graphs_of(partial: Path, digest: str) -> None:
    """Drop graphs, and engines of them, that were written with other number formats.

    Args:
        partial: working folder.
        digest: of the formats that are wanted.
    """
    if json_object(partial / NUMERICS) != {"digest": digest}:
        for name in (GRAPH_FOLDER, ENGINE_FOLDER):
            shutil.rmtree(partial / name, ignore_errors=True)
        (partial / GRAPH_FOLDER).mkdir()
        write_json(partial / NUMERICS, {"digest": digest})


@contextmanager
def readable_disk_errors(source: Path, partial: Path) -> Iterator[None]:
    """Turn errors of the disk into ours.

    Args:
        source: what is read; other files may be read too.
        partial: working folder; in it, beside it under the output's names, and above it is written.
    """
    try:
        yield
    except BrokenPipeError:  # of the terminal, not of a file
        raise
    except OSError as error:
        # Of two names, the second is what was written.
        named = error.filename2 or error.filename
        file = os.fsdecode(named) if isinstance(named, str | bytes) else str(partial)
        problem = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or error.errno == errno.EROFS or _is_written(Path(file), source, partial)):
            read = error.filename if isinstance(error.filename, str) else file
            raise InputError(f"cannot be read: {problem}", where=read) from error
        remedy = "free space or choose another folder" if full else "choose another folder"
        done = f", then rerun: {partial} keeps what is done" if full and partial.is_dir() else ""
        raise InputError(
            f"cannot be written: {problem}", where=file, fix=f"{remedy}{done}"
        ) from error


def _is_written(file: Path, source: Path, partial: Path) -> bool:
    """Whether a file is of the output's, and not read."""
    file, source, partial = (Path(os.path.abspath(path)) for path in (file, source, partial))
    if file.is_relative_to(source):
        return False
    output = partial.parent / partial.name.removesuffix(".partial")
    beside = [name for name in (file, *file.parents) if name.parent == output.parent]
    return partial.is_relative_to(file) or any(
        name.name == output.name or name.name.startswith(f"{output.name}.") for name in beside
    )
