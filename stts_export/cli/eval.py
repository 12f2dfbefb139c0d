"""`stts-export eval`."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stts_export.cli.common import Arguments, backend_options
from stts_export.errors import InputError
from stts_export.files import write_json
from stts_export.machine import machine


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("bundle", type=Path, help="folder written by build")
    verb.add_argument("--questions", type=int, default=500, help="held-out questions (500)")
    verb.add_argument("--clips", type=int, default=250, help="different clips (250)")
    verb.add_argument("--prune-ratio", default="0,0.5,0.8", help="ratios, comma separated")
    verb.add_argument("--selector", default="stts,random", help="stts, random; comma separated")
    backend_options(verb)
    verb.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.bundle import Bundle
    from stts_export.training.evaluation import evaluate, table

    try:
        ratios = [float(ratio) for ratio in arguments.prune_ratio.split(",")]
    except ValueError:
        raise InputError(
            f"prune ratios {arguments.prune_ratio!r}", where="--prune-ratio", allowed="0,0.5,0.8"
        ) from None
    if arguments.output:
        _check_report(arguments.output)
    results = evaluate(
        arguments.bundle,
        questions=arguments.questions,
        clips=arguments.clips,
        ratios=ratios,
        selectors=arguments.selector.split(","),
        backend=arguments.backend,
        plugin=arguments.plugin,
    )
    results["precision"] = Bundle.open(arguments.bundle).manifest.precision
    results["machine"] = machine()
    results["command"] = _command(arguments)
    print(json.dumps(results) if arguments.json else table(results), flush=True)
    if arguments.output:
        with _writing(arguments.output):
            write_json(arguments.output, results)
    return 0


def _check_report(path: Path) -> None:
    """Refuse, before any work, a name that cannot be written; make its folder."""
    with _writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            fix="name a file in a folder that you may write to, with space on the disk",
        ) from None


def _command(arguments: Arguments) -> str:
    """Return the command line that gives the same results."""
    words = ["stts-export", "eval", str(arguments.bundle)]
    for name in ("questions", "clips", "prune_ratio", "selector", "backend", "plugin"):
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
