"""Writers of the Hugging Face Molmo2 format: one tensor in memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from stts_export.checkpoint.huggingface import DTYPES, INDEX, SINGLE
from stts_export.checkpoint.names import checkpoint_name
from stts_export.checkpoint.stored import Checkpoint, StoredTensor
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import whole
from stts_export.model.vlm import SttsModel

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PIECE_BYTES = 2**26

OnTensor = Callable[[str, int, int], None]
"""(what was written, tensors that are done, of how many)."""


def save_checkpoint(model: SttsModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json` and `model.safetensors` in the Hugging Face Molmo2 format.

    Each file is written beside its final name and moved there when complete.

    Args:
        model: its `config.extra` becomes `config.json`.
        folder: created when missing.
        dtype: type of the stored weights.
    """
    tensors = [
        StoredTensor(
            checkpoint_name(name),
            tuple(parameter.shape),
            parameter.dtype,
            folder / SINGLE,
            partial(parameter.detach().to, "cpu"),
        )
        for name, parameter in model.named_parameters()
    ]
    save_tensors(tensors, model.config, folder, dtype)


def save_tensors(
    tensors: Sequence[StoredTensor],
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what `save_checkpoint` does, from tensors wherever they are.

    Args:
        tensors: by their names in the checkpoint; each is loaded once, in this order.
        config: its `extra` becomes `config.json`.
        folder: created when missing.
        dtype: type of the stored weights.

    Raises:
        InputError: a tensor has values that are no numbers or do not fit into `dtype`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / SINGLE) as unfinished:
        _write_file(unfinished, tensors, dtype, lambda name: None)
    with whole(folder / "config.json") as unfinished:
        unfinished.write_text(config_text(config), encoding="utf-8")


def written_tensors(checkpoint: Checkpoint) -> list[StoredTensor]:
    """What a folder must hold: every parameter by its name there, a tied head as a copy.

    Raises:
        InputError: tensors are missing.
    """
    return [
        replace(stored, name=checkpoint_name(ours))
        for ours, stored in checkpoint.parameters().items()
    ]


def write_shards(
    tensors: Sequence[StoredTensor],
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    on_tensor: OnTensor | None = None,
) -> None:
    """Write `model.safetensors`, or several and their index.

    Args:
        tensors: in the order in which they are written.
        folder: that exists.
        dtype: type of the stored weights; as they were when None.
        shard_bytes: largest size of a shard; a larger tensor has one of its own.
        on_tensor: called when a tensor was written.

    Raises:
        InputError: a tensor has values that are no numbers or do not fit into `dtype`.
    """
    shards = _shards(tensors, dtype, shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    )
    done = 0

    def report(name: str) -> None:
        nonlocal done
        done += 1
        if on_tensor:
            on_tensor(name, done, len(tensors))

    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, dtype, report)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_size(tensor, dtype) for tensor in tensors)},
            "weight_map": {
                tensor.name: name
                for name, shard in zip(names, shards, strict=True)
                for tensor in shard
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def written_bytes(tensors: Sequence[StoredTensor], dtype: torch.dtype | None) -> int:
    """Size on disk of the weights, without headers."""
    return sum(_size(tensor, dtype) for tensor in tensors)


def config_text(config: ModelConfig, changes: Mapping[str, Any] | None = None) -> str:
    """Return the text of `config.json`; a change to None removes a key."""
    values = {**config.extra, **(changes or {})}
    for key, value in (changes or {}).items():
        if value is None:
            del values[key]
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _size(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    return tensor.nbytes // tensor.dtype.itemsize * (dtype or tensor.dtype).itemsize


def _shards(
    tensors: Sequence[StoredTensor], dtype: torch.dtype | None, shard_bytes: int
) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _size(tensor, dtype)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file, and the type that it gets there."""

    tensor: StoredTensor
    dtype: torch.dtype


def _write_file(
    file: Path,
    tensors: Sequence[StoredTensor],
    dtype: torch.dtype | None,
    written: Callable[[str], None],
) -> None:
    """Write one safetensors file: the header's length, the header, then the values."""
    # Widest types first, so that every tensor is aligned.
    entries = sorted(
        (_Entry(tensor, dtype or tensor.dtype) for tensor in tensors),
        key=lambda entry: -entry.dtype.itemsize,
    )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + _size(entry.tensor, entry.dtype)
        header[entry.tensor.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)))
        opened.write(text)
        for entry in entries:
            _write_values(opened, entry)
            written(entry.tensor.name)


def _write_values(opened: BinaryIO, entry: _Entry) -> None:
    """Convert and write piece by piece: a tensor in mapped memory never becomes a copy."""
    flat = entry.tensor.load().contiguous().reshape(-1)
    step = _PIECE_BYTES // flat.dtype.itemsize
    for begin in range(0, flat.numel(), step):
        piece = entry.tensor.check(flat[begin : begin + step])
        converted = piece.to(entry.dtype)
        if not torch.isfinite(converted).all():
            raise InputError(
                f"{entry.tensor.name} does not fit into {str(entry.dtype).removeprefix('torch.')}",
                where=str(entry.tensor.file),
                fix="write it as bfloat16 or float32",
            )
        opened.write(converted.view(torch.uint8).numpy().data)
