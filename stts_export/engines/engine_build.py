"""Engines from graphs: which graphs a target takes, in which form, and building them one by one."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stts_export.bundle import GRAPH_FOLDER
from stts_export.config import ModelConfig
from stts_export.engines.engine_set import (
    ENGINE_FOLDER,
    TIMING_CACHE,
    EngineInfo,
    EngineSet,
    folder_name,
)
from stts_export.engines.network import EngineJob
from stts_export.engines.plugin import PLUGIN_FILE, PLUGIN_FOLDER
from stts_export.engines.worker import run_job
from stts_export.errors import InputError
from stts_export.graphs.axes import with_fixed_axes
from stts_export.tensors import (
    CAPACITY,
    DECODER,
    FIXED,
    SELECT_PACK,
    GraphSpec,
    Precision,
    Profile,
    Range,
    TensorSpec,
    graph_file,
    graph_specs,
    profiles,
    variant,
)

OnStage = Callable[[str], None]
OnFraction = Callable[[str, float], None]


@dataclass(frozen=True)
class Target:
    """One back end, library version and GPU to build engines for."""

    backend: str
    module: str
    """The library's Python module."""
    version: str
    """The library's, in full."""
    name: str
    """Such as sm89."""
    graphs: tuple[str, ...]
    """Names of the graphs it takes, variants included, if the model has them."""
    compute_capabilities: tuple[str, ...] = ()
    """What the library is told to build for; this machine's GPU when empty."""
    plugin: Path | None = None
    one_profile: bool = False
    """Whether an engine has one profile for all calls: where the library gives each profile weights
    of its own."""

    @property
    def folder(self) -> str:
        """Name of the engine folder, and of the target in a manifest."""
        return folder_name(self.backend, self.version, self.name)


@dataclass(frozen=True)
class EngineSpec:
    """What engines are built from and for."""

    config: ModelConfig
    precision: Precision
    max_frames: int
    max_tokens: int
    memory_limit: int | None = None
    """Bytes."""


def engine_specs(target: Target, spec: EngineSpec) -> dict[str, GraphSpec]:
    """Interfaces of the graphs that a target's engines are built from, by graph without variant."""
    known = graph_specs(spec.config, spec.precision)
    found = {name.partition("-")[0]: known[name] for name in target.graphs if name in known}
    if found[DECODER].name == DECODER:
        found[DECODER] = _fixed_spec(found[DECODER], CAPACITY, spec.max_tokens)
    return found


def engines_from_graphs(
    folder: Path,
    target: Target,
    spec: EngineSpec,
    on_stage: OnStage | None = None,
    on_fraction: OnFraction | None = None,
) -> EngineSet:
    """Build the engines of a target that are not in the folder yet.

    Args:
        folder: bundle, or the working folder of one, with its graphs.
        target: what to build for.
        spec: what to build.
        on_stage: called before an engine is built.
        on_fraction: called with the name of an engine and its finished fraction.

    Raises:
        InputError: the library refuses a graph, or died of it.
    """
    engines = _started(folder / ENGINE_FOLDER / target.folder, target)
    plugin = _kept_plugin(folder, target)
    for name, graph in engine_specs(target, spec).items():
        if name in engines.engines:
            continue
        label = f"{name} for {target.backend} {target.name}"
        if on_stage:
            on_stage(f"build {label}")
        job = _job(folder, name, graph, target, spec, plugin if name == SELECT_PACK else None)
        built = run_job(job, partial(on_fraction, label) if on_fraction else None)
        # The command line tool of TensorRT for RTX comes with its SDK, and could not be tried.
        command = "" if target.compute_capabilities else trtexec(job, folder, target.version)
        info = EngineInfo(
            job.engine.name, graph.name, built.inputs, built.outputs, built.profiles, command,
            built.read_back,
        )  # fmt: skip
        engines = replace(engines, engines={**engines.engines, name: info})
        engines.write()
    for left in engines.folder.glob("*.partial"):
        left.unlink()  # of a timing cache, when the library died
    return engines


def _started(folder: Path, target: Target) -> EngineSet:
    """Return what an interrupted build of the same library left, or begin anew."""
    try:
        left = EngineSet.read(folder)
        if left.version == target.version:
            there = {n: engine for n, engine in left.engines.items() if left.path(n).is_file()}
            return replace(left, engines=there)
    except InputError:
        pass
    folder.mkdir(parents=True, exist_ok=True)
    return EngineSet(folder, target.backend, target.version, target.name)


def _kept_plugin(folder: Path, target: Target) -> Path | None:
    """Keep the plugin that the engines are built with in the bundle."""
    if target.plugin is None:
        return None
    kept = folder / PLUGIN_FOLDER / PLUGIN_FILE
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(target.plugin, kept)
    return kept


def _job(
    folder: Path, name: str, graph: GraphSpec, target: Target, spec: EngineSpec, plugin: Path | None
) -> EngineJob:
    onnx = folder / GRAPH_FOLDER / graph_file(graph.name)
    if graph.name == variant(DECODER, FIXED):
        _write_fixed(onnx.with_name("model.onnx"), onnx, spec.max_tokens)
    engines = folder / ENGINE_FOLDER / target.folder
    made = profiles(graph, spec.config, max_frames=spec.max_frames, max_tokens=spec.max_tokens)
    return EngineJob(
        target.module,
        graph,
        onnx,
        engines / f"{name}.engine",
        (_merged(made),) if target.one_profile else made,
        target.compute_capabilities,
        spec.memory_limit,
        # Engines for another machine's GPU are not timed.
        None if target.compute_capabilities else engines / TIMING_CACHE,
        plugin,
    )


def _merged(made: Sequence[Profile]) -> Profile:
    """One profile for the calls of all of them, tuned for those of the last."""

    def merged(ranges: Sequence[Range]) -> Range:
        return Range(
            tuple(min(sides) for sides in zip(*(one.min for one in ranges), strict=True)),
            ranges[-1].opt,
            tuple(max(sides) for sides in zip(*(one.max for one in ranges), strict=True)),
        )

    return {name: merged([profile[name] for profile in made]) for name in made[-1]}


def _fixed_spec(spec: GraphSpec, axis: str, size: int) -> GraphSpec:
    def fixed(tensors: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(tensor, shape=tuple(size if a == axis else a for a in tensor.shape))
            for tensor in tensors
        )

    return GraphSpec(variant(spec.name, FIXED), fixed(spec.inputs), fixed(spec.outputs))


def _write_fixed(source: Path, target: Path, capacity: int) -> None:
    """Write the decoder with a fixed cache beside the one whose weights it shares."""
    try:
        fixed = with_fixed_axes(source.read_bytes(), {CAPACITY: capacity})
    except ValueError as error:
        raise InputError(
            str(error), where=str(source), fix="build the bundle again with `stts-export build`"
        ) from None
    target.write_bytes(fixed)


def trtexec(job: EngineJob, folder: Path, version: str) -> str:
    """Return the command line that builds the same engine, to be run in the bundle's folder.

    It writes beside the manifest, and none of the files that the manifest lists.
    """
    words = ["trtexec", f"--onnx={job.onnx.relative_to(folder)}", "--noTF32", "--skipInference"]
    if int(version.split(".")[0]) < 11:
        words.append("--stronglyTyped")
    if job.plugin is not None:
        words.append(f"--dynamicPlugins={job.plugin.relative_to(folder)}")
    if job.memory_limit is not None:
        words.append(f"--memPoolSize=workspace:{job.memory_limit}B")
    for index, profile in enumerate(job.profiles):
        if len(job.profiles) > 1:
            words.append(f"--profile={index}")
        words += [f"--{side}Shapes={_shapes(profile, side)}" for side in ("min", "opt", "max")]
    words.append(f"--saveEngine={job.engine.name}")
    return shlex.join(words)


def _shapes(profile: Profile, side: str) -> str:
    return ",".join(
        f"{name}:{'x'.join(map(str, getattr(values, side)))}" for name, values in profile.items()
    )
