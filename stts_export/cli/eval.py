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
from typing import TYPE_CHECKING

from stts_export.cli.common import (
    Arguments,
    backend_options,
    checkpoint_options,
    path_or_name,
)
from stts_export.errors import InputError
from stts_export.files import write_json
from stts_export.machine import machine
from stts_export.runtime.planner import n_prune

if TYPE_CHECKING:
    from stts_export.training.exam import Exam

_SYNTHETIC = "synthetic"
_OF_FILES = ("layout", "media", "split", "max_broken")
_OF_SYNTHETIC = ("level",)


def options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "source", type=path_or_name, metavar="CHECKPOINT|BUNDLE",
        help="folder written by build, or a checkpoint as build takes it, which runs in PyTorch",
    )  # fmt: skip
    verb.add_argument(
        "--data", default=_SYNTHETIC, metavar="synthetic|FILE",
        help="synthetic (default): held-out clips of our own; synthetic:dev: those to tune on; or "
        "a file of questions about videos and images",
    )  # fmt: skip
    verb.add_argument("--layout", help="of the file: jsonl, llava, nextqa or hf; told if absent")
    verb.add_argument(
        "--media", type=Path, metavar="DIR", help="folder of the file's videos and images"
    )
    verb.add_argument("--split", metavar="NAME", help="of a dataset of Hugging Face")
    verb.add_argument("--prune-ratio", default="0,0.3,0.5,0.7,0.8", help="ratios, comma separated")
    verb.add_argument(
        "--selector", default="stts,random,uniform-frames,tome,evs",
        help="who chooses what is kept, comma separated: stts (the model's scores), random, "
        "uniform-frames (fewer frames), tome (merging), evs (dropping repeats after the tower); "
        "all keep equally many windows",
    )  # fmt: skip
    verb.add_argument(
        "--max-frames", type=int, metavar="N",
        help="frames of a video at most; what the bundle or the checkpoint says if absent",
    )  # fmt: skip
    verb.add_argument(
        "--questions", type=int, metavar="N", help="500 of synthetic clips, all of a file if absent"
    )
    verb.add_argument(
        "--clips", type=int, metavar="N", help="250 synthetic ones, all of a file if absent"
    )
    verb.add_argument(
        "--level", type=int, metavar="L", help="difficulty of synthetic clips, 0..2 (2)"
    )
    verb.add_argument(
        "--seed", type=int, default=0, help="of clips, questions and random windows (0)"
    )
    verb.add_argument(
        "--max-broken", type=int, metavar="N",
        help="clips of a file that may be left out because they are missing or unreadable; none "
        "and one in a hundred if absent",
    )  # fmt: skip
    verb.add_argument("--threads", type=int, metavar="N", help="all cores if absent")
    verb.add_argument("--device", help="cpu (default) or cuda")
    backend_options(verb)
    checkpoint_options(verb)
    verb.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Arguments) -> int:
    from stts_export.training.answerers import open_answerer
    from stts_export.training.evaluation import evaluate, table
    from stts_export.training.selectors import check_selectors

    ratios = _ratios(arguments.prune_ratio)
    selectors = check_selectors(arguments.selector.split(","))
    exam = _exam(arguments)
    if arguments.output:
        _check_report(arguments.output)
    with open_answerer(
        arguments.source,
        max_frames=arguments.max_frames,
        threads=arguments.threads,
        device=arguments.device,
        backend=arguments.backend,
        plugin=arguments.plugin,
        revision=arguments.revision,
        tokenizer=arguments.tokenizer,
    ) as answerer:
        results = evaluate(
            answerer,
            exam,
            ratios=ratios,
            selectors=selectors,
            max_broken=arguments.max_broken,
        )
    results["machine"] = machine()
    results["command"] = _command(arguments)
    print(json.dumps(results) if arguments.json else table(results), flush=True)
    if arguments.output:
        with _writing(arguments.output):
            write_json(arguments.output, results)
    return 0


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(ratio) for ratio in text.split(",")]
    except ValueError:
        raise InputError(
            f"prune ratios {text!r}", where="--prune-ratio", allowed="0,0.5,0.8"
        ) from None
    for ratio in ratios:
        n_prune(1, 1, ratio)
    return ratios


def _exam(arguments: Arguments) -> Exam:
    """Choose what is asked."""
    from stts_export.training.exam import file_exam, synthetic_exam

    data, _, split = arguments.data.partition(":")
    is_synthetic = data == _SYNTHETIC
    for name in _OF_FILES if is_synthetic else _OF_SYNTHETIC:
        if getattr(arguments, name) is not None:
            raise InputError(
                f"{getattr(arguments, name)} is of no use with {arguments.data}",
                where=f"--{name.replace('_', '-')}",
                allowed="with a file of questions" if is_synthetic else "with synthetic clips",
                fix="leave it out",
            )
    given = {
        name: getattr(arguments, name)
        for name in ("questions", "clips", "level", "seed")
        if getattr(arguments, name) is not None
    }
    if is_synthetic:
        return synthetic_exam(**given, **({"split": split} if split else {}))
    return file_exam(
        arguments.data,
        layout=arguments.layout,
        media=arguments.media,
        split=arguments.split,
        allow_missing=arguments.max_broken or 0,
        **given,
    )


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
    words = ["stts-export", "eval", str(arguments.source)]
    for name in (
        "data", "layout", "media", "split", "prune_ratio", "selector", "max_frames", "questions",
        "clips", "level", "seed", "max_broken", "threads", "device", "backend", "plugin",
        "revision", "tokenizer",
    ):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
