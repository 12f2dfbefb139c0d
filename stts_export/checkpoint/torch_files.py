"""Tensors in what `torch.save` writes, found without torch.load: where each one's bytes lie.

Such a file is a zip archive, stored and not compressed, of one pickle and one entry per storage.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from stts_export.checkpoint.unpickling import DICT, MAX_BYTES, SHAPE, records_from_pickle, shown
from stts_export.errors import InputError

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and the lengths of the name and the extra field, of an entry of a zip archive."""
# What damaged archives raise, from the standard library and from here.
_DAMAGE = (
    OSError, zipfile.BadZipFile, struct.error, ValueError, TypeError, LookupError, OverflowError,
    RuntimeError, EOFError,
)  # fmt: skip
_ENCRYPTED = 1
_MAPPED_BYTES = 2**20
"""Smaller storages are read: a mapping costs a file descriptor."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] = field(repr=False)
    offset: int
    """Of its first value in the storage, in values."""
    start: int
    """Of the storage in the file, in bytes."""
    values: int
    """Of the storage."""

    def load(self) -> torch.Tensor:
        """Return the tensor, in mapped memory where it is large and aligned."""
        size = self.values * self.dtype.itemsize
        if size >= _MAPPED_BYTES and self.start % self.dtype.itemsize == 0:
            # Copy on write, so that a tensor may be changed and the file is not.
            mapped = np.memmap(self.file, np.uint8, "c", offset=self.start, shape=(size,))
            storage = torch.from_numpy(mapped)
        else:
            storage = torch.empty(size, dtype=torch.uint8)
            with self.file.open("rb") as opened:
                opened.seek(self.start)
                if opened.readinto(storage.numpy().data) != size:
                    raise _damaged(self.file, "it ends too early")
        return storage.view(self.dtype).as_strided(self.shape, self.stride, self.offset)


def saved_object(file: Path, start: int = 0, length: int | None = None) -> Any:
    """Read what `torch.save` wrote, with a `TensorPlace` for every tensor.

    Args:
        file: that holds it.
        start: in the file, in bytes.
        length: in bytes; up to the end of the file when None.

    Raises:
        InputError: it is no such file, is damaged, or names foreign classes.
    """
    try:
        with file.open("rb") as opened:
            end = opened.seek(0, io.SEEK_END) if length is None else start + length
            return _read(file, _Window(opened, start, end))
    except FileNotFoundError:
        raise InputError(
            "no such file", where=str(file), fix="copy all files of the checkpoint"
        ) from None
    except _DAMAGE as error:
        raise _damaged(file, str(error)) from None


def _read(file: Path, window: _Window) -> Any:
    with zipfile.ZipFile(window) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise zipfile.BadZipFile("no data.pkl in it")
    root = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{root}byteorder")
    if order is not None and _content(window, order) != b"little":
        raise InputError("was written on a big-endian machine", where=str(file))
    data = _content(window, entries[pickles[0]])

    def storage(pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(values)):
                info = entries[f"{root}data/{key}"]
            case _:
                raise ValueError(f"{shown(pid)} is no storage")
        if info.file_size != values * dtype.itemsize:
            raise ValueError(f"storage {key} has {info.file_size} bytes")
        return _Storage(dtype, window.start + _data_start(window, info), values)

    def tensor(
        stored: _Storage, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any,
        metadata: Any = None,
    ) -> TensorPlace:  # fmt: skip
        if metadata:  # a tensor that stands for the negative or the conjugate of its values
            raise ValueError(f"a tensor with {shown(metadata)}")
        return _place(file, stored, offset, shape, stride)

    def parameter(data: TensorPlace, grad: Any, hooks: Any) -> TensorPlace:
        return data

    known: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("collections", "OrderedDict"): DICT,
        ("torch", "Size"): SHAPE,
    }
    known |= {("torch", name): dtype for name, dtype in _STORAGES.items()}
    return records_from_pickle(data, known, file, storage)


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    start: int
    values: int


def _place(file: Path, stored: Any, offset: Any, shape: Any, stride: Any) -> TensorPlace:
    if not isinstance(stored, _Storage):
        raise TypeError(f"a tensor in {shown(stored)}")
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError(f"no tensor has shape {shown(shape)} and strides {shown(stride)}")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
        raise ValueError(f"no tensor has shape {shown(shape)} and strides {shown(stride)}")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # Strides of 0 would make any number of values of one.
    if math.prod(shape) and (last >= stored.values or math.prod(shape) > stored.values):
        raise ValueError(f"a tensor of shape {shown(shape)} ends outside its storage")
    return TensorPlace(file, stored.dtype, shape, stride, offset, stored.start, stored.values)


def _content(window: _Window, info: zipfile.ZipInfo) -> bytes:
    """Read a small entry."""
    if info.file_size > MAX_BYTES:
        raise zipfile.BadZipFile(f"{info.filename} has {info.file_size} bytes")
    window.seek(_data_start(window, info))
    data = window.read(info.file_size)
    if zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"{info.filename} has another checksum")
    return data


def _data_start(window: _Window, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin; the local header's extra field aligns them."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} is compressed")
    if info.flag_bits & _ENCRYPTED:
        raise zipfile.BadZipFile(f"{info.filename} is encrypted")
    window.seek(info.header_offset)
    signature, name, extra = _LOCAL_HEADER.unpack(window.read(_LOCAL_HEADER.size))
    start: int = info.header_offset + _LOCAL_HEADER.size + name + extra
    if signature != b"PK\3\4" or start + info.file_size > window.seek(0, io.SEEK_END):
        raise zipfile.BadZipFile("an entry lies outside the file")
    return start


class _Window(io.RawIOBase):
    """A part of a file that looks like a file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file = file
        self.start = start
        self._size = end - start
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        if self._at < 0:
            raise ValueError("before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._size - self._at, 0)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self.start + self._at)
        data = self._file.read(size)
        self._at += len(data)
        return data


def _damaged(file: Path, problem: str) -> InputError:
    return InputError(
        f"cannot be read: {problem}",
        where=str(file),
        allowed="a file in the zip format of torch.save, whole",
        fix="the file is truncated or damaged: copy it again",
    )
