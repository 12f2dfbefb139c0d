"""Hugging Face Molmo2 folders, with or without scorer weights, read and written.

A training run of ours (`RUN/stepN/`) holds folders of the same format; given the run, the newest
step is taken. Only safetensors are read: nothing in a checkpoint is ever unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stts_export.checkpoint.names import (
    LM_HEAD,
    SCORER_PREFIX,
    TOKEN_EMBEDDING,
    checkpoint_name,
)
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import whole
from stts_export.model.vlm import SttsModel

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are listed but not loaded."""

    folder: Path
    config: ModelConfig
    file_of: dict[str, Path]
    """Tensor name -> the safetensors file that holds it."""

    @property
    def has_scorer(self) -> bool:
        """Whether scorer tensors are present; without them nothing can be pruned."""
        return self.config.vision.pruning is not None


def open_checkpoint(path: Path) -> Checkpoint:
    """List the tensors of a checkpoint and read its configuration.

    Args:
        path: a Hugging Face Molmo2 folder, a step folder of a training run, or the run itself.

    Raises:
        InputError: nothing readable there, or a configuration that is not implemented.
    """
    folder = _resolve(path)
    file_of = _list_tensors(folder)
    has_scorer = any(name.startswith(SCORER_PREFIX) for name in file_of)
    config = ModelConfig.from_file(folder / "config.json", has_scorer=has_scorer)
    return Checkpoint(folder, config, file_of)


def model_from_checkpoint(checkpoint: Checkpoint) -> SttsModel:
    """Load all weights into a fp32 model in evaluation mode.

    Raises:
        InputError: tensors are missing, of another shape or type, or of no known use.
    """
    model, source = check_tensors(checkpoint)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(set(checkpoint.file_of.values())):
        with _opened(file) as tensors:
            for ours, name in source.items():
                if checkpoint.file_of[name] == file:
                    state[ours] = _finite(tensors.get_tensor(name).float(), name, file)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_tensors(checkpoint: Checkpoint) -> tuple[SttsModel, dict[str, str]]:
    """Check names, shapes and types of all tensors without loading any.

    Returns:
        The model without values (on the meta device), and its parameters' names in the checkpoint.

    Raises:
        InputError: tensors are missing, of another shape or type, or of no known use.
    """
    with torch.device("meta"):
        model = SttsModel(checkpoint.config)
    source = {ours: checkpoint_name(ours) for ours, _ in model.named_parameters()}
    if LM_HEAD not in checkpoint.file_of:
        tied = next(ours for ours, theirs in source.items() if theirs == LM_HEAD)
        source[tied] = TOKEN_EMBEDDING
    _check_names(checkpoint, set(source.values()))
    for file in sorted(set(checkpoint.file_of.values())):
        with _opened(file) as tensors:
            for ours, parameter in model.named_parameters():
                name = source[ours]
                if checkpoint.file_of[name] == file:
                    _check_tensor(tensors.get_slice(name), parameter, name, file)
    return model, source


def save_checkpoint(model: SttsModel, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write `config.json` and `model.safetensors` in the Hugging Face Molmo2 format.

    Each file is written beside its final name and moved there when complete.

    Args:
        model: its `config.extra` becomes `config.json`.
        folder: created when missing.
        dtype: type of the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        checkpoint_name(name): parameter.detach().to("cpu", dtype).contiguous()
        for name, parameter in model.named_parameters()
    }
    with whole(folder / _SINGLE) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    text = json.dumps(model.config.extra, indent=2, sort_keys=True) + "\n"
    with whole(folder / "config.json") as partial:
        partial.write_text(text, encoding="utf-8")


def _resolve(path: Path) -> Path:
    """Return the folder that holds the checkpoint: `path`, or the newest step of a run."""
    if not path.exists():
        raise InputError(
            "no such folder", where=str(path), fix="pass the folder of a trained checkpoint"
        )
    if not path.is_dir():
        raise InputError(
            "is a file", where=str(path), allowed="a folder with config.json and safetensors"
        )
    if (path / "config.json").exists():
        return path
    steps = [
        (int(match[1]), child)
        for child in path.iterdir()
        if (match := re.fullmatch(r"step(\d+)", child.name)) and (child / "config.json").exists()
    ]
    if steps:
        return max(steps)[1]
    raise InputError(
        "holds no checkpoint: config.json is missing",
        where=str(path),
        allowed="a Hugging Face Molmo2 folder, or a folder written by `stts-export train`",
    )


def _list_tensors(folder: Path) -> dict[str, Path]:
    index = folder / _INDEX
    if index.exists():
        return _list_shards(index)
    single = folder / _SINGLE
    if not single.exists():
        pickles = [p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix)]
        raise InputError(
            f"{_SINGLE} is missing"
            + (f"; {', '.join(sorted(pickles))} can hold code and is not read" if pickles else ""),
            where=str(folder),
            allowed=f"{_SINGLE}, or {_INDEX} with its shards",
            fix="save the weights as safetensors",
        )
    with _opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _list_shards(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        file_of = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"is not a safetensors index: {error!r}", where=str(index)) from None
    for file in sorted(set(file_of.values())):
        listed = {name for name, holder in file_of.items() if holder == file}
        with _opened(file) as tensors:
            missing = sorted(listed - set(tensors.keys()))
        if missing:
            raise InputError(
                f"lacks {_some(missing)}, which {index.name} places in it",
                where=str(file),
                fix="download the shard again",
            )
    return file_of


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


def _check_names(checkpoint: Checkpoint, needed: set[str]) -> None:
    where = str(checkpoint.folder)
    missing = sorted(needed - set(checkpoint.file_of))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(needed)} tensors are missing: {_some(missing)}",
            where=where,
            fix="the checkpoint is incomplete, or config.json belongs to another one",
        )
    extra = sorted(
        name
        for name in set(checkpoint.file_of) - needed
        if not _above_taps(name, checkpoint.config.vision.num_layers)
    )
    if extra:
        raise InputError(
            f"{len(extra)} tensors have no place in this model: {_some(extra)}",
            where=where,
            fix="config.json belongs to another checkpoint, or the family is not supported",
        )


def _above_taps(name: str, num_layers: int) -> bool:
    """Vision blocks above the deepest connector tap, which some folders keep, are never run."""
    match = re.search(r"image_vit\.transformer\.resblocks\.(\d+)\.", name)
    return bool(match) and int(match[1]) >= num_layers  # type: ignore[index]


def _check_tensor(stored: Any, parameter: torch.Tensor, name: str, file: Path) -> None:
    """Compare a safetensors slice, which is not loaded, with the parameter it is for."""
    if tuple(stored.get_shape()) != tuple(parameter.shape):
        raise InputError(
            f"{name} has shape {tuple(stored.get_shape())}",
            where=str(file),
            allowed=f"{tuple(parameter.shape)}, by config.json",
            fix="config.json belongs to another checkpoint",
        )
    if stored.get_dtype() not in _FLOATS:
        raise InputError(
            f"{name} has type {stored.get_dtype()}",
            where=str(file),
            allowed=" or ".join(_FLOATS),
            fix="export an unquantised checkpoint",
        )


def _finite(tensor: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    if not torch.isfinite(tensor).all():
        raise InputError(
            f"{name} has NaN or infinite values",
            where=str(file),
            fix="the training diverged or the file is damaged: take an earlier checkpoint",
        )
    return tensor


def _some(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
