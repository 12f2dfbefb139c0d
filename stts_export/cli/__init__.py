"""The command line: verbs, one module each. It adds nothing that the library cannot do."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, NoReturn, TextIO

from stts_export._version import __version__
from stts_export.cli import (
    build,
    calibrate,
    convert,
    doctor,
    estimate,
    eval,
    inspect,
    quant_report,
    run,
    train,
    verify,
    watch,
)
from stts_export.cli.watch import say
from stts_export.errors import MissingDependencyError, SttsError

_VERBS: tuple[tuple[str, str, ModuleType], ...] = (
    ("build", "Build a bundle from a checkpoint or a bundle.", build),
    ("calibrate", "Find the scales of a quantised model on clips.", calibrate),
    ("run", "Answer a question about a video.", run),
    ("watch", "Answer a question about live video, again and again.", watch),
    ("inspect", "Show what a bundle holds.", inspect),
    ("convert", "Write a checkpoint as a Hugging Face folder.", convert),
    ("verify", "Compare a bundle with its checkpoint.", verify),
    ("quant-report", "Show how far a quantised bundle is from fp32.", quant_report),
    ("estimate", "Tell the memory and disk that a build and a session will need.", estimate),
    ("doctor", "Show what this machine has, what it can do, and how to close gaps.", doctor),
    ("train", "Train or fine-tune a model with pruning inside the vision transformer.", train),
    ("eval", "Measure the accuracy of a bundle or a checkpoint by prune ratio and selector.", eval),
)
"""Verb, summary, and the module with its `options` and `run`."""

_PIP_NAME = {
    "torch": "'stts-export[train]'",
    "safetensors": "'stts-export[train]'",
    "yaml": "'stts-export[train]'",
    "onnx": "'stts-export[export]'",
    "onnxscript": "'stts-export[export]'",
    "onnx_ir": "'stts-export[export]'",
    "onnxruntime": "'stts-export[cpu]'",
    "modelopt": "'stts-export[quantize]'",
    "matplotlib": "'stts-export[quantize]'",
    "prometheus_client": "'stts-export[metrics]'",
    "tensorrt_rtx": "'stts-export[trt-rtx]'",
    "tensorrt": "'stts-export[trt]'",
    "cuda": "'stts-export[trt]'",
    "transformers": "transformers",
}
"""What to install for packages that only some verbs need."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 done, 1 bad input or nobody to tell, 3 verification failed, 4 something is not installed,
        130 interrupted, 143 terminated; 2 (usage) is argparse's own exit.
    """
    if sys.stderr is None:  # it was closed: `print` would take stdout in its place
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the end
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is no reason to lose an answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if arguments.verbose else logging.WARNING,
        format="%(levelname)s: %(message)s",
    )
    code = _code(arguments)
    _is_written(sys.stderr)
    return code if _is_written(sys.stdout) else code or 1


def _code(arguments: argparse.Namespace) -> int:
    try:
        with _known_packages(arguments.verb):
            code: int = arguments.run(arguments)
            return code
    except SttsError as error:
        say(f"error: {error}")
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the next one would end Python in its midst
        say("interrupted")
        return 130


def _is_written(stream: TextIO | None) -> bool:
    """Write what is held back; where that fails it goes nowhere: Python would try, and complain."""
    if stream is None:
        return True
    try:
        stream.flush()
    except OSError:
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        return False
    return True


@contextmanager
def _known_packages(verb: str) -> Iterator[None]:
    """Say how to install one of our optional packages when it is missing."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package == "fcntl":
            raise MissingDependencyError(
                "writes folders with locks of a POSIX system, which this one is not",
                where=verb,
                fix="run it on Linux (on Windows in WSL), and copy what it writes",
            ) from None
        if package not in _PIP_NAME:
            raise
        raise MissingDependencyError(
            f"needs the package {package}: {error}",
            where=verb,
            fix=f"pip install {_PIP_NAME[package]}",
        ) from None


class _Parser(argparse.ArgumentParser):
    """Repeats no password: what is wrong may be an address."""

    _words: Sequence[str] = ()

    # As in argparse, whose types are overloads.
    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from stts_export.live.sources.redaction import redacted_message

        super().error(redacted_message(message, self._words))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="stts-export",
        description="Token-pruned video language models on real devices.",
    )
    parser.add_argument("--version", action="version", version=f"stts-export {__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", required=True, metavar="VERB")
    for name, summary, module in _VERBS:
        verb = verbs.add_parser(name, help=summary, description=summary)
        module.options(verb)
        verb.add_argument("-v", "--verbose", action="store_true", help="log what happens")
        verb.set_defaults(run=module.run)
    return parser
