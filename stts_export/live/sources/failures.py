"""Why a source cannot be opened or was lost, in words that hold nothing secret.

FFmpeg's own texts name the address with its password, so none of them is passed on.
"""

from __future__ import annotations

import errno
import os

import av
import av.error

from stts_export.errors import InputError


class LostError(Exception):
    """A source that was lost, or does not answer, and may come back.

    Args:
        reason: in words.
        seconds: how long this try waited, where it waited in vain.
    """

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        self.reason = reason
        super().__init__(reason if seconds is None else f"{reason} for {seconds:.3g} s")


class UnusableError(Exception):
    """What a source sends is of no use, though it may be another time.

    Args:
        error: why; raised when the source never sent anything else.
    """

    def __init__(self, error: InputError) -> None:
        self.error = error
        super().__init__(error.message)


_PASSWORD_FIX = (
    "check user and password in the address, as rtsp://USER:PASSWORD@HOST/PATH; of those "
    "characters @ : / ? # % in them write %40 %3A %2F %3F %23 %25"
)


_FIND_DEVICE = "list what there is: ls /dev/video*"
_NO_CAMERA = "is not a camera that gives frames"
_DEVICE_ERRORS = {
    errno.ENOENT: ("there is no such device", _FIND_DEVICE),
    errno.ENODEV: (_NO_CAMERA, _FIND_DEVICE),
    errno.ENXIO: (_NO_CAMERA, _FIND_DEVICE),
    errno.ENOTTY: (_NO_CAMERA, _FIND_DEVICE),
    errno.EINVAL: (_NO_CAMERA, _FIND_DEVICE),
    errno.EACCES: (
        "this user may not open the device",
        "add the user to the group of the device: sudo usermod -aG video $USER, and log in again",
    ),
    errno.EBUSY: ("another program uses the device", "close it"),
}


def denied(where: str) -> InputError:
    """An error for wrong or missing credentials."""
    return InputError("user and password are missing or wrong", where=where, fix=_PASSWORD_FIX)


def of_network(error: Exception, where: str, seconds: float) -> Exception:
    """Translate an error of FFmpeg with an address.

    Args:
        error: from opening or reading.
        where: name of the source.
        seconds: how long was waited at most.

    Returns:
        `LostError`, `UnusableError`, or an `InputError` that trying again cannot help.
    """
    if isinstance(error, (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)):
        return denied(where)
    if isinstance(error, av.error.HTTPNotFoundError):
        return UnusableError(
            InputError(
                "the server has nothing at this path (404)",
                where=where,
                fix="check the path of the address; cameras list it in their manual",
            )
        )
    if isinstance(error, av.error.HTTPClientError):
        return UnusableError(
            InputError(
                "the server refuses the request",
                where=where,
                fix="check the address, and for RTSP try the other transport, tcp or udp",
            )
        )
    if isinstance(error, (av.error.ExitError, av.error.TimeoutError)):
        return LostError("nothing came", seconds)
    return _system_failure(error, where)


def of_device(error: Exception, where: str) -> Exception:
    """Translate an error of FFmpeg with a camera; `UnusableError` or `LostError`."""
    number = getattr(error, "errno", None) or 0
    if number not in _DEVICE_ERRORS:
        return LostError(_text(number))
    message, fix = _DEVICE_ERRORS[number]
    return UnusableError(InputError(message, where=where, fix=fix))


def _system_failure(error: Exception, where: str) -> Exception:
    number = getattr(error, "errno", None) or 0
    if isinstance(error, (av.error.ProtocolNotFoundError, av.error.DemuxerNotFoundError)):
        return UnusableError(
            InputError(
                "it leads to an address or a format that may not be read from here",
                where=where,
                allowed="rtsp, rtsps, http, https, udp",
            )
        )
    if isinstance(error, av.error.HTTPServerError):
        return LostError("the server reports an error of its own (5xx)")
    if isinstance(error, av.error.InvalidDataError):
        return UnusableError(not_a_video(where))
    if isinstance(error, av.error.EOFError):
        return LostError("the connection was closed")
    if number == errno.EIO:
        return LostError("the connection failed")
    return LostError(_text(number))


def _text(number: int) -> str:
    """Describe an error of the operating system; FFmpeg's own have other numbers."""
    return os.strerror(number).lower() if number in errno.errorcode else "reading failed"


def not_a_video(where: str) -> InputError:
    """An error for something that FFmpeg cannot read."""
    return InputError(
        "is not a video", where=where, allowed="a stream or file that FFmpeg can read"
    )


def no_video_stream(where: str, kinds: str) -> InputError:
    """An error for a source that sends something else."""
    return InputError(
        f"has no video stream, only {kinds or 'nothing'}", where=where, allowed="a video"
    )


def unsupported_codec(where: str) -> InputError:
    """An error for a stream that nothing here decodes."""
    return InputError(
        "the video's codec is not supported",
        where=where,
        allowed="what FFmpeg decodes, such as H.264, HEVC, VP9 or AV1",
        fix="set another codec in the camera or server",
    )


def still_image(where: str) -> InputError:
    """An error for an address that leads to one image."""
    return InputError(
        "is a still image",
        where=where,
        allowed="a video",
        fix="for a camera use the address of its stream, not of its snapshot",
    )
