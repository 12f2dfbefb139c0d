"""Sharded checkpoints of torch.distributed: `.metadata` and `*.distcp`, read tensor by tensor.

Only what describes tensors is read from `.metadata`; whatever else it names is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

from stts_export.checkpoint.stored import some
from stts_export.checkpoint.torch_files import TensorPlace, saved_object
from stts_export.checkpoint.unpickling import (
    IGNORED,
    MAX_BYTES,
    RECORD,
    SHAPE,
    records_from_pickle,
    shown,
)
from stts_export.errors import InputError

METADATA = ".metadata"

_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
    "TensorStorageMetadata",
)  # fmt: skip
_DTYPES = (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip


class _Properties:
    """`TensorProperties`: its state is a tuple that begins with the type of the values."""

    dtype: object

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = state[0]


_KNOWN: dict[tuple[str, str], Any] = {
    **{(_MODULE, name): RECORD for name in _RECORDS},
    (_MODULE, "TensorProperties"): _Properties,
    (_MODULE, "_MEM_FORMAT_ENCODING"): IGNORED,
    ("torch.serialization", "_get_layout"): IGNORED,
    ("torch", "Size"): SHAPE,
    **{("torch", name): getattr(torch, name) for name in _DTYPES},
    # The reference's own writer, and torch's.
    ("olmo.train.remote_filesystem", "_StorageInfo"): RECORD,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): RECORD,
    ("pathlib", "PosixPath"): IGNORED,
    ("pathlib._local", "PosixPath"): IGNORED,
}


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor in one or more pieces."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[tuple[int, ...], TensorPlace], ...]
    """(offsets, place); they cover the tensor, and none overlaps another."""

    def load(self) -> torch.Tensor:
        """Read the pieces, and nothing else."""
        if len(self.pieces) == 1:
            return self.pieces[0][1].load()
        whole = torch.empty(self.shape, dtype=self.dtype)
        for offsets, place in self.pieces:
            part = whole
            for axis, (offset, size) in enumerate(zip(offsets, place.shape, strict=True)):
                part = part.narrow(axis, offset, size)
            part.copy_(place.load())
        return whole


def sharded_tensors(folder: Path, wanted: Callable[[str], bool]) -> dict[str, ShardedTensor]:
    """List tensors and find the bytes of each; none is loaded.

    Args:
        folder: that holds `.metadata` and the shards.
        wanted: by name; of the others nothing is read but the name.

    Raises:
        InputError: a file is missing, truncated or damaged, names foreign classes, or the pieces
            of a tensor do not make it up.
    """
    file = folder / METADATA
    records = records_from_pickle(_bytes(file), _KNOWN, file)
    try:
        pieces = _pieces(records.storage_data, wanted)
        listed = {
            name: _listed(name, entry)
            for name, entry in records.state_dict_metadata.items()
            if wanted(name)
        }
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"does not describe a checkpoint: {error}",
            where=str(file),
            fix="the file is damaged: copy it again",
        ) from None
    sizes = _shard_sizes(folder, pieces)
    return {
        name: _tensor(folder, name, entry, pieces.get(name, {}), sizes)
        for name, entry in listed.items()
    }


@dataclass(frozen=True)
class _Info:
    """Where a piece lies."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class _Listed:
    """A tensor as `.metadata` describes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """(offsets, sizes), without those of no values."""


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InputError(
                f"has {file.stat().st_size} bytes", where=str(file), allowed=f"up to {MAX_BYTES}"
            )
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None


def _pieces(
    storage: dict[Any, Any], wanted: Callable[[str], bool]
) -> dict[str, dict[tuple[int, ...], _Info]]:
    """Name -> offsets of a piece -> where it lies."""
    found: dict[str, dict[tuple[int, ...], _Info]] = {}
    for index, info in storage.items():
        if not isinstance(index.fqn, str):
            raise TypeError(f"{shown(index.fqn)} is no name")
        if not wanted(index.fqn):
            continue
        if not isinstance(info.relative_path, str):
            raise TypeError(f"{shown(info.relative_path)} is no file of {index.fqn}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"{index.fqn} is stored compressed")
        place = _Info(info.relative_path, info.offset, info.length)
        if not all(type(number) is int and number >= 0 for number in (place.offset, place.length)):
            raise ValueError(
                f"{index.fqn} lies at {shown(place.offset)}, {shown(place.length)} bytes long"
            )
        offsets = _sizes(getattr(index, "offset", None) or ())
        if offsets in found.setdefault(index.fqn, {}):
            raise ValueError(f"{index.fqn} has two pieces at {offsets}")
        found[index.fqn][offsets] = place
    return found


def _listed(name: str, entry: Any) -> _Listed:
    if not hasattr(entry, "chunks"):
        raise ValueError(f"{name} is not a tensor")
    chunks = ((_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks)
    dtype = entry.properties.dtype
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{shown(dtype)} is not a type of values")
    filled = tuple((offsets, sizes) for offsets, sizes in chunks if math.prod(sizes))
    return _Listed(_sizes(entry.size), dtype, filled)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{shown(values)} is no shape")
    return values


def _shard_sizes(folder: Path, pieces: dict[str, dict[tuple[int, ...], _Info]]) -> dict[str, int]:
    """Size of every shard; all that are missing are named at once."""
    names = {info.file for places in pieces.values() for info in places.values()}
    odd = [name for name in names if Path(name).name != name]
    if odd:
        raise InputError(f"names the shard {shown(odd[0])}", where=str(folder / METADATA))
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} shards are missing: {some(missing)}",
            where=str(folder),
            fix="copy all *.distcp files of the checkpoint",
        )
    return {name: (folder / name).stat().st_size for name in names}


def _tensor(
    folder: Path,
    name: str,
    entry: _Listed,
    places: dict[tuple[int, ...], _Info],
    sizes: dict[str, int],
) -> ShardedTensor:
    _check_cover(folder, name, entry)
    found = []
    for offsets, shape in entry.chunks:
        info = places.get(offsets)
        if info is None:
            raise InputError(
                f"{name} lacks its piece at {offsets}",
                where=str(folder / METADATA),
                fix="the checkpoint is incomplete: save or copy it again",
            )
        found.append((offsets, _place(folder / info.file, name, info, sizes, entry.dtype, shape)))
    return ShardedTensor(entry.shape, entry.dtype, tuple(found))


def _check_cover(folder: Path, name: str, entry: _Listed) -> None:
    """Every value in one piece, none in two."""
    chunks = sorted(entry.chunks)
    inside = all(
        len(offsets) == len(sizes) == len(entry.shape)
        and all(o + s <= n for o, s, n in zip(offsets, sizes, entry.shape, strict=True))
        for offsets, sizes in chunks
    )
    held = sum(math.prod(sizes) for _, sizes in chunks)
    # Most tensors are split along the first axis only: neighbours decide.
    first_only = all(not any(o[1:]) and s[1:] == entry.shape[1:] for o, s in chunks)
    pairs = pairwise(chunks) if first_only else combinations(chunks, 2)
    overlap = inside and any(_overlap(one, other) for one, other in pairs)
    if not inside or overlap or held != math.prod(entry.shape):
        problem = (
            "reach outside it" if not inside
            else "overlap" if overlap
            else f"hold {held} of {math.prod(entry.shape)} values"
        )  # fmt: skip
        raise InputError(
            f"the pieces of {name} {problem}",
            where=str(folder / METADATA),
            fix="the checkpoint is incomplete or damaged: save or copy it again",
        )


def _overlap(
    one: tuple[tuple[int, ...], tuple[int, ...]], other: tuple[tuple[int, ...], tuple[int, ...]]
) -> bool:
    return all(
        a < b + other_size and b < a + size
        for a, size, b, other_size in zip(*one, *other, strict=True)
    )


def _place(
    file: Path,
    name: str,
    info: _Info,
    sizes: dict[str, int],
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> TensorPlace:
    if info.offset + info.length > sizes[info.file]:
        raise InputError(
            f"is truncated: {sizes[info.file]} bytes, and {name} ends at "
            f"{info.offset + info.length}",
            where=str(file),
            fix="copy the shard again",
        )
    place = saved_object(file, info.offset, info.length)
    if not isinstance(place, TensorPlace):
        raise InputError(f"{name} is not a tensor in it", where=str(file))
    if (place.shape, place.dtype) != (shape, dtype):
        raise InputError(
            f"{name} is {place.dtype} of shape {place.shape} in it",
            where=str(file),
            allowed=f"{dtype} of shape {shape}, by {METADATA}",
            fix="shards and .metadata are of different checkpoints: copy all of one",
        )
    return place
