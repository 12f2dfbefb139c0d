"""Where live video comes from: files, folders of images, networks, cameras, GStreamer."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from stts_export.errors import InputError, did_you_mean
from stts_export.live.sources.base import Arrival, Reporter, Source
from stts_export.live.sources.file import FileSource
from stts_export.live.sources.folder import FolderSource
from stts_export.live.sources.gstreamer import GStreamerSource
from stts_export.live.sources.network import SCHEMES, DeviceSource, NetworkSource
from stts_export.live.sources.options import Decoder, SourceOptions, Transport
from stts_export.live.sources.redaction import redacted

__all__ = [
    "Arrival",
    "Decoder",
    "DeviceSource",
    "FileSource",
    "FolderSource",
    "GStreamerSource",
    "NetworkSource",
    "Reporter",
    "Source",
    "SourceOptions",
    "Transport",
    "open_source",
]

_GSTREAMER = "gst:"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DEVICE = re.compile(r"/dev/video\d+|/dev/v4l/.+")
_ALLOWED = (
    "a video file, a folder of images, an address such as rtsp://HOST/PATH, /dev/video0, or "
    "gst:PIPELINE"
)
_SHOWN = 200
"""Characters of a source that an error shows."""


def open_source(spec: str | Path, options: SourceOptions | None = None) -> Source:
    """Find out what a source is and check what can be checked without waiting.

    Args:
        spec: a video file, a folder of images, an address (rtsp, rtsps, http, https, udp), a
            camera (/dev/video0), or "gst:" and a GStreamer pipeline.
        options: how it is read.

    Raises:
        InputError: there is no such file, folder or device, it holds no video, the scheme or the
            port of the address is none, or it is no text at all.
        MissingDependencyError: GStreamer's tools are not installed.
    """
    options = options or SourceOptions()
    given: object = spec
    if not isinstance(given, (str, Path)):
        message = f"the source is of type {type(given).__name__}"
        raise InputError(message, where="source", allowed=_ALLOWED)
    text = str(spec)
    if not text.strip():
        raise InputError("the source is empty", where="source", allowed=_ALLOWED)
    if isinstance(spec, str):
        if text.startswith(_GSTREAMER):
            return GStreamerSource(text.removeprefix(_GSTREAMER), options)
        scheme = _SCHEME.match(text)
        if scheme:
            return _network(text, scheme[1].lower(), options)
    if _DEVICE.fullmatch(text):
        return _device(Path(text), options)
    kind = _kind(text)
    if stat.S_ISDIR(kind):
        return FolderSource(Path(spec), options)
    if not stat.S_ISREG(kind):
        raise InputError("is no file, folder or camera", where=text, allowed=_ALLOWED)
    return FileSource(Path(spec), options)


def _kind(text: str) -> int:
    """Mode of what a path leads to."""
    try:
        return os.stat(text).st_mode
    except (FileNotFoundError, NotADirectoryError):
        message = "there is no such file or folder"
    except OSError as error:
        message = f"cannot be opened: {(error.strerror or 'unknown error').lower()}"
    except ValueError:  # a zero byte
        message = "is no name of a file"
    shown = redacted(text)
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
    raise InputError(message, where=shown, allowed=_ALLOWED)


def _network(url: str, scheme: str, options: SourceOptions) -> NetworkSource:
    if scheme not in SCHEMES:
        raise InputError(
            f"the scheme {scheme!r} is not known{did_you_mean(scheme, SCHEMES)}",
            where=redacted(url),
            allowed=", ".join(SCHEMES),
            fix="give a file by its path" if scheme == "file" else None,
        )
    return NetworkSource(url, options)


def _device(path: Path, options: SourceOptions) -> DeviceSource:
    fix = "list what there is: ls /dev/video*"
    if not path.exists():
        raise InputError("there is no such device", where=redacted(str(path)), fix=fix)
    if not path.is_char_device():
        raise InputError("is not a device", where=str(path), fix=fix)
    return DeviceSource(str(path), options)
