"""What several verbs share."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from stts_export.progress import Progress

Arguments = argparse.Namespace
Report = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

_UNITS = {
    "read": "frames",
    "vision_lower": "frames",
    "vision_upper": "windows",
    "decode": "tokens",
    "overlay": "frames",
}
"""What is counted in the stages of `run`; percent in the engines of `build`."""


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
                bars[stage] = Progress(stage, total, _UNITS.get(stage, "%"), started=began)
                shown.enter_context(bars[stage])
            bars[stage].update(done)
            if done == total:
                began = time.monotonic()

        yield report


def backend_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--backend",
        help="onnxruntime, tensorrt or tensorrt-rtx; the first the bundle was built for if absent",
    )
    verb.add_argument(
        "--plugin", type=Path, metavar="FILE",
        help="libstts_plugins.so, for tensorrt; found as by build if absent",
    )  # fmt: skip
