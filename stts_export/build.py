"""Checkpoint in, bundle out. Every stage can be rerun alone; an interrupted build resumes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from stts_export._version import __version__
from stts_export.bundle import (
    CONFIG_FOLDER,
    GRAPH_FOLDER,
    MANIFEST,
    Limits,
    Manifest,
    is_bundle,
    list_files,
)
from stts_export.errors import InputError, MissingDependencyError
from stts_export.files import json_object, readable_size, write_json
from stts_export.runtime.prompt import PromptBuilder
from stts_export.tensors import (
    PRECISIONS,
    Precision,
    graph_file,
    graph_specs,
)

if TYPE_CHECKING:
    from stts_export.checkpoint import Checkpoint

log = logging.getLogger(__name__)

BACKENDS = ("onnxruntime",)
DEFAULT_MAX_FRAMES = 64

_STAMP = "build.json"
# The checkpoint's own files that the runtime or its user may need.
_CONFIG_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    "training.json", "LICENSE", "LICENSE.txt", "LICENSE.md",
)  # fmt: skip
_BYTES = {"fp32": 4, "fp16": 2}

OnStage = Callable[[str, int, int], None]
"""(stage, number, of how many), called when a stage begins."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build."""

    precision: Precision = "fp32"
    max_frames: int | None = None
    """Longest clip in frames; the checkpoint's own `num_frames`, or 64, when None."""
    min_prune_ratio: float = 0.0
    backends: tuple[str, ...] = ("onnxruntime",)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InputError(
                f"precision {self.precision!r}", where="build", allowed=" or ".join(PRECISIONS)
            )
        for backend in self.backends:
            if backend not in BACKENDS:
                raise InputError(
                    f"back end {backend!r}", where="build", allowed=" or ".join(BACKENDS)
                )
        if self.max_frames is not None and self.max_frames < 1:
            raise InputError(f"max_frames is {self.max_frames}", where="build", allowed="1 or more")


def bundle_from_checkpoint(
    checkpoint: Path,
    output: Path,
    spec: BuildSpec | None = None,
    *,
    force: bool = False,
    on_stage: OnStage | None = None,
) -> Path:
    """Build a bundle.

    Work happens in `output` + ".partial", which keeps finished graphs and is renamed when all is
    done; a rerun with the same arguments goes on from there.

    Args:
        checkpoint: see `checkpoint.open_checkpoint`.
        output: folder to write; must not exist unless `force` and it is a bundle.
        spec: what to build.
        force: replace an existing bundle.
        on_stage: called when a stage begins.

    Raises:
        InputError: the checkpoint, the output or the free disk space is at fault.
        VerificationError: a graph differs from the checkpoint.
        MissingDependencyError: torch, onnx or onnxruntime is not installed.
    """
    spec = spec or BuildSpec()
    _check_output(output, force)
    if is_bundle(checkpoint):
        raise InputError(
            "is a bundle already",
            where=str(checkpoint),
            allowed="a checkpoint folder; a bundle runs on ONNX Runtime as it is",
        )
    open_checkpoint = _import_exporter()
    source = open_checkpoint(checkpoint)
    _check_tokenizer(source)
    limits = _limits(source, spec)
    partial = output.with_name(output.name + ".partial")
    with _readable_disk_errors(partial):
        _prepare(partial, source, spec)
        graphs_from_checkpoint(source, partial, spec, on_stage)
        _copy_config(source.folder, partial / CONFIG_FOLDER)
        (partial / _STAMP).unlink()
        manifest = _manifest(source, partial, spec, limits)
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        os.replace(partial, output)
    return output


def graphs_from_checkpoint(
    source: Checkpoint, folder: Path, spec: BuildSpec, on_stage: OnStage | None = None
) -> None:
    """Export and check the graphs that are not in `folder` yet."""
    from stts_export.checkpoint import model_from_checkpoint
    from stts_export.graphs.export import export_graph

    stages: dict[str, list[str]] = {}
    for name in graph_specs(source.config, spec.precision):
        stages.setdefault(Path(graph_file(name)).parent.name, []).append(name)
    graphs = folder / GRAPH_FOLDER
    todo = [stage for stage in stages if not (graphs / stage).is_dir()]
    if not todo:
        return
    model = model_from_checkpoint(source)
    unfinished = graphs / "unfinished"
    for number, stage in enumerate(stages, start=1):
        if on_stage:
            on_stage(stage, number, len(stages))
        if stage not in todo:
            continue
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in stages[stage]:
            export_graph(model, name, spec.precision, unfinished)
        os.replace(unfinished / stage, graphs / stage)
    unfinished.rmdir()


def _import_exporter() -> Callable[[Path], Checkpoint]:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401

        from stts_export.checkpoint import open_checkpoint
    except ImportError as error:
        raise MissingDependencyError(
            f"building from a checkpoint needs a package that is not installed: {error}",
            where="build",
            fix="pip install 'stts-export[cpu,export]'",
        ) from None
    return open_checkpoint


def _check_output(output: Path, force: bool) -> None:
    if not output.exists():
        return
    if not force:
        raise InputError(
            "exists already",
            where=str(output),
            fix="choose another name, or add --force to replace a bundle",
        )
    if not is_bundle(output):
        raise InputError(
            "exists and is not a bundle; --force replaces bundles only", where=str(output)
        )


def _fingerprint(source: Checkpoint, spec: BuildSpec) -> dict[str, object]:
    files = sorted({*source.file_of.values(), source.folder / "config.json"})
    return {
        "stts_export": __version__,
        "spec": asdict(spec),
        "files": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
    }


def _prepare(partial: Path, source: Checkpoint, spec: BuildSpec) -> None:
    """Make the working folder, or keep one that an equal build left unfinished."""
    stamp = json.loads(json.dumps(_fingerprint(source, spec)))
    try:
        resumable = json.loads((partial / _STAMP).read_text(encoding="utf-8")) == stamp
    except (OSError, ValueError):
        resumable = False
    if not resumable and partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    _check_space(partial, source, spec)
    (partial / GRAPH_FOLDER).mkdir(parents=True, exist_ok=True)
    write_json(partial / _STAMP, stamp)


def _check_space(partial: Path, source: Checkpoint, spec: BuildSpec) -> None:
    """Refuse before hours are spent; an upper bound from the checkpoint's size."""
    stored = sum(path.stat().st_size for path in set(source.file_of.values()))
    # A checkpoint of 2-byte weights doubles in fp32.
    needed = int(stored * (2 if _BYTES[spec.precision] == 4 else 1) * 1.3)
    done = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(partial.parent).free
    if free < needed - done:
        raise InputError(
            f"{readable_size(free)} free",
            where=str(partial.parent),
            allowed=f"about {readable_size(needed)} for this bundle",
            fix="free some space, choose another disk with -o, or build with --precision fp16",
        )


@contextmanager
def _readable_disk_errors(partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        raise InputError(
            f"cannot be written: {error.strerror}",
            where=str(error.filename or partial),
            fix=f"free space or choose another folder, then rerun: {partial} keeps what is done",
        ) from error


def _manifest(source: Checkpoint, folder: Path, spec: BuildSpec, limits: Limits) -> Manifest:
    return Manifest(
        has_scorer=source.has_scorer,
        precision=spec.precision,
        limits=limits,
        graphs=tuple(graph_specs(source.config, spec.precision)),
        targets=spec.backends,
        source=source.folder.name,
        tool_versions={name: version(name) for name in ("torch", "onnx", "onnxscript")},
        licences=_licences(source.folder),
        files=list_files(folder),
    )


def _check_tokenizer(source: Checkpoint) -> None:
    """Find out before the work whether the bundle will take text."""
    if (source.folder / "tokenizer.json").exists():
        PromptBuilder.from_folder(source.folder, source.config)
    else:
        log.warning(
            "%s has no tokenizer.json: the bundle takes prompts as token ids only", source.folder
        )


def _limits(source: Checkpoint, spec: BuildSpec) -> Limits:
    max_frames = spec.max_frames
    preprocessing = source.folder / "video_preprocessor_config.json"
    if max_frames is None:
        max_frames = json_object(preprocessing).get("num_frames", DEFAULT_MAX_FRAMES)
        if type(max_frames) is not int:
            raise InputError(
                f"num_frames is {max_frames!r}", where=str(preprocessing), allowed="an integer"
            )
    return Limits(
        max_frames=max_frames,
        max_tokens=source.config.text.max_position_embeddings,
        min_prune_ratio=spec.min_prune_ratio,
    )


def _copy_config(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in _CONFIG_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def _licences(source: Path) -> dict[str, str]:
    held = [
        name for name in _CONFIG_FILES if name.startswith("LICENSE") and (source / name).exists()
    ]
    return {
        "stts-export": "Apache-2.0",
        "weights": f"config/{held[0]}" if held else "not stated by the checkpoint",
    }
