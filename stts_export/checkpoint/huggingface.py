"""Hugging Face Molmo2 folders, with or without scorer weights.

Only safetensors are read: nothing in such a folder is ever unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stts_export.checkpoint.names import LM_HEAD, SCORER_PREFIX, TOKEN_EMBEDDING
from stts_export.checkpoint.stored import Checkpoint, StoredTensor, found_config_files, some
from stts_export.config import ModelConfig
from stts_export.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def open_folder(folder: Path) -> Checkpoint:
    """List the tensors of a folder and read its `config.json`.

    Raises:
        InputError: nothing readable there, or a configuration that is not implemented.
    """
    index = folder / INDEX
    if index.exists() and (folder / SINGLE).exists():
        raise InputError(
            f"holds both {SINGLE} and {INDEX}, which are two sets of weights",
            where=str(folder),
            fix=f"remove the one that is not meant: {SINGLE}, or {INDEX} with its shards",
        )
    tensors = _list_shards(index) if index.exists() else _list_single(folder)
    has_scorer = any(name.startswith(SCORER_PREFIX) for name in tensors)
    config = ModelConfig.from_file(folder / "config.json", has_scorer=has_scorer)
    read = {tensor.file for tensor in tensors.values()} | {folder / "config.json"}
    if index.exists():
        read.add(index)
    files = tuple(sorted(read))
    checkpoint = Checkpoint(folder, config, tensors, files, found_config_files(folder))
    _check_head(checkpoint)
    return checkpoint


def _check_head(checkpoint: Checkpoint) -> None:
    """Refuse a head that `tie_word_embeddings` contradicts; false is transformers' default."""
    tied = checkpoint.config.extra.get("tie_word_embeddings", False)
    held = {LM_HEAD, TOKEN_EMBEDDING} & set(checkpoint.tensors)
    if held == {TOKEN_EMBEDDING} and tied is not True:
        raise InputError(
            f"{LM_HEAD} is missing, and config.json does not say that it is the embedding",
            where=str(checkpoint.folder),
            allowed="a model without a head of its own has tie_word_embeddings: true",
            fix="the copy is incomplete: copy all files of the checkpoint",
        )
    if len(held) == 2 and tied is True and not checkpoint.looks_tied:
        raise InputError(
            f"tie_word_embeddings is true, but {LM_HEAD} differs from the embedding",
            where=str(checkpoint.folder / "config.json"),
            fix="if the model has a head of its own, set it to false; otherwise config.json and "
            "weights are of different checkpoints",
        )


def _list_single(folder: Path) -> dict[str, StoredTensor]:
    single = folder / SINGLE
    if not single.exists():
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix)]
        raise InputError(
            f"{SINGLE} is missing"
            + (f"; {', '.join(sorted(pickles))} can hold code and is not read" if pickles else ""),
            where=str(folder),
            allowed=f"{SINGLE}, or {INDEX} with its shards",
            fix="save the weights as safetensors",
        )
    return _list_file(single)


def _list_shards(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        odd = [f for f in weight_map.values() if f in ("", "..") or Path(f).name != f]
        file_of = {str(name): index.parent / file for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"is not a safetensors index: {error!r}", where=str(index)) from None
    if odd:
        raise InputError(
            f"names the shard {odd[0]!r}", where=str(index), allowed="files beside the index"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(file_of.values())):
        listed = {name for name, holder in file_of.items() if holder == file}
        held = _list_file(file)
        missing = sorted(listed - set(held))
        if missing:
            raise InputError(
                f"lacks {some(missing)}, which {index.name} places in it",
                where=str(file),
                fix="download the shard again",
            )
        unlisted = sorted(set(held) - set(file_of))
        if unlisted:
            raise InputError(
                f"lacks {some(unlisted)}, which {file.name} holds",
                where=str(index),
                fix="download the index and the shards again, of one and the same revision",
            )
        tensors |= {name: tensor for name, tensor in held.items() if name in listed}
    return tensors


def _list_file(file: Path) -> dict[str, StoredTensor]:
    tensors = {}
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            view = opened.get_slice(name)
            if view.get_dtype() not in DTYPES:
                raise InputError(
                    f"{name} has type {view.get_dtype()}",
                    where=str(file),
                    allowed="F32 or F16 or BF16",
                    fix="export an unquantised checkpoint",
                )
            shape, dtype = tuple(view.get_shape()), DTYPES[view.get_dtype()]
            tensors[name] = StoredTensor(name, shape, dtype, file, partial(_load, file, name))
    return tensors


def _load(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as opened:
        tensor: torch.Tensor = opened.get_tensor(name)  # its memory is the file's pages
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a safetensors file; unreadable or truncated ones become an `InputError`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except FileNotFoundError:
        raise InputError(
            "no such file", where=str(file), fix="copy all shards of the checkpoint"
        ) from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot be read: {error}",
            where=str(file),
            fix="the file is truncated or damaged: copy it again",
        ) from None
