"""What several verbs share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stts_export.errors import InputError
from stts_export.progress import WRITING, Progress

if TYPE_CHECKING:
    from stts_export.runtime.logits import Sampling

Arguments = argparse.Namespace
Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_UNITS = {
    "clips": "clips",
    "statistics of clips": "clips",
    "scales of layers": "layers",
    "held-out clips": "clips",
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
                del bars[stage]  # it may come again

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


def generation_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--temperature", type=float,
        help="0 (default) takes the most likely token; above 0 draws, 1 as the model says",
    )  # fmt: skip
    verb.add_argument("--top-k", type=int, metavar="N", help="draw from the N most likely tokens")
    verb.add_argument(
        "--top-p", type=float, metavar="P",
        help="draw from the most likely tokens that have P together",
    )  # fmt: skip
    verb.add_argument(
        "--repetition-penalty", type=float, metavar="R",
        help="above 1 makes tokens of prompt and answer less likely",
    )  # fmt: skip
    verb.add_argument("--seed", type=int, help="draw the same again")
    verb.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end the answer before this text (repeatable)",
    )  # fmt: skip


def sampling_of(arguments: Arguments) -> Sampling:
    from stts_export.runtime.logits import Sampling

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("top_k", "top_p", "seed"):
        if name in given and "temperature" not in given:
            raise InputError(
                f"{given[name]} is of no use: the most likely token is taken",
                where=f"--{name.replace('_', '-')}",
                fix="add a temperature, such as --temperature 0.7",
            )
    return Sampling(**given)


def overlay_files(output: Path | None, sources: Sequence[str | Path]) -> list[Path]:
    """Name each source's picture; none without an output.

    Raises:
        InputError: one cannot be written, or is a source.
    """
    if output is None:
        return []
    from stts_export.runtime.writing import check_not_source, check_writable

    names = [output]
    if len(sources) > 1:
        numbers = range(1, len(sources) + 1)
        names = [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in numbers]
    for name in names:
        check_writable(name, (".mp4", ".png"))
        for path in (name, name.with_suffix(".png")):
            check_writable(path, (path.suffix.lower(),))
            for source in sources:
                check_not_source(path, source)
    return names
