"""Folders that all processes of a run write together: whole under their name, or not there."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stts_export.errors import InputError, SttsError
from stts_export.training.parallel import Parallel

_STEP = re.compile(r"step(\d+)")
_LEFT_OVER = re.compile(r"step\d+\.(partial|old)")


@contextmanager
def whole_folder(folder: Path, parallel: Parallel) -> Iterator[Path]:
    """Yield an empty folder to write to; it becomes `folder` when all processes are done.

    A folder of that name is replaced. What a killed run left unfinished beside it goes.

    Args:
        folder: `.../stepN`, on a disk that all processes share.
        parallel: the processes. All enter and leave together: what is done in between must not
            leave one waiting when another one fails.

    Raises:
        InputError: a process could not write, for example because the disk is full. Raised in all
            of them; what was written is gone, and everything older is left as it was.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    parallel.on_main(lambda: _prepare(partial))
    failure: SttsError | None = None
    try:
        yield partial
    except OSError as error:
        failure = _disk_error(error, folder)
    except SttsError as error:
        failure = error
    except BaseException:
        if parallel.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        parallel.raise_together(failure)
        parallel.on_main(lambda: _publish(partial, folder))
    except SttsError:
        if parallel.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def step_folders(parent: Path) -> list[Path]:
    """Finished `stepN` folders, the oldest first; none where there is no such parent."""
    if not parent.is_dir():
        return []
    steps = [
        (int(match[1]), child)
        for child in parent.iterdir()
        if (match := _STEP.fullmatch(child.name)) and child.is_dir()
    ]
    return [child for _, child in sorted(steps)]


def remove_older(parent: Path, keep: int, parallel: Parallel) -> None:
    """Leave only the newest step folders."""
    if parallel.is_main:
        for folder in step_folders(parent)[:-keep]:
            shutil.rmtree(folder, ignore_errors=True)


def _prepare(partial: Path) -> None:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        for child in partial.parent.iterdir():
            if _LEFT_OVER.fullmatch(child.name):
                shutil.rmtree(child)
        partial.mkdir()
    except OSError as error:
        raise _disk_error(error, partial.with_name(partial.stem)) from None


def _publish(partial: Path, folder: Path) -> None:
    old = folder.with_name(f"{folder.name}.old")
    try:
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except OSError as error:
        raise _disk_error(error, folder) from None
    shutil.rmtree(old, ignore_errors=True)


def _disk_error(error: OSError, folder: Path) -> InputError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some space" if full else "make the folder writable"
    steps = step_folders(folder.parent)
    last = f": {steps[-1]} is whole" if steps else ""
    return InputError(
        f"cannot be written: {error.strerror or error}",
        where=str(folder),
        fix=f"{remedy} and go on with --resume{last}",
    )
