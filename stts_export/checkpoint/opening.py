"""From a path or a name on the hub to a checkpoint, whatever its format."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from stts_export.checkpoint import huggingface, olmo
from stts_export.checkpoint.hub import download, is_repository
from stts_export.checkpoint.stored import TOKENIZER_FILES, Checkpoint, found_config_files
from stts_export.errors import InputError

_STEP = re.compile(r"step(\d+)(-unsharded)?")
_PROCESSOR_FILES = tuple(name for name in TOKENIZER_FILES if "processor" in name)


def open_checkpoint(
    path: Path | str, *, revision: str | None = None, tokenizer: Path | str | None = None
) -> Checkpoint:
    """List the tensors of a checkpoint and read its configuration.

    Args:
        path: a Hugging Face Molmo2 folder, a step of a training run (ours, or olmo's, sharded or
            not), the run itself for its newest step, or as text a name on the hub. A path that
            exists wins, and a `Path` is never a name.
        revision: branch, tag or commit on the hub.
        tokenizer: folder or name on the hub with tokenizer files, for checkpoints that have none;
            they replace the checkpoint's own. What a checkpoint says about its processors stays.

    Raises:
        InputError: nothing readable there, a download failed, or a configuration that is not
            implemented.
        MissingDependencyError: a name on the hub, and huggingface_hub is not installed.
    """
    folder, name = _local(path, revision)
    checkpoint = _open(folder)
    if name:
        checkpoint = replace(checkpoint, source=name)
    return _with_tokenizer(checkpoint, tokenizer) if tokenizer else checkpoint


def _local(path: Path | str, revision: str | None) -> tuple[Path, str | None]:
    """The folder, and its name and commit if it is a download."""
    exists = Path(path).exists()
    if not exists and isinstance(path, str) and is_repository(path):
        folder = download(path, revision)
        return folder, f"{path}@{folder.name}"
    if revision is not None:
        raise InputError(
            f"revision {revision}",
            where=str(path),
            allowed="with a name on the hub, such as allenai/Molmo2-4B",
            fix="leave --revision out for a folder" if exists else None,
        )
    return Path(path), None


def _open(path: Path) -> Checkpoint:
    """Open a folder, or the newest step in it."""
    if not path.exists():
        raise InputError(
            "no such folder", where=str(path), fix="pass the folder of a trained checkpoint"
        )
    if not path.is_dir():
        raise InputError(
            "is a file",
            where=str(path),
            allowed="a folder with config.json and safetensors, or with config.yaml and the "
            "weights of a training run",
        )
    folders = [path, *_steps(path)]
    for number, folder in enumerate(folders):
        if (folder / "config.json").exists():
            return huggingface.open_folder(folder)
        if olmo.is_finished(folder):
            return olmo.open_folder(folder)
        if olmo.is_folder(folder):
            older = [step for step in folders[number + 1 :] if _is_finished(step)]
            raise olmo.unfinished(folder, older[0] if older else None)
    raise InputError(
        "holds no checkpoint: neither config.json nor model_and_optim/ or model.pt",
        where=str(path),
        allowed="a Hugging Face Molmo2 folder, a folder written by `stts-export train`, "
        "or a step of an olmo training run, or its parent",
    )


def _is_finished(step: Path) -> bool:
    return (step / "config.json").exists() or olmo.is_finished(step)


def _steps(path: Path) -> Iterator[Path]:
    """Steps of a run, newest first; of one step sharded before unsharded, as in olmo."""
    found = [
        (int(match[1]), match[2] is None, child)
        for child in path.iterdir()
        if (match := _STEP.fullmatch(child.name)) and child.is_dir()
    ]
    for _, _, child in sorted(found, reverse=True):
        yield child


def _with_tokenizer(checkpoint: Checkpoint, tokenizer: Path | str) -> Checkpoint:
    folder = Path(tokenizer)
    if not folder.exists() and isinstance(tokenizer, str) and is_repository(tokenizer):
        folder = download(tokenizer, None, weights=False)
    files = found_config_files(folder, TOKENIZER_FILES)
    if "tokenizer.json" not in files:
        raise InputError(
            "holds no tokenizer.json" if folder.is_dir() else "no such folder",
            where=str(tokenizer),
            allowed="a folder or a name on the hub with the tokenizer files of a Molmo2 model",
        )
    own = {
        name: source
        for name, source in checkpoint.config_files.items()
        if name not in TOKENIZER_FILES or name in _PROCESSOR_FILES
    }
    return replace(checkpoint, config_files={**files, **own})
