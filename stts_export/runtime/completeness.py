"""Whether a video file holds all that it says it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stts_export.errors import InputError

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_GIF = (b"GIF87a", b"GIF89a")
_GIF_PICTURE, _GIF_END = 0x2C, 0x3B
_JPEG, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_SCAN = 0xDA


@dataclass(frozen=True)
class Statement:
    """What the head of a file says about its video stream; 0 where it says nothing."""

    frames: int
    seconds: float
    """Duration of the stream."""
    file_seconds: float
    """Duration of the longest stream."""


def check_complete(
    path: Path,
    stated: Statement,
    *,
    frames: int,
    seconds: float,
    file_seconds: float,
) -> None:
    """Refuse a file that ends well before its stated duration.

    Args:
        path: the file.
        stated: what its head says.
        frames: frames found in the video stream.
        seconds: from the start of the first frame to the end of the last.
        file_seconds: end of the last packet of any stream.

    Raises:
        InputError: the file is cut off; says how much of it can be read.
    """
    frame = seconds / frames
    if stated.seconds:
        whole, readable = stated.seconds, seconds
        missing = whole - readable
        # Some cameras state a few frames more than they write.
        cut = missing > max(2 * frame, 0.02 * whole)
        cut |= frames < stated.frames and missing > 1.5 * frame
    else:
        whole, readable = stated.file_seconds, file_seconds
        missing = whole - readable
        ends_early = matroska_ends_early(path)
        # Matroska may count a long last frame whose length is not in its packet.
        cut = missing > max(0.5, 0.05 * whole) if ends_early is None else ends_early
        cut &= missing > 1.5 * frame
    if cut:
        raise InputError(
            f"the file is cut off: {readable:.1f} of {whole:.1f} s can be read",
            where=str(path),
            fix="copy or download it again, or make a shorter video of what is left: "
            f"ffmpeg -i {path.name} -c copy OUT{path.suffix}",
        )


def check_picture(path: Path) -> None:
    """Refuse a JPEG or GIF file that ends before its last mark.

    FFmpeg's decoders fill up what is missing; those of other formats report it.

    Raises:
        InputError: the file is cut off.
    """
    content = path.read_bytes()
    try:
        ends = _gif_ends(content) and _jpeg_ends(content)
    except IndexError:
        ends = False
    if not ends:
        raise InputError("the picture is cut off", where=str(path), fix="copy or download it again")


def _gif_ends(content: bytes) -> bool:
    """Whether the blocks of a GIF file go on to its end mark; True for other files."""
    if not content.startswith(_GIF):
        return True
    at = 13 + _colours(content[10])
    while content[at] != _GIF_END:
        at += 10 + _colours(content[at + 9]) + 1 if content[at] == _GIF_PICTURE else 2
        while content[at]:  # pieces of data, the last one empty
            at += 1 + content[at]
        at += 1
    return True


def _colours(flags: int) -> int:
    """Bytes of the table of colours that comes next."""
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _jpeg_ends(content: bytes) -> bool:
    """Whether a JPEG file has an end mark after its first scan; True for other files."""
    if not content.startswith(_JPEG):
        return True
    at = len(_JPEG)
    while content[at] == 0xFF and content[at + 1] != _JPEG_SCAN:  # a preview has an end mark too
        # Fill bytes may stand before a mark.
        at += 1 if content[at + 1] == 0xFF else 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return content.find(_JPEG_END, at) >= 0


def is_mp4(path: Path) -> bool:
    """Whether a file begins like MP4 or MOV."""
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def matroska_ends_early(path: Path) -> bool | None:
    """Whether a Matroska or WebM file is shorter than its head says; None for other files."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head.startswith(_EBML):
        return None
    size, start = _element_size(head, len(_EBML))
    segment = start + size
    if head[segment : segment + 4] != _SEGMENT or len(head) < segment + 12:
        return None
    size, start = _element_size(head, segment + len(_SEGMENT))
    is_unknown = size.bit_count() % 7 == 0 and size == (1 << size.bit_length()) - 1
    return not is_unknown and start + size > path.stat().st_size


def _element_size(data: bytes, at: int) -> tuple[int, int]:
    """Decode an EBML size: (size, position after it); leading zero bits tell its length."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return value & ((1 << 7 * length) - 1), at + length
