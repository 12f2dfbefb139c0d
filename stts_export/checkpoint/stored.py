"""A trained model on disk: tensors that are listed but not loaded, whatever the folder's format."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from stts_export.checkpoint.names import LM_HEAD, TOKEN_EMBEDDING, checkpoint_name
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.model.vlm import SttsModel

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""What turns text and pixels into inputs, and tokens into text."""
CONFIG_FILES = ("config.json", *TOKENIZER_FILES, "training.json", *LICENCES)
"""A checkpoint's own files that the runtime or its user may need."""

_END_BYTES, _SAMPLE_BYTES, _SAMPLES = 2**16, 2**12, 256
_SAMPLED_BYTES = 2**21
"""Smaller files are read whole for their digest."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    """In the Hugging Face format, whatever the folder's format."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    """For messages."""
    load: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    """Returns it as stored, in memory that the file backs where the format allows it; nothing is
    kept between calls, and no other tensor is read."""

    @property
    def nbytes(self) -> int:
        """Size in bytes, as stored."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, part: torch.Tensor) -> torch.Tensor:
        """Return a part of what `load` gave.

        Raises:
            InputError: it has NaN or infinite values.
        """
        # NaN passes through; an empty tensor has no bounds.
        if part.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(part)):
            raise InputError(
                f"{self.name} has NaN or infinite values",
                where=str(self.file),
                fix="the training diverged or the file is damaged: take an earlier checkpoint",
            )
        return part

    def load_fp32(self) -> torch.Tensor:
        """Load it as fp32.

        Raises:
            InputError: it has NaN or infinite values.
        """
        return self.check(self.load()).float()


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are listed but not loaded."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    """By the names of the Hugging Face format."""
    files: tuple[Path, ...]
    """Everything that is read."""
    config_files: Mapping[str, Path | str]
    """Name in a bundle's `config/` -> the file to copy, or the text to write."""
    source: str = ""
    """What it is called; the folder's name when empty."""

    @property
    def name(self) -> str:
        """What it is called: for descriptions of what was made from it."""
        return self.source or self.folder.resolve().name

    @property
    def has_scorer(self) -> bool:
        """Whether scorer tensors are present; without them nothing can be pruned."""
        return self.config.vision.pruning is not None

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes, as stored."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def looks_tied(self) -> bool:
        """Whether the head is the embedding or, by a few of its rows, a copy of it; for estimates.

        Hugging Face folders of tied models have a copy; other formats leave the head out.
        """
        embedding, head = self.tensors.get(TOKEN_EMBEDDING), self.tensors.get(LM_HEAD)
        if embedding is None or head is None:
            return embedding is not None
        alike = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        if not alike or head.file.suffix != ".safetensors":
            return False
        rows = torch.linspace(0, head.shape[0] - 1, 16).long()
        return torch.equal(head.load()[rows], embedding.load()[rows])

    def parameters(self) -> dict[str, StoredTensor]:
        """Return the tensors by the parameter names of `SttsModel`; a tied head is the embedding.

        Raises:
            InputError: tensors are missing.
        """
        return {ours: stored for ours, (stored, _) in _pairs(self).items()}

    def write_config_files(self, folder: Path) -> None:
        """Write configuration, tokenizer and licences into a folder, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, source in self.config_files.items():
            if isinstance(source, Path):
                shutil.copyfile(source, folder / name)
            else:
                (folder / name).write_text(source, encoding="utf-8")

    @contextmanager
    def config_folder(self) -> Iterator[Path]:
        """Yield a folder with the configuration files, for readers; not to write to.

        It is temporary when the files do not lie together already; errors name the real files.
        """
        if all(source == self.folder / name for name, source in self.config_files.items()):
            yield self.folder
            return
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.write_config_files(folder)
            try:
                yield folder
            except InputError as error:
                raise self._at_source(error, folder) from None

    def _at_source(self, error: InputError, folder: Path) -> InputError:
        """Name what a file in the temporary folder was made from."""
        where = error.where or str(folder)
        for name, source in self.config_files.items():
            real = str(source) if isinstance(source, Path) else f"{self.folder}, as {name}"
            where = where.replace(str(folder / name), real)
        where = where.replace(str(folder), str(self.folder))
        return InputError(error.message, where=where, allowed=error.allowed, fix=error.fix)

    def stats(self) -> dict[str, list[int | str]]:
        """Which files they are, and digests of what they hold; others mean another checkpoint.

        Copies that keep sizes and times differ in path, inode or content; of large files samples
        are read.
        """
        stats: dict[str, list[int | str]] = {}
        copied = {path for path in self.config_files.values() if isinstance(path, Path)}
        for path in sorted({*self.files, *copied}):
            real = path.resolve()
            found = real.stat()
            stats[str(real)] = [
                found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, _digest(real),
            ]  # fmt: skip
        for name, text in self.config_files.items():
            if isinstance(text, str):
                stats[name] = [hashlib.sha256(text.encode("utf-8")).hexdigest()]
        return stats

    def check_unchanged(self, stats: Mapping[str, list[int | str]]) -> None:
        """Compare with what `stats` gave.

        Raises:
            InputError: files were replaced, changed or removed since then.
        """
        try:
            now = self.stats()
        except FileNotFoundError as error:
            now = {str(error.filename): []}
        changed = [name for name in {**stats, **now} if stats.get(name) != now.get(name)]
        if changed:
            raise InputError(
                f"was changed while it was read: {some(sorted(changed))}",
                where=str(self.folder),
                fix="leave the checkpoint as it is until the end, and start again",
            )


def _digest(file: Path) -> str:
    """SHA-256 of a file's ends, where headers are, and of samples between them."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= _SAMPLED_BYTES:
            digest.update(opened.read())
        else:
            digest.update(opened.read(_END_BYTES))
            for part in range(1, _SAMPLES):
                opened.seek(size * part // _SAMPLES)
                digest.update(opened.read(_SAMPLE_BYTES))
            opened.seek(-_END_BYTES, os.SEEK_END)
            digest.update(opened.read())
    return digest.hexdigest()


def found_config_files(folder: Path, names: tuple[str, ...] = CONFIG_FILES) -> dict[str, Path]:
    """Return the configuration files that a folder has, by name."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def model_from_checkpoint(checkpoint: Checkpoint) -> SttsModel:
    """Load all weights into a fp32 model in evaluation mode.

    Raises:
        InputError: tensors are missing, of another shape or type, of no known use, or no numbers.
    """
    check_tensors(checkpoint)
    with torch.device("meta"):
        model = SttsModel(checkpoint.config)
    state = {ours: stored.load_fp32() for ours, stored in checkpoint.parameters().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_tensors(checkpoint: Checkpoint) -> None:
    """Check names, shapes and types of all tensors without loading any.

    Raises:
        InputError: tensors are missing, of another shape or type, or of no known use.
    """
    pairs = _pairs(checkpoint)
    _check_extra(checkpoint, {stored.name for stored, _ in pairs.values()})
    for stored, shape in pairs.values():
        _check_tensor(stored, shape)


def _pairs(checkpoint: Checkpoint) -> dict[str, tuple[StoredTensor, tuple[int, ...]]]:
    """Our parameter name -> what is stored for it, and the shape that it must have."""
    with torch.device("meta"):
        model = SttsModel(checkpoint.config)
    shapes = {ours: tuple(parameter.shape) for ours, parameter in model.named_parameters()}
    source = {ours: checkpoint_name(ours) for ours in shapes}
    if LM_HEAD not in checkpoint.tensors:
        tied = next(ours for ours, theirs in source.items() if theirs == LM_HEAD)
        source[tied] = TOKEN_EMBEDDING
    needed = set(source.values())
    missing = sorted(needed - set(checkpoint.tensors))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(needed)} tensors are missing: {some(missing)}",
            where=str(checkpoint.folder),
            fix="the checkpoint is incomplete, or its configuration belongs to another one",
        )
    return {ours: (checkpoint.tensors[name], shapes[ours]) for ours, name in source.items()}


def _check_extra(checkpoint: Checkpoint, needed: set[str]) -> None:
    extra = sorted(
        name
        for name in set(checkpoint.tensors) - needed
        if not _above_taps(name, checkpoint.config.vision.num_layers)
    )
    if extra:
        raise InputError(
            f"{len(extra)} tensors have no place in this model: {some(extra)}",
            where=str(checkpoint.folder),
            fix="the configuration belongs to another checkpoint, or the family is not supported",
        )


def _above_taps(name: str, num_layers: int) -> bool:
    """Vision blocks above the deepest connector tap, which some folders keep, are never run."""
    match = re.search(r"image_vit\.transformer\.resblocks\.(\d+)\.", name)
    return bool(match) and int(match[1]) >= num_layers  # type: ignore[index]


def _check_tensor(stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.shape != shape:
        raise InputError(
            f"{stored.name} has shape {stored.shape}",
            where=str(stored.file),
            allowed=f"{shape}, by the configuration",
            fix="the configuration belongs to another checkpoint",
        )
    if stored.dtype not in FLOATS:
        raise InputError(
            f"{stored.name} has type {dtype_name(stored.dtype)}",
            where=str(stored.file),
            allowed=" or ".join(map(dtype_name, FLOATS)),
            fix="export an unquantised checkpoint",
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float16" for `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def some(names: list[str], limit: int = 5) -> str:
    """Join the first names and count the rest."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
