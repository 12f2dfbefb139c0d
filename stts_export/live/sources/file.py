"""A video file as a source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Event

from stts_export.errors import InputError
from stts_export.live.sources.base import Arrival, Reporter
from stts_export.live.sources.frames import Damage, Extent, FrameSize, Shown, arrival
from stts_export.live.sources.options import SourceOptions, refuse_cuda
from stts_export.live.sources.pacing import paced
from stts_export.runtime.demux import VideoFile


class FileSource:
    """All frames of a file in the order of display, decoded by the CPU.

    Args:
        path: a video file.
        options: `realtime` lets the file play as a camera would send it.

    Raises:
        InputError: as `VideoFile`, or the file is a still image, or the GPU is to decode it.
    """

    def __init__(self, path: Path, options: SourceOptions) -> None:
        self.name = str(path)
        self.is_live = options.realtime
        refuse_cuda(options, self.name, "files are decoded by the CPU")
        self._file = VideoFile(path)
        if self._file.is_image:
            raise InputError(
                "is a still image",
                where=str(path),
                allowed="a video, or a folder of images",
                fix="put it into a folder, or ask about it with stts-export run",
            )

    def arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        """Yield the frames; a file that is cut off ends with a notice.

        Args:
            stop: when set, the iterator ends.
            report: gets a notice about the first packet that cannot be decoded, and their count.

        Raises:
            InputError: no frame can be decoded.
        """
        arrivals = self._arrivals(stop, report)
        return paced(arrivals, stop) if self.is_live else arrivals

    def _arrivals(self, stop: Event, report: Reporter) -> Iterator[Arrival]:
        damage, size = Damage(report), FrameSize(report)
        extent = Extent()
        for frame in self._file.decode(damage.found):
            if stop.is_set():
                return
            size.seen(frame)
            shown = Shown.of(frame, self._file.time_base)
            yield arrival(frame, shown, is_first=extent.frames == 0)
            extent.add(shown)
        try:
            self._file.check_decoded(extent.frames, extent.first, extent.end)
        except InputError as error:
            if extent.frames == 0:
                raise
            report.notice("damaged", error.message)
