"""Training folders of olmo: `config.yaml`, and weights sharded or in one `model.pt`.

Nothing pickled runs, and the olmo package is not needed. The optimiser's state is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch

from stts_export.checkpoint.distributed import METADATA, ShardedTensor, sharded_tensors
from stts_export.checkpoint.names import LM_HEAD, SCORER_PREFIX
from stts_export.checkpoint.olmo_config import FILE, config_files_from_yaml
from stts_export.checkpoint.stored import (
    LICENCES,
    Checkpoint,
    StoredTensor,
    found_config_files,
    some,
)
from stts_export.checkpoint.torch_files import TensorPlace, saved_object
from stts_export.config import ModelConfig
from stts_export.errors import InputError

SHARDED = "model_and_optim"
UNSHARDED = "model.pt"

_PREFIX = "model."
_PROJECTOR = "model.vision_backbone.image_projector.w1.weight"
# What wrappers of a training run put into names.
_WRAPPERS = re.compile(r"(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")
_BLOCK = re.compile(r"transformer\.blocks\.(\d+)\.(\w+)\.(.+)")
_MODULE = {
    "att_proj": "self_attn.", "attn_out": "self_attn.", "q_norm": "self_attn.",
    "k_norm": "self_attn.", "ff_proj": "mlp.", "ff_out": "mlp.",
}  # fmt: skip


def is_folder(path: Path) -> bool:
    """Whether a folder holds the weights of a step, finished or not."""
    return (path / SHARDED).is_dir() or (path / UNSHARDED).is_file()


def is_finished(path: Path) -> bool:
    """Whether all weights of a step were saved: `.metadata` is written last."""
    sharded = path / SHARDED
    return (sharded / METADATA).is_file() if sharded.is_dir() else (path / UNSHARDED).is_file()


def unfinished(folder: Path, older: Path | None) -> InputError:
    """Make the error for a step that is not finished; `older` is one that is."""
    return InputError(
        "is missing; without it the checkpoint was not finished",
        where=str(folder / SHARDED / METADATA),
        fix="copy it with the shards (its name begins with a dot)"
        + (f", or pass {older}, the newest step that is whole" if older else ""),
    )


def open_folder(folder: Path) -> Checkpoint:
    """List the tensors of a step and read its configuration.

    Raises:
        InputError: a file is missing, truncated, damaged or names foreign classes, or the
            configuration is not implemented.
    """
    sharded = (folder / SHARDED).is_dir()
    tensors, files = _sharded(folder / SHARDED) if sharded else _unsharded(folder / UNSHARDED)
    file = folder / FILE
    size = tensors[_PROJECTOR].shape[0] if _PROJECTOR in tensors else None
    values, tied, texts = config_files_from_yaml(file, size)
    if tied == (LM_HEAD in tensors):
        raise InputError(
            f"model.llm.weight_tying is {str(tied).lower()}, but the checkpoint "
            + ("has a head of its own" if tied else "has no head (transformer.ff_out.weight)"),
            where=str(file),
            fix="config.yaml belongs to another checkpoint, or tensors are missing",
        )
    has_scorer = any(name.startswith(SCORER_PREFIX) for name in tensors)
    config = ModelConfig.from_dict(values, has_scorer=has_scorer, where=str(file))
    made = {"config.json": json.dumps(values, indent=2) + "\n", **texts}
    licences = found_config_files(folder, LICENCES)
    return Checkpoint(folder, config, tensors, tuple(sorted({*files, file})), {**made, **licences})


def huggingface_name(name: str) -> str:
    """Translate the name of a parameter in a training run (spec 3.3)."""
    name = _WRAPPERS.sub("", name)
    if name == "transformer.ff_out.weight":
        return LM_HEAD
    match = _BLOCK.fullmatch(name)
    if match:
        layer, module, rest = match.groups()
        name = f"transformer.blocks.{layer}.{_MODULE.get(module, '')}{module}.{rest}"
    return f"model.{name}"


def _sharded(folder: Path) -> tuple[dict[str, StoredTensor], set[Path]]:
    # A name that is neither the model's nor the optimiser's is kept, to be refused by name.
    found = sharded_tensors(folder, lambda name: not name.startswith("optim."))
    tensors: dict[str, StoredTensor] = {}
    files = {folder / METADATA}
    for name, tensor in found.items():
        shards = {place.file for _, place in tensor.pieces}
        files |= shards
        at = min(shards, default=folder / METADATA)
        _add(tensors, name.removeprefix(_PREFIX), tensor, at)
    return tensors, files


def _unsharded(file: Path) -> tuple[dict[str, StoredTensor], set[Path]]:
    state = saved_object(file)
    if not isinstance(state, dict) or not state:
        raise InputError(
            "is not a state dict", where=str(file), allowed="tensors by name, as torch.save wrote"
        )
    odd = [str(name) for name, value in state.items() if not isinstance(value, TensorPlace)]
    if odd:
        raise InputError(
            f"{some(odd)} is not a tensor",
            where=str(file),
            fix="save the model's state dict alone",
        )
    tensors: dict[str, StoredTensor] = {}
    for name, place in state.items():
        _add(tensors, str(name), place, file)
    return tensors, {file}


def _add(
    tensors: dict[str, StoredTensor], name: str, place: TensorPlace | ShardedTensor, file: Path
) -> None:
    theirs = huggingface_name(name)
    if theirs in tensors:
        raise InputError(f"holds {theirs} twice", where=str(file))
    load: Callable[[], torch.Tensor] = place.load
    tensors[theirs] = StoredTensor(theirs, place.shape, place.dtype, file, load)
