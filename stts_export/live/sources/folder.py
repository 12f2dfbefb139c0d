"""A folder of images as a source."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Event

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError
from stts_export.live.sources.base import Arrival, Reporter
from stts_export.live.sources.options import SourceOptions, refuse_cuda
from stts_export.live.sources.pacing import paced
from stts_export.runtime.video import read_video

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")


class FolderSource:
    """The images of a folder, sorted by name with numbers in the order of counting.

    Image number n, from 0, has the time n / `folder_fps`; one that is broken leaves a gap.

    Args:
        path: the folder; what is in folders below it is not read.
        options: `folder_fps`, and `realtime`.

    Raises:
        InputError: there is no image in it, or the GPU is to decode them.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.name = str(path)
        self.is_live = options.realtime
        refuse_cuda(options, self.name, "images are decoded by the CPU")
        self._fps = options.folder_fps
        self._images = sorted(filter(_is_image, path.iterdir()), key=_natural)
        if not self._images:
            raise InputError(
                "there is no image in the folder",
                where=self.name,
                allowed=f"images whose names end in {', '.join(_SUFFIXES)}",
            )

    def arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        """Yield the images; each that cannot be read is counted as damaged and left out.

        Args:
            stop: when set, the iterator ends.
            report: gets a notice about each image that is left out.

        Raises:
            InputError: none of them can be read.
        """
        arrivals = self._arrivals(stop, report)
        return paced(arrivals, stop) if self.is_live else arrivals

    def _arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        is_first = True
        for number, path in enumerate(self._images):
            if stop.is_set():
                return
            try:
                image = _pixels(path)
            except InputError as error:
                report.count(damaged=1)
                report.notice("damaged", f"{path.name} is left out: {error.message}")
                continue
            pixels = partial(np.asarray, image)
            yield Arrival(number / self._fps, 1 / self._fps, is_first, pixels)
            is_first = False
        if is_first:
            raise InputError(
                f"none of the {len(self._images)} images in the folder can be read",
                where=self.name,
                fix="copy or download them again",
            )


def _pixels(path: Path) -> NDArray[np.uint8]:
    frames = read_video(path, max_frames=1).frames
    return frames.reshape(frames.shape[1:])


def _is_image(path: Path) -> bool:
    is_hidden = path.name.startswith(".")
    return path.suffix.lower() in _SUFFIXES and not is_hidden and path.is_file()


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Key by which 2 comes before 10; the name itself decides between 1 and 01."""
    parts = re.split(r"(\d+)", path.name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
