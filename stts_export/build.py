"""Checkpoint or bundle in, bundle out: graphs, and engines of the back ends that were asked for.

Work is kept stage by stage; an interrupted build resumes.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts_export._version import __version__
from stts_export.build_folder import (
    LOCK,
    STAMP,
    check_apart,
    check_name,
    check_paths,
    locked,
    prepare,
    publish,
    readable_disk_errors,
)
from stts_export.bundle import (
    CONFIG_FOLDER,
    GRAPH_FOLDER,
    MANIFEST,
    ONNXRUNTIME,
    Bundle,
    Limits,
    Manifest,
    is_bundle,
    list_files,
    sha256,
)
from stts_export.config import ModelConfig
from stts_export.engines import tensorrt, tensorrt_rtx
from stts_export.engines.engine_build import (
    EngineSpec,
    Target,
    engine_specs,
    engines_from_graphs,
)
from stts_export.engines.engine_set import ENGINE_FOLDER, TIMING_CACHE
from stts_export.engines.library import TENSORRT, TENSORRT_RTX
from stts_export.errors import InputError, MissingDependencyError, VerificationError
from stts_export.files import readable_size, whole
from stts_export.preprocessing import video_preprocessing
from stts_export.runtime.planner import n_prune
from stts_export.runtime.prompt import PromptBuilder
from stts_export.tensors import (
    DECODER,
    FIXED,
    PRECISIONS,
    Precision,
    graph_file,
    graph_specs,
    variant,
)

if TYPE_CHECKING:
    from stts_export.checkpoint import Checkpoint

log = logging.getLogger(__name__)

BACKENDS = (ONNXRUNTIME, TENSORRT, TENSORRT_RTX)
DEFAULT_MAX_FRAMES = 64
MAX_ENGINE_FRAMES = 4096
"""Longest clip of the plugin."""
_FRAME_TOKENS, _TEXT_TOKENS = 12, 1024
"""Room for a frame's timestamp and marks, and for question and answer together."""
_MAX_BYTES = 2**63 - 1

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
_ENGINE_CODE = 50_000_000
"""Bytes that the engines of a target need beside their weights, at most."""

OnStage = Callable[[str, int, int], None]
"""(what is done, number, of how many), called when a stage begins."""
OnProgress = Callable[[str, int, int], None]
"""(engine, percent that is done, 100), called while an engine is built."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build."""

    precision: Precision | None = None
    """fp32 when None; a bundle's own when built from a bundle."""
    max_frames: int | None = None
    """Longest clip in frames; the checkpoint's own `num_frames`, or 64, when None."""
    max_tokens: int | None = None
    """Longest sequence. When None, the model's or the bundle's longest; with engines, whose cache
    and temporary results have this length, only what the longest clip needs if that is less."""
    min_prune_ratio: float | None = None
    """Lowest ratio that the bundle accepts; 0, or a bundle's own, when None."""
    backends: tuple[str, ...] = (ONNXRUNTIME,)
    """The first is what the bundle runs on by default. ONNX Runtime is always among the targets."""
    targets: tuple[str, ...] = ()
    """GPUs to build engines for, such as sm89; this machine's when empty."""
    memory_limit: int | None = None
    """Device memory that an engine may use for temporary results of a layer, in bytes."""
    plugin: Path | None = None
    """See `engines.plugin.find_plugin`."""

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
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
        for name in ("max_frames", "max_tokens", "memory_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", where="build", allowed="1 or more")
        if self.memory_limit is not None and self.memory_limit > _MAX_BYTES:
            raise InputError(
                f"memory_limit is {self.memory_limit} bytes",
                where="build",
                allowed=f"up to {_MAX_BYTES}",
                fix="leave it out to allow all memory that there is",
            )
        self._check_engine_options()

    def _check_engine_options(self) -> None:
        """Refuse options that no back end would use."""
        engines = {TENSORRT, TENSORRT_RTX}
        given = (
            ("target", ", ".join(self.targets), engines),
            ("memory limit", self.memory_limit, engines),
            ("plugin", self.plugin, {TENSORRT}),
        )
        for name, value, users in given:
            if value and not users & set(self.backends):
                raise InputError(
                    f"{name} {value} is of no use to {', '.join(self.backends)}",
                    where="build",
                    fix=f"add --backend {' or '.join(sorted(users))}, or leave it out",
                )


def bundle_from_checkpoint(
    checkpoint: Path,
    output: Path,
    spec: BuildSpec | None = None,
    *,
    force: bool = False,
    on_stage: OnStage | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Build a bundle.

    Work happens in `output` + ".partial", which keeps finished graphs and engines and is renamed
    when all is done; a rerun with the same arguments goes on from there.

    Args:
        checkpoint: see `checkpoint.open_checkpoint`.
        output: folder to write; must not exist unless `force` and it is a bundle.
        spec: what to build.
        force: replace an existing bundle.
        on_stage: called when a stage begins.
        on_progress: called while an engine is built.

    Raises:
        InputError: the checkpoint, the output or the free disk space is at fault, another build
            is writing the same bundle, a target does not fit, or an engine cannot be built.
        VerificationError: a graph differs from the checkpoint.
        MissingDependencyError: torch, onnx, onnxruntime or what a back end needs is missing.
    """
    spec = spec or BuildSpec()
    check_name(output)
    partial = output.with_name(output.name + ".partial")
    with readable_disk_errors(checkpoint, partial):
        check_apart(output, [checkpoint], "checkpoint")
        check_paths(output, force)
        if is_bundle(checkpoint):
            raise InputError(
                "is a bundle already",
                where=str(checkpoint),
                allowed="a checkpoint folder; a bundle runs on ONNX Runtime as it is",
                fix="to add engines to it, use `bundle_from_bundle`",
            )
        _check_exporter()
        from stts_export.checkpoint import check_tensors, open_checkpoint

        source = open_checkpoint(checkpoint)
        check_tensors(source)
        _check_tokenizer(source)
        plan = _plan(source.config, spec.precision or "fp32", _limits(source, spec), spec)
    with readable_disk_errors(source.folder, partial):
        check_apart(output, [source.folder, *source.file_of.values()], "checkpoint")
        stored = sum(path.stat().st_size for path in set(source.file_of.values()))
        # A checkpoint of 2-byte weights doubles in fp32.
        graph_bytes = int(stored * (2 if _BYTES[plan.precision] == 4 else 1) * 1.3)
        _check_space(partial, plan, graph_bytes)

        def fill(begin: Callable[[str], None]) -> None:
            graphs_from_checkpoint(source, partial, plan.precision, begin)
            _copy_config(source.folder, partial / CONFIG_FOLDER)

        def manifest() -> Manifest:
            return _manifest(source, partial, plan)

        stamp = {**_fingerprint(spec, plan), "files": _stats(source)}
        stages = [f"{stage}{_EXPORT}" for stage in _export_stages(source, plan.precision)]
        work = _Work(output, partial, plan, stamp, stages, fill, manifest)
        _run(work, force, on_stage, on_progress)
    return output


def bundle_from_bundle(
    bundle: Path,
    output: Path,
    spec: BuildSpec,
    *,
    force: bool = False,
    on_stage: OnStage | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Build engines for other back ends from a bundle's graphs; needs neither torch nor onnx.

    Graphs and configuration are copied and compared with the bundle's hashes; engines that the
    bundle has are not. See `bundle_from_checkpoint` for how work is kept.

    Args:
        bundle: folder of a bundle.
        output: another folder; see `bundle_from_checkpoint`.
        spec: what to build, within the limits of the bundle.
        force: replace an existing bundle.
        on_stage: called when a stage begins.
        on_progress: called while an engine is built.

    Raises:
        InputError: the bundle or the output is at fault, the spec asks for what the bundle does
            not have, a target does not fit, or an engine cannot be built.
        VerificationError: a file of the bundle was changed.
        MissingDependencyError: what a back end needs is missing.
    """
    check_name(output)
    partial = output.with_name(output.name + ".partial")
    with readable_disk_errors(bundle, partial):
        check_apart(output, [bundle], "bundle")
        check_paths(output, force)
        source = Bundle.open(bundle)
        if set(spec.backends) == {ONNXRUNTIME}:
            raise InputError(
                "nothing to build: a bundle runs on ONNX Runtime as it is",
                where=str(bundle),
                fix=f"name a back end: --backend {TENSORRT} or {TENSORRT_RTX}",
            )
        limits = _narrowed(source, spec)
        plan = _plan(source.config, source.manifest.precision, limits, spec, bundle)
        files = _copied_files(source)
        _check_space(partial, plan, sum(entry["size"] for entry in files.values()))

        def fill(begin: Callable[[str], None]) -> None:
            begin(_COPY)
            _copy_files(source, partial, files, plan)

        def manifest() -> Manifest:
            return _manifest_of_copy(source, partial, files, plan)

        stamp = {**_fingerprint(spec, plan), "files": files}
        work = _Work(output, partial, plan, stamp, [_COPY], fill, manifest)
        _run(work, force, on_stage, on_progress)
    return output


_EXPORT = ": export and compare with PyTorch"
_COPY = "copy the graphs"


@dataclass(frozen=True)
class _Plan:
    """What is built, with nothing left open."""

    config: ModelConfig
    precision: Precision
    limits: Limits
    targets: tuple[Target, ...]
    manifest_targets: tuple[str, ...]
    memory_limit: int | None

    @property
    def engines(self) -> EngineSpec:
        return EngineSpec(
            self.config,
            self.precision,
            self.limits.max_frames,
            self.limits.max_tokens,
            self.memory_limit,
        )


@dataclass(frozen=True)
class _Work:
    """One build: where, what, and the two steps in which checkpoints and bundles differ."""

    output: Path
    partial: Path
    plan: _Plan
    stamp: dict[str, Any]
    stages: list[str]
    """Before the engines."""
    fill: Callable[[Callable[[str], None]], None]
    """Write graphs and configuration; gets what to call when a stage begins."""
    manifest: Callable[[], Manifest]


def _plan(
    config: ModelConfig,
    precision: Precision,
    limits: Limits,
    spec: BuildSpec,
    bundle: Path | None = None,
) -> _Plan:
    """Find out before the work whether every target can be built."""
    if set(spec.backends) != {ONNXRUNTIME}:
        limits = _engine_limits(config, limits, spec)
    targets: list[Target] = []
    names: list[str] = []
    for backend in dict.fromkeys(spec.backends):
        if backend == ONNXRUNTIME:
            names.append(backend)
            continue
        if backend == TENSORRT_RTX:
            found = tensorrt_rtx.targets(spec.targets)
        else:
            prunes = config.vision.pruning is not None
            found = tensorrt.targets(spec.targets, prunes=prunes, plugin=spec.plugin, bundle=bundle)
        targets += found
        names += [target.folder for target in found]
    if ONNXRUNTIME not in names:
        names.append(ONNXRUNTIME)
    return _Plan(config, precision, limits, tuple(targets), tuple(names), spec.memory_limit)


def _engine_limits(config: ModelConfig, limits: Limits, spec: BuildSpec) -> Limits:
    """Refuse clips that engines cannot take; shorten the longest sequence to what a clip needs."""
    frames = limits.max_frames
    if frames > MAX_ENGINE_FRAMES:
        raise InputError(
            f"max_frames is {frames}",
            where="build",
            allowed=f"up to {MAX_ENGINE_FRAMES} in engines",
            fix=f"pass --max-frames, such as --max-frames {DEFAULT_MAX_FRAMES}",
        )
    if spec.max_tokens is not None:
        return limits
    windows = frames * config.vision.windows
    if config.vision.pruning is not None:
        windows -= n_prune(config.vision.windows, frames, limits.min_prune_ratio)
    needed = windows + frames * _FRAME_TOKENS + _TEXT_TOKENS
    return replace(limits, max_tokens=min(needed, limits.max_tokens))


def _run(
    work: _Work, force: bool, on_stage: OnStage | None, on_progress: OnProgress | None
) -> None:
    """Fill the working folder, build the engines, publish."""
    engines = [
        f"{name} for {target.backend} {target.name}"
        for target in work.plan.targets
        for name in engine_specs(target, work.plan.engines)
    ]
    stages = [*work.stages, *(f"build {engine}" for engine in engines)]

    def begin(stage: str) -> None:
        if on_stage:
            on_stage(stage, stages.index(stage) + 1, len(stages))

    def progress(engine: str, fraction: float) -> None:
        if on_progress:
            on_progress(engine, int(100 * fraction), 100)

    partial = work.partial
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        prepare(partial, work.stamp)
        work.fill(begin)
        for target in work.plan.targets:
            engines_from_graphs(partial, target, work.plan.engines, begin, progress)
        (partial / MANIFEST).write_text(work.manifest().to_json(), encoding="utf-8")
        publish(partial, work.output, force)


def _export_stages(source: Checkpoint, precision: Precision) -> dict[str, list[str]]:
    """Graphs by the folder that they lie in, a stage each."""
    stages: dict[str, list[str]] = {}
    for name in graph_specs(source.config, precision):
        stages.setdefault(Path(graph_file(name)).parent.name, []).append(name)
    return stages


def graphs_from_checkpoint(
    source: Checkpoint,
    folder: Path,
    precision: Precision,
    begin: Callable[[str], None] | None = None,
) -> None:
    """Export and check the graphs that are not in `folder` yet.

    Args:
        source: the checkpoint.
        folder: bundle, or the working folder of one.
        precision: type of weights and activations.
        begin: called when the export of a graph and its variants begins.
    """
    from stts_export.checkpoint import model_from_checkpoint
    from stts_export.graphs.export import export_graph

    stages = _export_stages(source, precision)
    graphs = folder / GRAPH_FOLDER
    todo = [stage for stage in stages if not (graphs / stage).is_dir()]
    if not todo:
        return
    model = model_from_checkpoint(source)
    unfinished = graphs / "unfinished"
    for stage in todo:
        if begin:
            begin(f"{stage}{_EXPORT}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in stages[stage]:
            export_graph(model, name, precision, unfinished)
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


def _fingerprint(spec: BuildSpec, plan: _Plan) -> dict[str, Any]:
    """What a rerun must have in common to go on from what is there."""
    plugins = {target.plugin for target in plan.targets if target.plugin}
    return {
        "stts_export": __version__,
        "spec": {**asdict(spec), "plugin": str(spec.plugin)},
        "limits": asdict(plan.limits),
        "targets": [[target.folder, target.version] for target in plan.targets],
        "plugins": [[str(path), path.stat().st_mtime_ns] for path in sorted(plugins)],
    }


def _stats(source: Checkpoint) -> dict[str, list[int]]:
    files = sorted({*source.file_of.values(), source.folder / "config.json"})
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _check_space(partial: Path, plan: _Plan, graph_bytes: int) -> None:
    """Refuse before hours are spent; an upper bound from the size of the graphs.

    A set of engines is about as large as the graphs: both are weights for the most part.
    """
    needed = graph_bytes * (1 + len(plan.targets)) + _ENGINE_CODE * len(plan.targets)
    done = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    folder = next(folder for folder in partial.absolute().parents if folder.exists())
    usage = shutil.disk_usage(folder)
    if usage.total and usage.free < needed - done:  # /proc has no total
        raise InputError(
            f"{readable_size(usage.free)} free",
            where=str(folder),
            allowed=f"about {readable_size(needed)} for this bundle",
            fix="free some space, choose another disk with -o, or build with --precision fp16",
        )


def _manifest(source: Checkpoint, folder: Path, plan: _Plan) -> Manifest:
    return Manifest(
        has_scorer=source.has_scorer,
        precision=plan.precision,
        limits=plan.limits,
        graphs=tuple(graph_specs(source.config, plan.precision)),
        targets=plan.manifest_targets,
        source=source.folder.name,
        tool_versions={
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
            **_engine_tools(plan),
        },
        licences=_licences(source.folder),
        files=list_files(folder, ignore=(STAMP, LOCK)),
    )


def _engine_tools(plan: _Plan) -> dict[str, str]:
    return {target.backend: target.version for target in plan.targets}


def _manifest_of_copy(
    source: Bundle, folder: Path, copied: dict[str, dict[str, Any]], plan: _Plan
) -> Manifest:
    """Make the manifest; refuse copies that were changed since they were made."""
    files = list_files(folder, ignore=(STAMP, LOCK))
    for name, entry in copied.items():
        if files.get(name) != entry:
            raise VerificationError(
                "was changed while the engines were built",
                where=str(folder / name),
                fix=f"remove {folder} and build again",
            )
    tools = {k: v for k, v in source.manifest.tool_versions.items() if k not in BACKENDS}
    return replace(
        source.manifest,
        limits=plan.limits,
        targets=plan.manifest_targets,
        tool_versions={**tools, **_engine_tools(plan)},
        files=files,
        stts_export=__version__,
    )


def _copied_files(source: Bundle) -> dict[str, dict[str, Any]]:
    """Graphs and configuration; a decoder of fixed capacity belongs to the engines."""
    fixed = f"{GRAPH_FOLDER}/{graph_file(variant(DECODER, FIXED))}"
    folders = (f"{GRAPH_FOLDER}/", f"{CONFIG_FOLDER}/")
    return {
        name: entry
        for name, entry in source.manifest.files.items()
        if name.startswith(folders) and name != fixed
    }


def _copy_files(
    source: Bundle, partial: Path, files: dict[str, dict[str, Any]], plan: _Plan
) -> None:
    """Copy what is not there yet, and times measured before for the same targets.

    Real copies: a hard link would let a change of one bundle damage the other, and `onnx` refuses
    weights with several links.
    """
    for name, entry in files.items():
        _copy(source.folder / name, partial / name, entry["sha256"])
    for target in plan.targets:
        cache = f"{ENGINE_FOLDER}/{target.folder}/{TIMING_CACHE}"
        if cache in source.manifest.files:
            _copy(source.folder / cache, partial / cache)


def _copy(source: Path, target: Path, digest: str | None = None) -> None:
    """Copy what is not there yet; refuse what does not have the SHA-256, if one is given."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as unfinished:
        shutil.copyfile(source, unfinished)
        if digest is not None and sha256(unfinished) != digest:
            raise VerificationError(
                "was changed after the build (its SHA-256 differs from the manifest)",
                where=str(source),
                fix="copy the bundle again, or build it again with `stts-export build`",
            )


def _narrowed(source: Bundle, spec: BuildSpec) -> Limits:
    """Limits of a bundle that is built from a bundle: the same or narrower."""
    own, where = source.manifest.limits, str(source.folder)
    if spec.precision not in (None, source.manifest.precision):
        raise InputError(
            f"precision {spec.precision}, but the bundle's graphs are {source.manifest.precision}",
            where=where,
            fix=f"leave --precision out, or build {spec.precision} from the checkpoint",
        )
    for name in ("max_frames", "max_tokens"):
        asked, most = getattr(spec, name), getattr(own, name)
        if asked is not None and asked > most:
            raise InputError(
                f"{name} is {asked}",
                where=where,
                allowed=f"up to {most}, the bundle's limit",
                fix="leave it out, or build a new bundle from the checkpoint",
            )
    if spec.min_prune_ratio is not None and spec.min_prune_ratio < own.min_prune_ratio:
        raise InputError(
            f"min_prune_ratio is {spec.min_prune_ratio:g}",
            where=where,
            allowed=f"{own.min_prune_ratio:g} or more, the bundle's limit",
            fix="leave it out, or build a new bundle from the checkpoint",
        )
    return Limits(
        max_frames=spec.max_frames or own.max_frames,
        max_tokens=spec.max_tokens or own.max_tokens,
        min_prune_ratio=own.min_prune_ratio
        if spec.min_prune_ratio is None
        else spec.min_prune_ratio,
        max_fps=own.max_fps,
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
    longest = source.config.text.max_position_embeddings
    if spec.max_tokens is not None and spec.max_tokens > longest:
        raise InputError(
            f"max_tokens is {spec.max_tokens}",
            where="build",
            allowed=f"up to {longest}, the checkpoint's max_position_embeddings",
        )
    return Limits(
        max_frames=spec.max_frames or video.num_frames or DEFAULT_MAX_FRAMES,
        max_tokens=spec.max_tokens or longest,
        min_prune_ratio=spec.min_prune_ratio or 0.0,
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
