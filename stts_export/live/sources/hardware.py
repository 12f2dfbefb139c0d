"""The decoder of a GPU, and the CPU's where there is none."""

from __future__ import annotations

import av
from av.codec.context import CodecContext
from av.codec.hwaccel import HWAccel
from av.video.stream import VideoStream

from stts_export.errors import MissingDependencyError
from stts_export.live.sources.base import Reporter
from stts_export.live.sources.options import Decoder

_TRIED = "h264"
"""Codec with which the GPU is tried; every GPU that decodes at all decodes it."""


class HardwareDecoder:
    """Decides once per run of a source whether the GPU decodes; used by network sources only.

    Frames are copied to the CPU's memory, where they are resized.

    Args:
        decoder: "cuda" insists on the GPU.
        report: told once when "auto" decodes on the CPU.
    """

    def __init__(self, decoder: Decoder, report: Reporter) -> None:
        self._decoder = decoder
        self._report = report
        self._told = False
        self._missing: str | None = None
        if decoder != "software":
            self._missing = _missing()

    def acceleration(self, where: str) -> HWAccel | None:
        """Return what `av.open` is to be given.

        Raises:
            MissingDependencyError: the GPU's decoder is insisted on and cannot be used.
        """
        if self._decoder == "software":
            return None
        if self._missing is None:
            return HWAccel("cuda", allow_software_fallback=self._decoder == "auto")
        if self._decoder == "cuda":
            raise unusable(where, self._missing)
        self._tell(self._missing)
        return None

    def check(self, stream: VideoStream, where: str) -> None:
        """See what decodes a stream that was opened.

        Raises:
            MissingDependencyError: the GPU's decoder is insisted on and does not take its codec.
        """
        if self._missing is not None or self._decoder == "software":
            return
        if not stream.codec_context.is_hwaccel:
            reason = f"it does not decode {stream.codec_context.name}"
            if self._decoder == "cuda":
                raise unusable(where, reason)
            self._tell(reason)

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            self._report.notice(
                "software-decoding", f"the CPU decodes, as the GPU's decoder cannot: {reason}"
            )


def _missing() -> str | None:
    """Why the GPU's decoder cannot be used; None when it can."""
    try:
        CodecContext.create(_TRIED, "r", HWAccel("cuda"))
    except (av.FFmpegError, OSError) as error:
        return f"no NVIDIA GPU or driver with a video decoder is found ({error.strerror})"
    except NotImplementedError:
        return "PyAV's FFmpeg is built without it"
    return None


def unusable(where: str, reason: str) -> MissingDependencyError:
    """An error for a GPU that was insisted on."""
    return MissingDependencyError(
        f"the GPU's video decoder cannot be used: {reason}",
        where=where,
        allowed="decoder cuda where FFmpeg finds an NVIDIA GPU with NVDEC and its driver",
        fix="decoder software or auto; on Jetson decode with GStreamer: "
        "gst:rtspsrc location=... ! rtph264depay ! h264parse ! nvv4l2decoder ! nvvidconv",
    )
