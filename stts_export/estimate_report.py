"""Estimates of checkpoints and bundles on disk, for people and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stts_export.calibration.recipe import Recipe, check_recipe_name, is_recipe_of
from stts_export.config import ModelConfig
from stts_export.devices import THIS, Device, find_device
from stts_export.engines.library import ONNXRUNTIME
from stts_export.errors import InputError
from stts_export.estimate import Estimate, estimate, nearest, recipe_of
from stts_export.files import json_object, readable_size
from stts_export.limits import DEFAULT_MAX_FRAMES, narrowed
from stts_export.machine import available_memory, total_memory
from stts_export.sizes import looks_tied
from stts_export.tensors import DATA_FILE, DECODER


def estimate_source(
    source: Path | str,
    *,
    revision: str | None = None,
    target: str = THIS,
    precision: str | None = None,
    max_frames: int | None = None,
    max_tokens: int | None = None,
    min_prune_ratio: float | None = None,
    backend: str | None = None,
) -> Estimate:
    """Estimate for a checkpoint, whose weights are not read, or for a bundle; see `estimate`.

    Settings that are None are what `build` would take. Of a bundle only engines are built. Of a
    name on the hub only configuration and index are downloaded.

    Raises:
        InputError: nothing readable is there, or a setting does not fit it.
        ImportError: torch or safetensors is missing, and it is a checkpoint.
    """
    from stts_export.bundle import is_bundle

    device = _this_device(backend) if target == THIS else find_device(target)
    asked = _Asked(max_frames, max_tokens, min_prune_ratio)
    if is_bundle(Path(source)):
        if revision is not None:
            raise InputError(
                f"revision {revision}, but it is a bundle",
                where=str(source),
                fix="leave --revision out",
            )
        found = _of_bundle(Path(source), precision, asked)
    else:
        found = _of_checkpoint(source, revision, precision, asked)
    return estimate(
        found.config,
        precision=found.recipe,
        max_frames=found.max_frames,
        max_tokens=found.max_tokens,
        min_prune_ratio=found.min_prune_ratio,
        target=device,
        backend=backend,
        tied=found.tied,
        exported=found.exported,
    )


@dataclass(frozen=True)
class _Asked:
    """What the user gave."""

    max_frames: int | None
    max_tokens: int | None
    min_prune_ratio: float | None


@dataclass(frozen=True)
class _Found:
    """What a folder says."""

    config: ModelConfig
    recipe: Recipe
    max_frames: int
    max_tokens: int | None
    min_prune_ratio: float
    tied: bool
    exported: bool


def _of_checkpoint(
    source: Path | str, revision: str | None, precision: str | None, asked: _Asked
) -> _Found:
    from stts_export.checkpoint import open_checkpoint
    from stts_export.checkpoint.hub import is_repository
    from stts_export.preprocessing import video_preprocessing

    if not Path(source).exists() and is_repository(str(source)):
        folder, config = _of_repository(str(source), revision)
        tied = False
        frames = video_preprocessing(folder, config.vision).num_frames
    else:
        checkpoint = open_checkpoint(source, revision=revision)
        config, tied = checkpoint.config, checkpoint.looks_tied
        with checkpoint.config_folder() as configs:
            frames = video_preprocessing(configs, config.vision).num_frames
    return _Found(
        config, recipe_of(precision or "fp32"),
        (frames or DEFAULT_MAX_FRAMES) if asked.max_frames is None else asked.max_frames,
        asked.max_tokens, asked.min_prune_ratio or 0.0, tied, False,
    )  # fmt: skip


def _of_repository(name: str, revision: str | None) -> tuple[Path, ModelConfig]:
    """The files of a repository on the hub that are no weights, and its model.

    Without weights nothing shows that a head is a copy of the embedding: it counts as its own.
    """
    from stts_export.checkpoint.hub import download
    from stts_export.checkpoint.huggingface import INDEX
    from stts_export.checkpoint.names import SCORER_PREFIX

    folder = download(name, revision, weights=False)
    if not (folder / INDEX).is_file():
        raise InputError(
            f"has no {INDEX}, and its weights are not downloaded for an estimate",
            where=name,
            fix="download it and pass the folder",
        )
    names = json_object(folder / INDEX).get("weight_map")
    if not isinstance(names, dict):
        raise InputError(
            "has no weight_map", where=f"{name}: {INDEX}", fix="download it and pass the folder"
        )
    has_scorer = any(tensor.startswith(SCORER_PREFIX) for tensor in names)
    return folder, ModelConfig.from_file(folder / "config.json", has_scorer=has_scorer)


def _of_bundle(folder: Path, precision: str | None, asked: _Asked) -> _Found:
    from stts_export.bundle import GRAPH_FOLDER, Bundle

    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    if precision is not None and not is_recipe_of(precision, manifest.recipe):
        check_recipe_name(precision)
        raise InputError(
            f"precision {precision}, but the bundle's graphs are {manifest.precision_name}",
            where=str(folder),
            fix=f"leave --precision out, or estimate {precision} from the checkpoint",
        )
    limits = narrowed(
        manifest.limits,
        str(folder),
        max_frames=asked.max_frames,
        max_tokens=asked.max_tokens,
        min_prune_ratio=asked.min_prune_ratio,
    )
    stored = manifest.files[f"{GRAPH_FOLDER}/{DECODER}/{DATA_FILE}"]["size"]
    recipe = Recipe.from_dict(manifest.recipe, str(folder))
    tied = looks_tied(bundle.config, recipe.base, stored, recipe.plan(bundle.config))
    longest = bundle.config.text.max_position_embeddings
    return _Found(
        bundle.config, recipe, limits.max_frames,
        limits.max_tokens if limits.max_tokens < longest else None,
        limits.min_prune_ratio, tied, True,
    )  # fmt: skip


def _this_device(backend: str | None) -> Device | None:
    """The machine that this runs on: its first GPU, or its CPU when there is none.

    Returns:
        None where it is the CPU, and nothing says how much memory it has.
    """
    from stts_export.doctor import this_gpu

    gpu = None
    if backend != ONNXRUNTIME:
        try:
            gpu = this_gpu()
        except Exception as error:  # a driver or library unlike any known
            raise InputError(
                f"the GPU cannot be looked at: {type(error).__name__}: {error}",
                where="this machine",
                fix=f"estimate with --backend {ONNXRUNTIME}, or name the device with --target",
            ) from error
    total, free = total_memory(), available_memory()
    if gpu is None and backend in (None, ONNXRUNTIME):
        if free is None:
            return None
        total = free if total is None else max(total, free)
        return Device(
            THIS, "this machine", total, True, None, ONNXRUNTIME, None, "/proc/meminfo",
            reserve=total - free,
        )  # fmt: skip
    if gpu is None:
        return Device(THIS, "this machine", 0, True, None, ONNXRUNTIME, None, "the driver")
    if gpu.unified and total is not None:
        gpu = replace(gpu, memory=total, reserve=None if free is None else max(0, total - free))
    return gpu


def estimate_json(planned: Estimate) -> dict[str, Any]:
    """Plain values of an estimate."""
    device, settings = planned.device, planned.settings
    return {
        "settings": {
            "precision": settings.recipe.name,
            "max_frames": settings.max_frames,
            "max_tokens": settings.max_tokens,
            "min_prune_ratio": settings.min_prune_ratio,
            "backend": settings.backend,
            "decomposed": settings.decomposed,
        },
        "tokens": planned.tokens,
        "wanted_tokens": planned.wanted,
        "windows": planned.windows,
        "files": planned.files,
        "engines": planned.engines,
        "build": {
            "stages": [asdict(stage) for stage in planned.stages],
            "memory": planned.build_memory,
            "disk": planned.disk,
        },
        "kv_cache": {
            "bytes_per_token": planned.cache_per_token,
            "bytes": planned.cache_per_token * planned.tokens * (2 if settings.decomposed else 1),
        },
        "session": {
            "parts": [asdict(part) for part in planned.parts],
            "device_memory": planned.run,
            "host_memory": planned.host,
            "needed": planned.needed,
            "with_copies": planned.with_copies,
            "without_copies": planned.without_copies,
        },
        "target": None
        if device is None
        else {**asdict(device), "headroom": device.headroom, "usable": device.usable},
        "fits": planned.fits,
        "nearest": [
            {"change": text, "needed": fitting.needed} for text, fitting in nearest(planned)
        ],
    }


def estimate_text(planned: Estimate) -> str:
    """Format an estimate for reading."""
    settings, device = planned.settings, planned.device
    where = f" on {device.label}" if device else ""
    graphs = ", decomposed graphs" if settings.decomposed else ""
    lines = [
        f"{settings.backend}{graphs}{where}, {settings.recipe.name}, up to {settings.max_frames} "
        f"frames, prune ratio {settings.min_prune_ratio:g} or more: {planned.windows} windows, "
        f"{planned.tokens} tokens",
    ]
    folders: dict[str, int] = {}
    for file, size in planned.files.items():
        graph = file.partition("/")[0]
        folders[graph] = folders.get(graph, 0) + size
    lines += _table("graphs", [(name, readable_size(size)) for name, size in folders.items()])
    if planned.engines:
        engines = [(name, readable_size(size)) for name, size in planned.engines.items()]
        lines += _table("engines", engines)
    rows = [
        (
            stage.name,
            f"{readable_size(stage.memory)} of memory, {readable_size(stage.disk)} of disk",
        )
        for stage in planned.stages
    ]
    lines += _table("build", rows)
    lines.append(
        f"  needs {readable_size(planned.build_memory)} of memory and "
        f"{readable_size(planned.disk)} of disk"
    )
    if planned.too_long:
        lines.append(planned.too_long)
    words = {
        "always": "",
        "called": "",
        "open": " (while it is opened)",
        "encode": " (while a clip is encoded)",
        "answer": " (while it answers)",
    }
    parts = [(part.name, readable_size(part.bytes) + words[part.when]) for part in planned.parts]
    if device is not None and device.unified and planned.host:
        parts.append(("Python, CUDA and libraries", readable_size(planned.host)))
    lines += _table("a session", parts)
    lines.append(f"  needs {readable_size(planned.needed)}; KV cache "
                 f"{planned.cache_per_token / 1024:.0f} KiB a token")  # fmt: skip
    if planned.with_copies is not None and planned.without_copies is not None:
        lines.append(
            f"  {readable_size(planned.with_copies)} with copies of all weights, which is faster; "
            f"{readable_size(planned.without_copies)} with none: it copies where there is room"
        )
    if device is None:
        return "\n".join(lines)
    verdict = "fits" if planned.fits else "does not fit"
    lines.append(
        f"{verdict}: {readable_size(device.usable)} usable, {readable_size(device.memory)} less "
        f"{readable_size(device.headroom)} that is in use or stays free ({device.source})"
    )
    if planned.engines and device.unified and planned.build_memory > device.usable:
        lines.append(
            "building the engines there needs more memory than it has: add swap, or build them on "
            f"a larger device with {device.sm} and copy the bundle"
        )
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [title, *(f"  {name:{width}}  {value}" for name, value in rows)]
