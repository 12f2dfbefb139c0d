"""Any readable checkpoint in, a Hugging Face Molmo2 folder with scorer weights out."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stts_export.build_folder import LOCK, check_apart, check_name, locked, readable_disk_errors
from stts_export.errors import InputError
from stts_export.files import readable_size

if TYPE_CHECKING:
    from stts_export.checkpoint import Checkpoint

log = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
_STAMP = "convert.unfinished"
"""In the working folder only, so that a later run knows it as ours."""
_HEADERS = 2_000_000
"""Bytes for headers and index, at most."""

OnTensor = Callable[[str, int, int], None]
"""(what was written, tensors that are done, of how many)."""


@dataclass(frozen=True)
class ConvertSpec:
    """How weights are stored."""

    dtype: str | None = None
    """float32, float16 or bfloat16; as they are when None."""
    max_shard_bytes: int = 4 * 2**30
    """Largest size of a file with weights; a larger tensor has a file of its own."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise InputError(f"dtype {self.dtype!r}", where="convert", allowed=" or ".join(DTYPES))
        if self.max_shard_bytes < 1:
            raise InputError(
                f"max_shard_bytes is {self.max_shard_bytes}", where="convert", allowed="1 or more"
            )


def checkpoint_from_checkpoint(
    checkpoint: Path | str,
    output: Path,
    spec: ConvertSpec | None = None,
    *,
    revision: str | None = None,
    tokenizer: Path | str | None = None,
    on_tensor: OnTensor | None = None,
) -> Path:
    """Write a checkpoint as a Hugging Face Molmo2 folder.

    The weights go tensor by tensor from disk to disk, into `output` + ".partial", which is renamed
    when all is written.

    Args:
        checkpoint: see `checkpoint.open_checkpoint`.
        output: folder to write; must not exist.
        spec: how weights are stored.
        revision: see `checkpoint.open_checkpoint`.
        tokenizer: see `checkpoint.open_checkpoint`.
        on_tensor: called when a tensor was written.

    Raises:
        InputError: the checkpoint, the output or the free disk space is at fault, another
            conversion is writing the same folder, or a weight does not fit into the type asked for.
        MissingDependencyError: a name on the hub, and huggingface_hub is not installed.
    """
    import torch

    from stts_export.checkpoint import check_tensors, open_checkpoint
    from stts_export.checkpoint.writing import (
        config_text,
        write_shards,
        written_bytes,
        written_tensors,
    )

    spec = spec or ConvertSpec()
    check_name(output)
    partial = output.with_name(output.name + ".partial")
    with readable_disk_errors(Path(checkpoint), partial):
        _check_absent(output, partial)
        source = open_checkpoint(checkpoint, revision=revision, tokenizer=tokenizer)
        stats = source.stats()
        check_tensors(source)
        check_apart(output, [source.folder, *source.files], "checkpoint")
        dtype = getattr(torch, spec.dtype) if spec.dtype else None
        tensors = written_tensors(source)
        needed = written_bytes(tensors, dtype) + _HEADERS
        _check_space(output, needed)
        _warn(source)

    def fill() -> None:
        write_shards(tensors, partial, dtype, spec.max_shard_bytes, on_tensor)
        source.write_config_files(partial)
        types = {dtype or tensor.dtype for tensor in tensors}
        changes = {
            # Files with code are not copied, and transformers has this model itself.
            "auto_map": None,
            "torch_dtype": None,
            "dtype": str(types.pop()).removeprefix("torch.") if len(types) == 1 else None,
            **({"_name_or_path": source.source} if source.source else {}),
        }
        text = config_text(source.config, changes)
        (partial / "config.json").write_text(text, encoding="utf-8")
        check_tensors(open_checkpoint(partial))

    with readable_disk_errors(source.folder, partial):
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial):
            (partial / _STAMP).touch()
            try:
                _empty(partial)
                try:
                    fill()
                finally:  # what was replaced meanwhile explains any other error
                    source.check_unchanged(stats)
                _check_absent(output, partial)
                partial.rename(output)
            except BaseException:
                _empty(partial, all_of_it=True)
                raise
            for name in (_STAMP, LOCK):
                (output / name).unlink(missing_ok=True)
    return output


def _check_absent(output: Path, partial: Path) -> None:
    if os.path.lexists(output):
        raise InputError(
            "exists already; nothing is ever replaced",
            where=str(output),
            fix="choose another name, or remove it first",
        )
    if os.path.lexists(partial) and not _is_working_folder(partial):
        raise InputError(
            "exists and is not an unfinished conversion",
            where=str(partial),
            fix="move it away, or choose another output",
        )


def _is_working_folder(partial: Path) -> bool:
    """Whether a folder was made by a conversion: it holds the stamp, or nothing of a user's."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {path.name for path in partial.iterdir()}
    return _STAMP in names or names <= {LOCK}


def _empty(partial: Path, *, all_of_it: bool = False) -> None:
    """Remove what was written; with the folder, the lock goes last."""
    for path in partial.iterdir():
        if path.name not in (_STAMP, LOCK):
            path.unlink()
    if all_of_it:
        for name in (_STAMP, LOCK):
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def _check_space(output: Path, needed: int) -> None:
    folder = next(folder for folder in output.absolute().parents if folder.exists())
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed:  # /proc has no total
        raise InputError(
            f"{readable_size(usage.free)} free",
            where=str(folder),
            allowed=f"{readable_size(needed)} for this checkpoint",
            fix="free some space, choose another disk with -o, or write --dtype bfloat16",
        )


def _warn(source: Checkpoint) -> None:
    if not source.has_scorer:
        log.warning("%s has no scorer: the folder holds the plain model", source.name)
    if not source.config.bidirectional_visual:
        log.warning(
            "visual tokens of %s see only earlier ones (bi_directional_attn is null): config.json "
            "says so for stts-export, but transformers has no such setting and will compute "
            "other results",
            source.name,
        )
    if "tokenizer.json" not in source.config_files:
        log.warning(
            "%s has no tokenizer.json, and neither will the folder; --tokenizer adds one",
            source.name,
        )
