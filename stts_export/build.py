"""Checkpoint or bundle in, bundle out: graphs, and engines of the back ends that were asked for.

Work is kept stage by stage; an interrupted build resumes.
"""

from __future__ import annotations

import functools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts_export._version import __version__
from stts_export.build_folder import (
    CALIBRATION_FOLDER,
    LOCK,
    NUMERICS,
    STAMP,
    check_apart,
    check_name,
    check_paths,
    keep_graphs_of,
    locked,
    prepare,
    publish,
    readable_disk_errors,
)
from stts_export.bundle import (
    CONFIG_FOLDER,
    GRAPH_FOLDER,
    MANIFEST,
    POSITIONS,
    REPORT_FOLDER,
    Bundle,
    Judged,
    Limits,
    Manifest,
    Positions,
    is_bundle,
    list_files,
    sha256,
)
from stts_export.calibration.formats import check_formats, needs_engines
from stts_export.calibration.layers import Numerics
from stts_export.calibration.recipe import Recipe, check_recipe_name, is_recipe_of
from stts_export.chat_template import check_chat_template
from stts_export.config import ModelConfig
from stts_export.engines import tensorrt, tensorrt_rtx
from stts_export.engines.engine_build import (
    EngineSpec,
    Target,
    engine_specs,
    engines_from_graphs,
)
from stts_export.engines.engine_set import ENGINE_FOLDER, TIMING_CACHE
from stts_export.engines.library import BACKENDS, ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from stts_export.engines.onnxruntime import converts_weights
from stts_export.errors import InputError, MissingDependencyError, VerificationError
from stts_export.estimate import check_build
from stts_export.files import whole
from stts_export.limits import (
    DEFAULT_MAX_FRAMES,
    check_engine_frames,
    check_tokens,
    narrowed,
    needed_tokens,
)
from stts_export.preprocessing import ImagePreprocessing, image_preprocessing, video_preprocessing
from stts_export.progress import WRITING
from stts_export.runtime.prompt import PromptBuilder
from stts_export.sizes import looks_tied
from stts_export.tensors import (
    DATA_FILE,
    DECODER,
    DECOMPOSED,
    FIXED,
    MAX_CROPS,
    KvCache,
    Precision,
    graph_file,
    graph_specs,
    variant,
)

if TYPE_CHECKING:
    from stts_export.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_MAX_BYTES = 2**63 - 1
_LEFT_OUT = (STAMP, LOCK, CALIBRATION_FOLDER, NUMERICS)
_REPORTS = f"{REPORT_FOLDER}/quantization"
"""Beginning of the names of what `judge` writes."""

_EXPORTER = (
    "torch", "safetensors", "onnx", "onnxscript", "onnx_ir", "ml_dtypes", "onnxruntime",
)  # fmt: skip

OnStage = Callable[[str, int, int], None]
"""(what is done, number, of how many), called when a stage begins."""
OnPlan = Callable[[str], None]
"""Called with lines about memory and disk before the work begins."""
OnProgress = Callable[[str, int, int], None]
"""(engine, percent that is done, 100), called while an engine is built; (`WRITING` and a graph,
tensors that are written, of how many), called while its weights are written."""


@dataclass(frozen=True)
class BuildSpec:
    """What to build."""

    precision: str | None = None
    """Name of a recipe, such as fp16 or int8, or a YAML file; see `calibration.Recipe.load`. fp32
    when None; a bundle's own when built from a bundle."""
    max_frames: int | None = None
    """Longest clip in frames; the checkpoint's own `num_frames`, or 64, when None."""
    max_tokens: int | None = None
    """Longest sequence. When None, the model's or the bundle's longest; with engines, whose cache
    and temporary results have this length, only what the longest clip needs if that is less."""
    min_prune_ratio: float | None = None
    """Lowest ratio that the bundle accepts; 0, or a bundle's own, when None."""
    backends: tuple[str, ...] | None = None
    """The first is what the bundle runs on by default. ONNX Runtime is always among the targets,
    unless it has no kernels for the precision. ONNX Runtime alone, or, where it has none, graphs
    that engines are to be built from elsewhere, when None."""
    targets: tuple[str, ...] = ()
    """GPUs to build engines for, such as sm89; this machine's when empty."""
    memory_limit: int | None = None
    """Device memory that an engine may use for temporary results of a layer, in bytes."""
    plugin: Path | None = None
    """See `engines.plugin.find_plugin`."""
    positions: Positions | None = None
    """Of tokens after pruning, see `bundle.Positions`; compact, or a bundle's own, when None."""
    calibration: Path | None = None
    """Folder with scales for the recipe, as `calibrate` writes it; they are found when None."""
    clips: Path | None = None
    """What to calibrate and judge on, see `calibration.open_clip_set`."""
    auto: str | None = None
    """Device to find a recipe for, see `calibration.search.recipe_for_target`."""

    def __post_init__(self) -> None:
        for name, given in (("precision", self.precision), ("calibration", self.calibration)):
            if self.auto is not None and given is not None:
                raise InputError(
                    f"{name} {given} and auto {self.auto}",
                    where="build",
                    allowed="one of them: auto finds a recipe, and its scales",
                )
        if self.positions not in (None, *POSITIONS):
            raise InputError(
                f"positions {self.positions!r}", where="build", allowed=" or ".join(POSITIONS)
            )
        if self.backends is not None and not self.backends:
            raise InputError("no back end", where="build", allowed=" or ".join(BACKENDS))
        for backend in self.chosen_backends:
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

    @property
    def chosen_backends(self) -> tuple[str, ...]:
        """The back ends, each once."""
        return tuple(dict.fromkeys(self.backends or (ONNXRUNTIME,)))

    def _check_engine_options(self) -> None:
        """Refuse options that no back end would use."""
        engines = {TENSORRT, TENSORRT_RTX}
        given = (
            ("target", ", ".join(self.targets), engines),
            ("memory limit", self.memory_limit, engines),
            ("plugin", self.plugin, {TENSORRT}),
        )
        for name, value, users in given:
            if value and not users & set(self.chosen_backends):
                raise InputError(
                    f"{name} {value} is of no use to {', '.join(self.chosen_backends)}",
                    where="build",
                    fix=f"add --backend {' or '.join(sorted(users))}, or leave it out",
                )


def bundle_from_checkpoint(
    checkpoint: Path | str,
    output: Path,
    spec: BuildSpec | None = None,
    *,
    revision: str | None = None,
    tokenizer: Path | str | None = None,
    force: bool = False,
    on_plan: OnPlan | None = None,
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
        revision: see `checkpoint.open_checkpoint`.
        tokenizer: see `checkpoint.open_checkpoint`.
        force: replace an existing bundle.
        on_plan: called with lines about what is needed.
        on_stage: called when a stage begins.
        on_progress: called while weights are written and while an engine is built.

    Raises:
        InputError: the checkpoint, the output or the free disk space is at fault, another build
            is writing the same bundle, a target does not fit, or an engine cannot be built.
        VerificationError: a graph differs from the checkpoint.
        MissingDependencyError: torch, onnx, onnxruntime or what a back end needs is missing.
    """
    spec = spec or BuildSpec()
    if spec.precision is not None:
        check_recipe_name(spec.precision)
    check_name(output)
    partial = output.with_name(output.name + ".partial")
    with readable_disk_errors(Path(checkpoint), partial):
        check_apart(output, [Path(checkpoint)], "checkpoint")
        check_paths(output, force)
        if is_bundle(Path(checkpoint)):
            raise InputError(
                "is a bundle already",
                where=str(checkpoint),
                allowed="a checkpoint folder; a bundle runs on ONNX Runtime as it is",
                fix="to add engines to it, use `bundle_from_bundle`",
            )
        _check_exporter()
        from stts_export.calibration import building as applied
        from stts_export.checkpoint import check_tensors, open_checkpoint

        source = open_checkpoint(checkpoint, revision=revision, tokenizer=tokenizer)
        stats = source.stats()
        check_tensors(source)
        _check_tokenizer(source)
        with source.config_folder() as folder:
            images = image_preprocessing(folder, source.config.vision)
        limits = _limits(source, spec)
        if spec.auto is not None:  # all that can be refused before a search
            likely = applied.likely_recipe(spec.auto, source.config)
            base = _plan(source.config, Recipe.plain(likely.base), limits, spec, images)
            expected = replace(base, recipe=likely)
            _check_fits(partial, expected, None, tied=source.looks_tied, exported=False)
        precision = applied.precision_for_build(source, spec, limits, output, on_plan, on_progress)
        recipe = precision.recipe
        plan = _plan(source.config, recipe, limits, spec, images)
        if not plan.manifest_targets:
            log.warning(
                "ONNX Runtime has no kernels for %s: the bundle has graphs only, for `stts-export "
                "build BUNDLE --backend ...` on the machine that engines are for",
                recipe.name,
            )
        only_here = plan.manifest_targets == (ONNXRUNTIME,)
        formats = {rule.format for rule in precision.rules.values()}
        if only_here and converts_weights(recipe.base, formats):
            log.warning(
                "ONNX Runtime converts weights of recipe %s on every call, which is slow; for a "
                "CPU take --precision cpu",
                recipe.name,
            )
    with readable_disk_errors(source.folder, partial):
        check_apart(output, [source.folder, *source.files], "checkpoint")
        _check_fits(
            partial, plan, on_plan, tied=source.looks_tied, exported=False,
            calibrated=precision.given is not None,
        )  # fmt: skip

        numerics = Numerics(recipe.base)

        def fill(begin: Callable[[str], None]) -> None:
            nonlocal numerics
            try:
                numerics = precision.numerics(partial, begin, on_progress)
                keep_graphs_of(partial, numerics.digest())
                graphs_from_checkpoint(source, partial, numerics, begin, on_progress)
            except Exception:  # of weights that were replaced under it, anything
                source.check_unchanged(stats)
                raise
            source.write_config_files(partial / CONFIG_FOLDER)

        def manifest() -> Manifest:
            source.check_unchanged(stats)
            made = _manifest(source, partial, plan, spec.positions or "compact", numerics)
            if recipe.gates is None:
                return made
            # What is left by an interrupted build must not pass for a bundle without gates.
            return replace(made, judged=Judged(False, ("not judged yet",)))

        def judge(begin: Callable[[str], None], made: Manifest) -> Manifest:
            if recipe.gates is None:
                return made
            begin(applied.JUDGE)
            report = precision.judge(partial, numerics, on_progress)
            if not report.passed and (output.exists() or not force):
                raise applied.missed_gates(report, output, partial, force=force)
            for check in report.missed():
                log.warning("written by force: %s", check.line())
            files = list_files(partial, ignore=_LEFT_OUT)
            return replace(made, judged=applied.judged(report), files=files)

        stamp = {
            **_fingerprint(spec, plan),
            "exporter": _exporter_versions(),
            "files": stats,
            "recipe": recipe.to_dict(),
        }
        names = _export_stages(source, recipe.base, recipe.kv_cache)
        stages = [f"{stage}{_EXPORT}" for stage in names]
        stages = [*precision.stages_before(), *stages]
        work = _Work(
            output, partial, plan, stamp, stages, fill, manifest, precision.stages_after(), judge
        )
        _run(work, force, on_stage, on_progress)
        precision.forget_search()
    return output


def bundle_from_bundle(
    bundle: Path,
    output: Path,
    spec: BuildSpec,
    *,
    force: bool = False,
    on_plan: OnPlan | None = None,
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
        on_plan: called with lines about what is needed.
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
        if spec.chosen_backends == (ONNXRUNTIME,):
            raise InputError(
                "nothing to build: a bundle runs on ONNX Runtime as it is",
                where=str(bundle),
                fix=f"name a back end: --backend {TENSORRT} or {TENSORRT_RTX}",
            )
        limits = _narrowed(source, spec)
        images = image_preprocessing(source.folder / CONFIG_FOLDER, source.config.vision)
        recipe = Recipe.from_dict(source.manifest.recipe, str(bundle))
        plan = _plan(source.config, recipe, limits, spec, images, bundle)
        positions = spec.positions or source.manifest.positions
        judged = (source.manifest.positions, source.manifest.limits.min_prune_ratio)
        is_same = (positions, limits.min_prune_ratio) == judged
        files = _copied_files(source, with_reports=is_same)
        stored = files[f"{GRAPH_FOLDER}/{DECODER}/{DATA_FILE}"]["size"]
        tied = looks_tied(source.config, recipe.base, stored, recipe.plan(source.config))
        _check_fits(partial, plan, on_plan, tied=tied, exported=True)

        def fill(begin: Callable[[str], None]) -> None:
            begin(_COPY)
            _copy_files(source, partial, files, plan)

        def manifest() -> Manifest:
            made = _manifest_of_copy(source, partial, files, plan)
            return replace(made, positions=positions, judged=made.judged if is_same else None)

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
    recipe: Recipe
    limits: Limits
    targets: tuple[Target, ...]
    manifest_targets: tuple[str, ...]
    memory_limit: int | None

    @property
    def precision(self) -> Precision:
        """Of the graphs' inputs and outputs."""
        return self.recipe.base

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
    stages_after: Sequence[str] = ()
    """After the engines."""
    judge: Callable[[Callable[[str], None], Manifest], Manifest] | None = None
    """Called when all is there, with what to call when a stage begins and the manifest; returns
    the final one, or raises what keeps the bundle from being published."""


def _plan(
    config: ModelConfig,
    recipe: Recipe,
    limits: Limits,
    spec: BuildSpec,
    images: ImagePreprocessing,
    bundle: Path | None = None,
) -> _Plan:
    """Find out before the work whether every target can be built."""
    if spec.chosen_backends != (ONNXRUNTIME,):
        limits = _engine_limits(config, limits, spec)
        _check_crops(images)
    targets: list[Target] = []
    names: list[str] = []
    for backend in spec.chosen_backends:
        if backend == ONNXRUNTIME:
            if spec.backends is not None:
                check_formats(recipe, backend, None, None)
            if not needs_engines(recipe):
                names.append(backend)
            elif spec.backends is None:
                check_formats(recipe, TENSORRT, None, None)
            continue
        if backend == TENSORRT_RTX:
            found = tensorrt_rtx.targets(spec.targets)
        else:
            prunes = config.vision.pruning is not None
            found = tensorrt.targets(spec.targets, prunes=prunes, plugin=spec.plugin, bundle=bundle)
        for target in found:
            check_formats(recipe, backend, target.name, target.version)
        targets += found
        names += [target.folder for target in found]
    if ONNXRUNTIME not in names and not needs_engines(recipe):
        names.append(ONNXRUNTIME)
    return _Plan(config, recipe, limits, tuple(targets), tuple(names), spec.memory_limit)


def _engine_limits(config: ModelConfig, limits: Limits, spec: BuildSpec) -> Limits:
    """Refuse clips that engines cannot take; shorten the longest sequence to what a clip needs."""
    check_engine_frames(limits.max_frames, "build")
    if spec.max_tokens is not None:
        return limits
    needed = needed_tokens(config, limits.max_frames, limits.min_prune_ratio)
    return replace(limits, max_tokens=min(needed, limits.max_tokens))


def _check_crops(images: ImagePreprocessing) -> None:
    """Refuse images that engines cannot take."""
    if images.max_crops >= MAX_CROPS:
        raise InputError(
            f"max_crops of images is {images.max_crops}",
            where="build",
            allowed=f"up to {MAX_CROPS - 1} in engines: {MAX_CROPS} with the whole image",
            fix="lower max_crops in preprocessor_config.json, or build for "
            f"--backend {ONNXRUNTIME} only",
        )


def _run(
    work: _Work, force: bool, on_stage: OnStage | None, on_progress: OnProgress | None
) -> None:
    """Fill the working folder, build the engines, publish."""
    engines = [
        f"{name} for {target.backend} {target.name}"
        for target in work.plan.targets
        for name in engine_specs(target, work.plan.engines)
    ]
    stages = [*work.stages, *(f"build {engine}" for engine in engines), *work.stages_after]

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
        manifest = work.manifest()
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        if work.judge is not None:
            manifest = work.judge(begin, manifest)
            (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        shutil.rmtree(partial / CALIBRATION_FOLDER, ignore_errors=True)
        publish(partial, work.output, force)


def _export_stages(
    source: Checkpoint, precision: Precision, kv_cache: KvCache
) -> dict[str, list[str]]:
    """Graphs by the folder that they lie in, a stage each."""
    stages: dict[str, list[str]] = {}
    for name in graph_specs(source.config, precision, kv_cache):
        stages.setdefault(Path(graph_file(name)).parent.name, []).append(name)
    return stages


def graphs_from_checkpoint(
    source: Checkpoint,
    folder: Path,
    numerics: Numerics,
    begin: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Export and check the graphs that are not in `folder` yet.

    Weights go from the checkpoint's files to the graphs' tensor by tensor, and are read again where
    a graph is compared: nothing holds more than a layer of them.

    Args:
        source: the checkpoint.
        folder: bundle, or the working folder of one.
        numerics: types of weights and activations.
        begin: called when the export of a graph and its variants begins.
        on_progress: called while weights are written, with (what, tensors, of how many).
    """
    from stts_export.checkpoint import streamed_model
    from stts_export.graphs.export import export_graph

    stages = _export_stages(source, numerics.precision, numerics.kv_cache)
    graphs = folder / GRAPH_FOLDER
    todo = [stage for stage in stages if not (graphs / stage).is_dir()]
    if not todo:
        return
    model = streamed_model(source)
    unfinished = graphs / "unfinished"
    for stage in todo:
        if begin:
            begin(f"{stage}{_EXPORT}")
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in stages[stage]:
            on_tensor = functools.partial(on_progress, f"{WRITING}{name}") if on_progress else None
            export_graph(model, name, numerics, unfinished, on_tensor)
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


def _exporter_versions() -> dict[str, str]:
    """Other versions make other graphs."""
    return {name: str(getattr(import_module(name), "__version__", "")) for name in _EXPORTER}


def _fingerprint(spec: BuildSpec, plan: _Plan) -> dict[str, Any]:
    """What a rerun must have in common to go on from what is there."""
    plugins = {target.plugin for target in plan.targets if target.plugin}
    return {
        "stts_export": __version__,
        "spec": {
            key: value if value is None else str(value) for key, value in asdict(spec).items()
        },
        "limits": asdict(plan.limits),
        "targets": [[target.folder, target.version] for target in plan.targets],
        "plugins": [[str(path), path.stat().st_mtime_ns] for path in sorted(plugins)],
    }


def _check_fits(
    partial: Path,
    plan: _Plan,
    on_plan: OnPlan | None,
    *,
    tied: bool,
    exported: bool,
    calibrated: bool = False,
) -> None:
    """Say what the build will need, and refuse before hours are spent; see `check_build`."""
    lines = check_build(
        plan.config,
        output=partial,
        recipe=plan.recipe,
        max_frames=plan.limits.max_frames,
        max_tokens=plan.limits.max_tokens,
        min_prune_ratio=plan.limits.min_prune_ratio,
        backends=tuple(
            (target.backend, any(name.endswith(DECOMPOSED) for name in target.graphs))
            for target in plan.targets
        ),
        tied=tied,
        exported=exported,
        calibrated=calibrated,
        done=sum(path.stat().st_size for path in partial.rglob("*") if path.is_file()),
    )
    if on_plan:
        for line in lines:
            on_plan(line)


def _manifest(
    source: Checkpoint,
    folder: Path,
    plan: _Plan,
    positions: Positions,
    numerics: Numerics,
) -> Manifest:
    formats = {name: layer.format for name, layer in numerics.layers.items()}
    return Manifest(
        has_scorer=source.has_scorer,
        precision=plan.precision,
        limits=plan.limits,
        graphs=tuple(graph_specs(source.config, plan.precision, numerics.kv_cache)),
        targets=plan.manifest_targets,
        source=source.name,
        tool_versions={
            **{name: version(name) for name in ("torch", "onnx", "onnxscript")},
            **_engine_tools(plan),
        },
        licences=_licences(source),
        files=list_files(folder, ignore=_LEFT_OUT),
        positions=positions,
        recipe=plan.recipe.to_dict(),
        formats={**formats, **dict.fromkeys(numerics.fp32_layers, "fp32")},
    )


def _engine_tools(plan: _Plan) -> dict[str, str]:
    return {target.backend: target.version for target in plan.targets}


def _manifest_of_copy(
    source: Bundle, folder: Path, copied: dict[str, dict[str, Any]], plan: _Plan
) -> Manifest:
    """Make the manifest; refuse copies that were changed since they were made."""
    files = list_files(folder, ignore=_LEFT_OUT)
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


def _copied_files(source: Bundle, *, with_reports: bool) -> dict[str, dict[str, Any]]:
    """Graphs and configuration; a decoder of fixed capacity belongs to the engines."""
    fixed = f"{GRAPH_FOLDER}/{graph_file(variant(DECODER, FIXED))}"
    folders = (f"{GRAPH_FOLDER}/", f"{CONFIG_FOLDER}/") + (_REPORTS,) * with_reports
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
    built = source.manifest.precision_name
    if spec.precision is not None and not is_recipe_of(spec.precision, source.manifest.recipe):
        check_recipe_name(spec.precision)
        quantised = " quantised already, to" if source.manifest.formats else ""
        raise InputError(
            f"precision {spec.precision}, but the bundle's graphs are{quantised} {built}",
            where=where,
            fix=f"leave --precision out, or build {spec.precision} from the checkpoint",
        )
    options = (("calibration", spec.calibration), ("clips", spec.clips), ("auto", spec.auto))
    for name, given in options:
        if given is not None:
            raise InputError(
                f"{name} {given} is of no use: a bundle's graphs have their formats",
                where=where,
                fix="leave it out, or build from the checkpoint",
            )
    return narrowed(
        own,
        where,
        max_frames=spec.max_frames,
        max_tokens=spec.max_tokens,
        min_prune_ratio=spec.min_prune_ratio,
    )


def _check_tokenizer(source: Checkpoint) -> None:
    """Find out before the work whether the bundle will take text, and say whether it will prune."""
    if not source.has_scorer:
        log.warning("%s has no scorer: the bundle will remove nothing", source.name)
    if "tokenizer.json" in source.config_files:
        with source.config_folder() as folder:
            check_chat_template(folder)
            PromptBuilder.from_folder(folder, source.config)
    else:
        log.warning(
            "%s has no tokenizer.json: the bundle takes prompts as token ids only; "
            "--tokenizer adds one",
            source.name,
        )


def _limits(source: Checkpoint, spec: BuildSpec) -> Limits:
    with source.config_folder() as folder:
        video = video_preprocessing(folder, source.config.vision)
    check_tokens(source.config, spec.max_tokens, "build")
    return Limits(
        max_frames=spec.max_frames or video.num_frames or DEFAULT_MAX_FRAMES,
        max_tokens=spec.max_tokens or source.config.text.max_position_embeddings,
        min_prune_ratio=spec.min_prune_ratio or 0.0,
        max_fps=video.max_fps,
    )


def _licences(source: Checkpoint) -> dict[str, str]:
    held = [name for name in source.config_files if name.startswith("LICENSE")]
    return {
        "stts-export": "Apache-2.0",
        "weights": f"config/{held[0]}" if held else "not stated by the checkpoint",
    }
