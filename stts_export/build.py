"""Checkpoint in, bundle out. Every stage can be rerun alone; an interrupted build resumes."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
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
from stts_export.files import check_utf8, readable_size, write_json
from stts_export.preprocessing import video_preprocessing
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

# In the working folder only: what is being built, and the lock of the build that does it.
_STAMP, _LOCK = "build.json", "build.lock"
_EXPORTER = (
    "torch", "safetensors", "onnx", "onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime",
)  # fmt: skip
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
        if not self.backends:
            raise InputError("no back end", where="build", allowed=" or ".join(BACKENDS))
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
        InputError: the checkpoint, the output or the free disk space is at fault, or another build
            is writing the same bundle.
        VerificationError: a graph differs from the checkpoint.
        MissingDependencyError: torch, onnx or onnxruntime is not installed.
    """
    spec = spec or BuildSpec()
    _check_name(output)
    partial = output.with_name(output.name + ".partial")
    with _readable_disk_errors(checkpoint, partial):
        _check_apart(output, [checkpoint])
        _check_paths(output, force)
        if is_bundle(checkpoint):
            raise InputError(
                "is a bundle already",
                where=str(checkpoint),
                allowed="a checkpoint folder; a bundle runs on ONNX Runtime as it is",
            )
        _check_exporter()
        from stts_export.checkpoint import check_tensors, open_checkpoint

        source = open_checkpoint(checkpoint)
        check_tensors(source)
        _check_tokenizer(source)
        limits = _limits(source, spec)
    with _readable_disk_errors(source.folder, partial):
        _check_apart(output, [source.folder, *source.file_of.values()])
        _check_space(partial, source, spec)
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial):
            _prepare(partial, source, spec)
            graphs_from_checkpoint(source, partial, spec, on_stage)
            _copy_config(source.folder, partial / CONFIG_FOLDER)
            manifest = _manifest(source, partial, spec, limits)
            (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
            _publish(partial, output, force)
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
        if stage not in todo:
            continue
        if on_stage:
            on_stage(stage, number, len(stages))
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in stages[stage]:
            export_graph(model, name, spec.precision, unfinished)
        os.replace(unfinished / stage, graphs / stage)
    unfinished.rmdir()


def _check_exporter() -> None:
    """Find out before the work whether everything that it needs is installed."""
    try:
        for name in _EXPORTER:
            import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"building from a checkpoint needs a package that is not installed: {error}",
            where="build",
            fix="pip install 'stts-export[cpu,export]'",
        ) from None


def _check_name(output: Path) -> None:
    check_utf8(output)
    if output.name in ("", ".."):
        raise InputError(
            "is not the name of a new folder", where=str(output), allowed="a name, such as bundle"
        )


def _check_apart(output: Path, read: Iterable[Path]) -> None:
    """Refuse to write where the checkpoint is read from."""
    for folder in (output, output.with_name(output.name + ".partial")):
        target = Path(os.path.realpath(folder))
        for path in read:
            real = Path(os.path.realpath(path))
            if target.is_relative_to(real) or real.is_relative_to(target):
                raise InputError(
                    f"overlaps the checkpoint ({path})",
                    where=str(folder),
                    fix="choose an output outside the checkpoint",
                )


def _check_paths(output: Path, force: bool) -> None:
    """Refuse an output that cannot be written, or whose writing would remove what is not ours."""
    _check_output(output, force)
    partial = output.with_name(output.name + ".partial")
    if os.path.lexists(partial) and not _is_working_folder(partial):
        raise InputError(
            "exists and is not an unfinished build",
            where=str(partial),
            fix="move it away, or choose another output",
        )
    _old_name(output).exists()  # OSError when the name is too long
    parent = next(folder for folder in output.absolute().parents if os.path.lexists(folder))
    if not parent.is_dir():
        raise InputError("is not a folder", where=str(parent), fix="choose another output")


def _check_output(output: Path, force: bool) -> None:
    if not os.path.lexists(output):
        return
    if output.is_symlink() or not is_bundle(output):
        kind = "a symbolic link" if output.is_symlink() else "not a bundle"
        raise InputError(
            f"exists already and is {kind}; only bundles are ever replaced",
            where=str(output),
            fix="choose another name",
        )
    if not force:
        raise InputError(
            "exists already",
            where=str(output),
            fix="choose another name, or add --force to replace the bundle",
        )


def _is_working_folder(partial: Path) -> bool:
    """Whether a folder was made by a build of ours: it holds the stamp, or nothing of a user's."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    names = {path.name for path in partial.iterdir()}
    return _STAMP in names or names <= {_LOCK, f"{_STAMP}.partial"}


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keep other builds out of the working folder; the lock goes with the process."""
    path = partial / _LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the build that held the lock may have finished.
            held = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            held = False
        if not held:
            raise InputError(
                "another build is writing here",
                where=str(partial),
                fix="wait for it, or choose another output",
            )
        yield


def _publish(partial: Path, output: Path, force: bool) -> None:
    """Give the working folder its final name; an existing bundle goes when that is done."""
    _check_output(output, force)  # it may have appeared during the build
    replaces = output.exists()
    old = _old_name(output)
    try:
        if replaces:
            output.rename(old)
        partial.rename(output)
    except BaseException:
        if replaces and not output.exists():
            old.rename(output)
        raise
    for name in (_STAMP, _LOCK):
        (output / name).unlink(missing_ok=True)
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            log.warning("%s, the bundle before, could not be removed", old)


def _old_name(output: Path) -> Path:
    return output.with_name(f"{output.name}.old-{os.getpid()}")


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
    if not resumable:
        write_json(partial / _STAMP, {})  # ours, and nothing to go on from
        _empty(partial)
    (partial / GRAPH_FOLDER).mkdir(exist_ok=True)
    write_json(partial / _STAMP, stamp)


def _empty(partial: Path) -> None:
    """Remove what another build left."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (_STAMP, _LOCK):
            path.unlink()


def _check_space(partial: Path, source: Checkpoint, spec: BuildSpec) -> None:
    """Refuse before hours are spent; an upper bound from the checkpoint's size."""
    stored = sum(path.stat().st_size for path in set(source.file_of.values()))
    # A checkpoint of 2-byte weights doubles in fp32.
    needed = int(stored * (2 if _BYTES[spec.precision] == 4 else 1) * 1.3)
    done = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    folder = next(folder for folder in partial.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed - done:
        raise InputError(
            f"{readable_size(free)} free",
            where=str(folder),
            allowed=f"about {readable_size(needed)} for this bundle",
            fix="free some space, choose another disk with -o, or build with --precision fp16",
        )


@contextmanager
def _readable_disk_errors(source: Path, partial: Path) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # of the terminal, not of a file
        raise
    except OSError as error:
        file = error.filename if isinstance(error.filename, str) else str(partial)
        problem = error.strerror or str(error)
        if Path(os.path.abspath(file)).is_relative_to(os.path.abspath(source)):
            raise InputError(f"cannot be read: {problem}", where=file) from error
        done = f", then rerun: {partial} keeps what is done" if os.path.isdir(partial) else ""
        raise InputError(
            f"cannot be written: {problem}",
            where=file,
            fix=f"free space or choose another folder{done}",
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
        files=list_files(folder, ignore=(_STAMP, _LOCK)),
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
    video = video_preprocessing(source.folder, source.config.vision)
    return Limits(
        max_frames=spec.max_frames or video.num_frames or DEFAULT_MAX_FRAMES,
        max_tokens=source.config.text.max_position_embeddings,
        min_prune_ratio=spec.min_prune_ratio,
        max_fps=video.max_fps,
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
