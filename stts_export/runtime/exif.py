"""The orientation that a camera noted in an image file."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_ORIENTATION = 0x0112
_MIRRORED = (2, 4, 5, 7)
_EXIF = b"Exif\0\0"


def is_mirrored(content: bytes) -> bool:
    """Say whether an image file is to be shown mirrored, beside any turn.

    Args:
        content: of a JPEG, PNG, WebP or TIFF file; False for others, and where EXIF is damaged.
    """
    try:
        return any(_orientation(tiff) in _MIRRORED for tiff in _blocks(content))
    except (struct.error, IndexError):
        return False


def _blocks(content: bytes) -> Iterator[bytes]:
    """Yield EXIF data, which has the form of a TIFF file."""
    if content[:4] in (b"II*\0", b"MM\0*"):
        yield content
    elif content.startswith(b"\xff\xd8"):
        yield from (
            data.removeprefix(_EXIF)
            for marker, data in _jpeg_segments(content)
            if marker == 0xE1 and data.startswith(_EXIF)
        )
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        yield from _chunks(content, 8, ">I4s", b"eXIf", trailer=4)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        for data in _chunks(content, 12, "<4sI", b"EXIF", trailer=0):
            yield data.removeprefix(_EXIF)


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 2
    while content[at] == 0xFF and content[at + 1] != 0xDA:  # until the picture itself
        (length,) = struct.unpack_from(">H", content, at + 2)
        yield content[at + 1], content[at + 4 : at + 2 + length]
        at += 2 + length


def _chunks(content: bytes, at: int, header: str, wanted: bytes, trailer: int) -> Iterator[bytes]:
    while at < len(content):
        first, second = struct.unpack_from(header, content, at)
        name, length = (first, second) if isinstance(first, bytes) else (second, first)
        if name == wanted:
            yield content[at + 8 : at + 8 + length]
        at += 8 + length + (trailer or length % 2)  # RIFF pads to even sizes


def _orientation(tiff: bytes) -> int:
    order = "<" if tiff.startswith(b"II") else ">"
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    for number in range(entries):
        at = directory + 2 + 12 * number
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, at)
        if tag == _ORIENTATION:
            return int(value)
    return 1
