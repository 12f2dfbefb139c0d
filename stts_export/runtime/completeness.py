"""Whether a video file holds all that it says it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stts_export.errors import InputError

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


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
