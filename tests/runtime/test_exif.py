from __future__ import annotations

import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest

from stts_export.runtime.exif import is_mirrored
from stts_export.runtime.video import read_video

# By orientation: how the stored picture is turned upright.
UPRIGHT = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.transpose(1, 0, 2),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: picture[::-1, ::-1].transpose(1, 0, 2),
    8: lambda picture: np.rot90(picture),
}


def _tiff(orientation: int, order: str = "<") -> bytes:
    """The smallest EXIF data: a byte order and one entry after another that does not matter."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHIHH", 0x0100, 3, 1, 9, 0)
    entries += struct.pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return head + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)


def _picture() -> np.ndarray:
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :24], picture[:16, 24:], picture[16:, 24:] = 50, 120, 240
    return picture


def _encode(path: Path, codec: str, pixels: str) -> bytes:
    with av.open(str(path), "w", format="image2") as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        stream.options = {"qmin": "1", "qmax": "1"} if codec == "mjpeg" else {}
        frame = av.VideoFrame.from_ndarray(_picture(), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def _jpeg(folder: Path, orientation: int) -> Path:
    path = folder / "image.jpg"
    content = _encode(path, "mjpeg", "yuvj444p")
    data = b"Exif\0\0" + _tiff(orientation, ">")
    segment = b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data
    path.write_bytes(content[:2] + segment + content[2:])
    return path


def _png(folder: Path, orientation: int) -> Path:
    path = folder / "image.png"
    content = _encode(path, "png", "rgb24")
    data = b"eXIf" + _tiff(orientation)
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(content[:33] + chunk + content[33:])
    return path


@pytest.mark.parametrize("write", [_png, _jpeg])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_shown_as_the_camera_was_held(tmp_path, write, orientation):
    clip = read_video(write(tmp_path, orientation), max_frames=1)
    upright = UPRIGHT[orientation](_picture())
    assert clip.is_image
    assert clip.frames.shape == (1, *upright.shape)
    assert np.abs(clip.frames[0].astype(int) - upright).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_webp_and_tiff(orientation, order):
    tiff = _tiff(orientation, order)
    mirrored = orientation in (2, 4, 5, 7)
    assert is_mirrored(tiff) == mirrored
    for data in (tiff, b"Exif\0\0" + tiff):
        odd = b"VP8 " + struct.pack("<I", 3) + b"abc\0"
        exif = b"EXIF" + struct.pack("<I", len(data)) + data
        assert is_mirrored(b"RIFF" + bytes(4) + b"WEBP" + odd + exif) == mirrored


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 12, 20, 30, 40])
def test_damaged_files_are_not_mirrored(tmp_path, keep):
    for path in (_png(tmp_path, 2), _jpeg(tmp_path, 2)):
        assert not is_mirrored(path.read_bytes()[:keep])


def test_other_files_are_not_mirrored():
    for content in (b"", b"\0" * 100, b"RIFF1234WAVEfmt ", b"GIF89a", b"\xff\xd8", _tiff(2)[:9]):
        assert not is_mirrored(content)
