"""Memory and disk that a build and a session will need, what fits a device, and what nearly does.

No weights are read, so an answer takes milliseconds, and neither torch nor a GPU is needed.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stts_export.calibration.formats import check_formats
from stts_export.calibration.recipe import Recipe
from stts_export.config import ModelConfig
from stts_export.devices import DEVICES, Device, find_device
from stts_export.engines import tensorrt_rtx
from stts_export.engines.library import ONNXRUNTIME, TENSORRT, TENSORRT_RTX
from stts_export.errors import InputError
from stts_export.files import readable_size
from stts_export.footprint import (
    ENGINE_CODE,
    GPU_HOST,
    PROCESS,
    Part,
    Plan,
    Settings,
    Stage,
    build_stages,
    cpu_parts,
    gpu_parts,
    peak,
    plain_engines,
)
from stts_export.limits import (
    DEFAULT_MAX_FRAMES,
    check_engine_frames,
    check_tokens,
    kept_windows,
    needed_tokens,
)
from stts_export.machine import available_memory, free_swap
from stts_export.sizes import cache_bytes, graph_bytes, weights
from stts_export.tensors import PRECISIONS

log = logging.getLogger(__name__)

CANONICAL = (10, 15)
"""The first TensorRT that attends and updates a cache without decomposed graphs."""


@dataclass(frozen=True)
class _Source:
    """What is to be built, whatever the settings."""

    config: ModelConfig
    tied: bool
    exported: bool
    calibrated: bool = False
    free: int | None = None
    """Memory that the build finds free, if it is known."""


@dataclass(frozen=True)
class Estimate:
    """What a build and a session need; bytes."""

    settings: Settings
    tokens: int
    """Longest sequence that is planned for."""
    wanted: int
    """Tokens that the longest clip needs; a session refuses prompts of more than it can take."""
    windows: int
    """Windows of the longest clip after removal."""
    files: dict[str, int]
    """Graphs and their weights, below `onnx/`."""
    engines: dict[str, int]
    """Engine files by graph; empty for ONNX Runtime."""
    stages: tuple[Stage, ...]
    cache_per_token: int
    """Keys and values of a token, in all layers."""
    parts: tuple[Part, ...]
    """Memory of a session: of the GPU for engines, of the process for ONNX Runtime."""
    host: int
    """Memory of the process beside that of the GPU; 0 for ONNX Runtime, whose parts are all."""
    with_copies: int | None = None
    """Memory of a session on ONNX Runtime that copies all weights, which is faster."""
    without_copies: int | None = None
    """Memory of one that leaves all weights in their files."""
    device: Device | None = None
    source: _Source | None = field(default=None, repr=False)
    """What it was made from, to try other settings."""

    @property
    def run(self) -> int:
        """Memory of a session at its peak, which on ONNX Runtime copies weights where it can."""
        return peak(self.parts)

    @property
    def too_long(self) -> str | None:
        """What to say when the longest clip needs more tokens than a session takes."""
        if self.wanted <= self.tokens:
            return None
        return (
            f"the longest clip may need {self.wanted} tokens: prompts of more than {self.tokens} "
            "are refused"
        )

    @property
    def needed(self) -> int:
        """Bytes of the device's memory that a session takes; of shared memory all of them."""
        shared = self.device is not None and self.device.unified
        return self.run + (self.host if shared else 0)

    @property
    def build_memory(self) -> int:
        """Memory of the stage that needs most."""
        return max(stage.memory for stage in self.stages)

    @property
    def disk(self) -> int:
        """Bytes that the build writes."""
        return sum(stage.disk for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether a session fits the device; None without one."""
        return None if self.device is None else self.needed <= self.device.usable


def estimate(
    config: ModelConfig,
    *,
    precision: Recipe | str = "fp32",
    max_frames: int = DEFAULT_MAX_FRAMES,
    max_tokens: int | None = None,
    min_prune_ratio: float = 0.0,
    target: Device | str | None = None,
    backend: str | None = None,
    tied: bool = False,
    exported: bool = False,
) -> Estimate:
    """Estimate what a build and a session need.

    Args:
        config: the model.
        precision: a recipe, the name of one, or its file; see `calibration.Recipe.load`.
        max_frames: longest clip.
        max_tokens: longest sequence; what the longest clip needs when None.
        min_prune_ratio: lowest ratio that the bundle will accept.
        target: where it is to run; a name of `devices.DEVICES`, or a device.
        backend: what runs it; the target's own, or ONNX Runtime, when None.
        tied: whether the checkpoint has no output head of its own.
        exported: whether the graphs are there already, and only engines are built.

    Raises:
        InputError: a setting is out of range or none that `build` takes, the target is not known
            or does not run the back end, or the back end does not run the recipe's formats.
    """
    device = find_device(target) if isinstance(target, str) else target
    if backend is None:
        backend = device.backend if device else ONNXRUNTIME
    old = _is_decomposed(device, backend)
    check_tokens(config, max_tokens, "estimate")
    if backend != ONNXRUNTIME:
        check_engine_frames(max_frames, "estimate")
    if device is not None:
        _check_runs(backend, device)
    recipe = recipe_of(precision)
    if device is not None:
        _check_formats(recipe, backend, device)
    settings = Settings(recipe, max_frames, max_tokens, min_prune_ratio, backend, old)
    return _estimate(_Source(config, tied, exported), settings, device)


def _check_formats(recipe: Recipe, backend: str, device: Device) -> None:
    """See `calibration.formats.check_formats`."""
    library = device.tensorrt if backend == TENSORRT else None
    version = ".".join(map(str, library)) if library else None
    check_formats(recipe, backend, device.sm, version)


def recipe_of(precision: Recipe | str) -> Recipe:
    """Return a recipe; the plain ones are there without PyYAML.

    Raises:
        InputError: as `calibration.Recipe.load`.
    """
    if isinstance(precision, Recipe):
        return precision
    for base in PRECISIONS:
        if precision == base:
            return Recipe.plain(base)
    return Recipe.load(precision)


def _check_runs(backend: str, device: Device) -> None:
    """Refuse a back end that has nothing to run on there."""
    if backend == ONNXRUNTIME:
        if not device.unified:
            raise InputError(
                f"{backend} takes memory of the host, which is not known",
                where=device.label,
                fix="estimate on that machine with --target this, or leave --backend out",
            )
    elif device.sm is None:
        raise InputError(
            f"{backend} needs a GPU, and none was found",
            where=device.label,
            allowed=ONNXRUNTIME,
            fix="see `stts-export doctor`, or name the device that it is for with --target",
        )
    elif backend == TENSORRT_RTX and device.sm not in tensorrt_rtx.TARGETS:
        raise InputError(
            f"{backend} is not for {device.sm}",
            where=device.label,
            allowed=", ".join(tensorrt_rtx.TARGETS),
            fix=f"use --backend {TENSORRT}",
        )


def _estimate(source: _Source, settings: Settings, device: Device | None) -> Estimate:
    config, tied = source.config, source.tied
    frames, precision = settings.max_frames, settings.recipe.base
    longest = config.text.max_position_embeddings
    wanted = needed_tokens(config, frames, settings.min_prune_ratio)
    needed = min(wanted, longest)
    tokens = settings.max_tokens or needed
    if settings.backend == ONNXRUNTIME:  # its cache has the length of the sequence at hand
        tokens = min(tokens, needed)
    windows = min(kept_windows(config, frames, settings.min_prune_ratio), tokens)
    rules = settings.recipe.plan(config)
    held = weights(config, tied=tied, rules=rules)
    files = graph_bytes(config, precision, tied=tied, rules=rules)
    engines: dict[str, int] = {}
    if settings.backend != ONNXRUNTIME:
        engines = {name: held[name].nbytes(precision) + ENGINE_CODE for name in held}
        if config.vision.pruning is not None:
            engines |= dict.fromkeys(plain_engines(settings.backend), 100_000)
    room = device.usable if device else None
    plan = Plan(config, settings, tokens, windows, rules, held, tied, room, source.free)
    on_cpu = settings.backend == ONNXRUNTIME
    return Estimate(
        settings=settings,
        tokens=tokens,
        wanted=wanted,
        windows=windows,
        files=files,
        engines=engines,
        stages=tuple(
            build_stages(
                plan, files, engines, exported=source.exported, calibrated=source.calibrated
            )
        ),
        cache_per_token=cache_bytes(config, precision, 1, settings.recipe.kv_cache),
        parts=tuple(cpu_parts(plan) if on_cpu else gpu_parts(plan, engines)),
        host=0 if on_cpu else PROCESS + GPU_HOST,
        with_copies=peak(cpu_parts(replace(plan, room=None))) if on_cpu else None,
        without_copies=peak(cpu_parts(replace(plan, room=0))) if on_cpu else None,
        device=device,
        source=source,
    )


# --- What fits ----------------------------------------------------------------------------------

_RATIOS = tuple(step / 20 for step in range(1, 20))
"""Prune ratios that are tried."""
_ROUNDING = 64
"""Tokens that a proposed length is a multiple of."""


def check_fits(config: ModelConfig, *, target: Device | str, **settings: Any) -> Estimate:
    """Estimate, and refuse what does not fit the target.

    Args:
        config: the model.
        target: where it is to run.
        settings: see `estimate`.

    Raises:
        InputError: a session does not fit; with the largest parts and the nearest settings that do.
    """
    planned = estimate(config, target=target, **settings)
    error = refusal(planned)
    if error is not None:
        raise error
    return planned


def refusal(planned: Estimate) -> InputError | None:
    """What to raise when a session does not fit its device; None when it does."""
    device = planned.device
    if device is None or planned.fits:
        return None
    largest = sorted(planned.parts, key=lambda part: -part.bytes)[:3]
    parts = ", ".join(f"{part.name} {readable_size(part.bytes)}" for part in largest)
    ways = [text for text, _ in nearest(planned)]
    return InputError(
        f"a session needs {readable_size(planned.needed)}, most of it {parts}",
        where=device.label,
        allowed=f"{readable_size(device.usable)}: {readable_size(device.memory)} less "
        f"{readable_size(device.headroom)} that is in use or stays free",
        fix=" or ".join(ways) or "take a smaller model: no setting fits any device that is known",
    )


def nearest(planned: Estimate) -> list[tuple[str, Estimate]]:
    """Settings near those of an estimate with which a session fits.

    One change at a time, each as small as is enough: fp16 before int4 weights in the decoder. When
    none is, the same at fp16. And the
    smallest device, of the same kind if there is one, that takes the settings as they are.

    Returns:
        Options of the command line, and what they need; empty when everything fits already.
    """
    device, settings, source = planned.device, planned.settings, planned.source
    if device is None or source is None or planned.fits:
        return []

    def tried(changed: Settings, on: Device = device) -> Estimate:
        return _estimate(source, changed, on)

    def changes(start: Settings) -> Iterator[tuple[str, Estimate]]:
        return _single_changes(source.config, start, tried, planned.tokens)

    smaller = {} if source.exported else _smaller_recipes(source.config, settings, device)
    fitting = ((name, tried(replace(settings, recipe=one))) for name, one in smaller.items())
    found = [(f"--precision {name}", one) for name, one in fitting if one.fits][:1]
    found += changes(settings)
    if not found and "fp16" in smaller:
        half = replace(settings, recipe=smaller["fp16"])
        found = [(f"--precision fp16 {text}", one) for text, one in changes(half)]
    by_kind = sorted(
        DEVICES.values(), key=lambda item: (item.unified != device.unified, item.memory)
    )
    for other in by_kind:
        if settings.backend == ONNXRUNTIME and not other.unified:
            continue  # its memory is not what the process has
        there = _on_device(settings, other)
        if _runs(there.recipe, there.backend, other, source.config) and tried(there, other).fits:
            return [*found, (f"--target {other.name}", tried(there, other))]
    return found


def _smaller_recipes(config: ModelConfig, settings: Settings, device: Device) -> dict[str, Recipe]:
    """Recipes that take less than a plain one and run on a device, the closest to it first."""
    base = settings.recipe.base
    if base == "bf16" or settings.recipe.gates is not None:
        return {}  # somebody has chosen
    smaller = {"fp16": Recipe.plain("fp16")} if base == "fp32" else {}
    int4 = Recipe.load("int4")
    runs = _runs(int4, settings.backend, device, config)
    return {**smaller, "int4": int4} if runs else smaller


def _runs(recipe: Recipe, backend: str, device: Device, config: ModelConfig) -> bool:
    """Whether a back end has the formats, and they can hold the model's layers."""
    try:
        _check_formats(recipe, backend, device)
        weights(config, rules=recipe.plan(config))
    except InputError:
        return False
    return True


def _on_device(settings: Settings, device: Device) -> Settings:
    """The same settings with what another device runs."""
    backend = settings.backend if settings.backend == ONNXRUNTIME else device.backend
    return replace(settings, backend=backend, decomposed=_is_decomposed(device, backend))


def _is_decomposed(device: Device | None, backend: str) -> bool:
    version = device.tensorrt if device else None
    return backend == TENSORRT and version is not None and version < CANONICAL


def _single_changes(
    config: ModelConfig,
    settings: Settings,
    tried: Callable[[Settings], Estimate],
    tokens: int,
) -> Iterator[tuple[str, Estimate]]:
    """The smallest change of each length or ratio that is enough by itself."""
    frames = _largest(
        lambda value: tried(replace(settings, max_frames=value)).fits, 1, settings.max_frames - 1
    )
    if frames:
        yield f"--max-frames {frames}", tried(replace(settings, max_frames=frames))
    if config.vision.pruning is not None:
        for ratio in _RATIOS:
            higher = tried(replace(settings, min_prune_ratio=ratio))
            if ratio > settings.min_prune_ratio and higher.fits:
                yield f"--min-prune-ratio {ratio:g}", higher
                break
    one = needed_tokens(config, 1, settings.min_prune_ratio)
    fewer = _largest(
        lambda value: tried(replace(settings, max_tokens=value)).fits, one + _ROUNDING, tokens - 1
    )
    if fewer:
        fewer = fewer // _ROUNDING * _ROUNDING
        yield f"--max-tokens {fewer}", tried(replace(settings, max_tokens=fewer))


def _largest(fits: Callable[[int], bool | None], low: int, high: int) -> int:
    """Largest number in [low, high] that fits, 0 when none does; what fits is taken to be small."""
    if high < low or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


# --- Before a build -------------------------------------------------------------------------------


def check_build(
    config: ModelConfig,
    *,
    output: Path,
    recipe: Recipe,
    max_frames: int,
    max_tokens: int,
    min_prune_ratio: float,
    backends: tuple[tuple[str, bool], ...] = (),
    tied: bool = False,
    exported: bool = False,
    calibrated: bool = False,
    done: int = 0,
) -> list[str]:
    """Say what a build will need, and refuse one that this machine cannot hold, before it starts.

    Args:
        config: the model.
        output: folder to write, or its working folder; need not exist.
        recipe: number formats.
        max_frames: longest clip.
        max_tokens: longest sequence.
        min_prune_ratio: lowest ratio.
        backends: (back end, whether its graphs are decomposed) of every set of engines.
        tied: see `estimate`.
        exported: whether the graphs come from a bundle.
        calibrated: whether the recipe's scales are there already.
        done: bytes that an interrupted build has written already.

    Returns:
        Lines for the user: the build as a whole, its stages, and what a session will hold.

    Raises:
        InputError: too little memory or disk; with settings that need less.
    """
    free, swap = available_memory(), free_swap()
    plans = [
        _estimate(
            _Source(config, tied, exported or index > 0, calibrated, free),
            Settings(recipe, max_frames, max_tokens, min_prune_ratio, backend, decomposed),
            None,
        )
        for index, (backend, decomposed) in enumerate(backends or ((ONNXRUNTIME, False),))
    ]
    stages = [*plans[0].stages]
    for plan in plans[1:]:
        stages += plan.stages[1:]  # graphs are written once
    memory, disk = max(stage.memory for stage in stages), sum(stage.disk for stage in stages)
    worst = max(stages, key=lambda stage: stage.memory)
    places = (output.absolute(), *output.absolute().parents)
    folder = next(place for place in places if place.exists())
    usage = shutil.disk_usage(folder)
    is_wide = recipe.base == "fp32" and recipe.gates is None and not exported
    smaller = ", or build with --precision fp16" if is_wide else ""
    if usage.total and usage.free < disk - done:  # /proc has no total
        raise InputError(
            f"{readable_size(usage.free)} free",
            where=str(folder),
            allowed=f"about {readable_size(disk)} for this bundle",
            fix=f"free some space, or choose another disk with -o{smaller}",
        )
    if free is not None and free + swap < memory and worst.is_counted:
        raise InputError(
            f"{readable_size(free)} of memory are available, and {readable_size(swap)} of swap",
            where=worst.name,
            allowed=f"about {readable_size(memory)}",
            fix=f"end other programs, or add swap{smaller}; or build the bundle on another "
            "machine and copy it: it runs here without torch",
        )
    if free is not None and free < memory:
        log.warning(
            "%s needs about %s of memory and %s are available: it may swap, or fail%s",
            worst.name, readable_size(memory), readable_size(free),
            "" if worst.is_counted else "; engines can be built on a device with the same GPU "
            "architecture and more memory, and copied with the bundle",
        )  # fmt: skip
    known = "unknown" if free is None else f"{readable_size(free)} available"
    return [
        f"needs about {readable_size(memory)} of memory (in {worst.name}; {known}) and "
        f"{readable_size(disk)} of disk ({readable_size(usage.free)} free)",
        *(
            f"  {stage.name}: {readable_size(stage.memory)} of memory, "
            f"{readable_size(stage.disk)} of disk"
            for stage in stages
        ),
        *(
            f"  a session on {plan.settings.backend}: {_session_memory(plan)}, with a KV cache of "
            f"{readable_size(plan.cache_per_token * plan.tokens)} for {plan.tokens} tokens"
            for plan in plans
        ),
        *(f"  {line}" for line in dict.fromkeys(plan.too_long for plan in plans) if line),
    ]


def _session_memory(plan: Estimate) -> str:
    if plan.without_copies is None:
        return f"{readable_size(plan.run + plan.host)} of memory"
    return (
        f"{readable_size(plan.run)} of memory, or {readable_size(plan.without_copies)} where there "
        "is no room for copies of its weights"
    )
