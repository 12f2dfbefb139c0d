"""What several verbs share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stts_export.errors import InputError
from stts_export.progress import WRITING, Progress

Arguments = argparse.Namespace
Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_UNITS = {
    "read": "frames",
    "vision_lower": "frames",
    "vision_upper": "windows",
    "image": "crops",
    "decode": "tokens",
    "overlay": "frames",
}
"""What is counted in the stages of `run`; percent in the engines of `build`."""


def _unit(stage: str) -> str:
    return "tensors" if stage.startswith(WRITING) else _UNITS.get(stage, "%")


@contextmanager
def stages() -> Iterator[Report]:
    """Yield what draws one progress bar per stage, each ended before the next begins."""
    with ExitStack() as shown:
        bars: dict[str, Progress] = {}
        began = time.monotonic()

        def report(stage: str, done: int, total: int) -> None:
            nonlocal began
            if stage not in bars:
                if done == 0:  # it says when it begins
                    began = time.monotonic()
                shown.close()
                bars[stage] = Progress(stage, total, _unit(stage), started=began)
                shown.enter_context(bars[stage])
            bars[stage].update(done)
            if done == total:
                began = time.monotonic()

        yield report


def path_or_name(text: str) -> str:
    """Keep a checkpoint's name as it was typed: a `Path` has lost the "./" that says it is one."""
    if not text:
        raise argparse.ArgumentTypeError("empty; pass a folder or a name on the hub")
    return text


def checkpoint_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--revision", help="branch, tag or commit of a checkpoint on the hub; main if absent"
    )
    verb.add_argument(
        "--tokenizer", type=path_or_name, metavar="FOLDER",
        help="folder or name on the hub with the tokenizer files, for checkpoints without them",
    )  # fmt: skip


def size_in_bytes(text: str, option: str) -> int:
    """Bytes of a size in GiB, or with a suffix K, M or G."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, suffix = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "G")
    try:
        size = int(float(number) * scale[suffix])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise InputError(
            f"size {text!r}", where=option, allowed="GiB, or with a suffix, as 4G or 512M"
        )
    return size


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def backend_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--backend",
        help="onnxruntime, tensorrt or tensorrt-rtx; the first the bundle was built for if absent",
    )
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so, for tensorrt; found as by build if absent",
    )  # fmt: skip
