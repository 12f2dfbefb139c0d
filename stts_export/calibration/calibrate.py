"""From checkpoint, clips and recipe to scales: what `calibrate` writes and `build` reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from stts_export._version import __version__
from stts_export.bundle import sha256
from stts_export.calibration.cache_scales import CacheScales, cache_scales
from stts_export.calibration.clips import CalibrationClip, ClipSet, open_clip_set
from stts_export.calibration.layers import QUANTISED, LayerQuantization
from stts_export.calibration.methods import layers_from_statistics
from stts_export.calibration.overflow import known_ranges
from stts_export.calibration.recipe import Recipe
from stts_export.calibration.statistics import BROKEN, ModelStatistics, collect, read_clip
from stts_export.checkpoint import Checkpoint, model_from_checkpoint, streamed_model
from stts_export.checkpoint.streamed import sources
from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.files import json_object, whole, write_json
from stts_export.footprint import WHOLE_MODEL_ROOM
from stts_export.machine import available_memory, return_freed_memory
from stts_export.model.vlm import SttsModel
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, answerer_of

SCHEMA = 1
_TOOLS = ("torch", "nvidia-modelopt")
CALIBRATION_FILE, SCALES_FILE = "calibration.json", "scales.npz"
_CLIPS, _STATISTICS = "clips", "statistics"

OnProgress = Callable[[str, int, int], None]
"""(what is done, number, of how many)."""

_REPEAT = "calibrate again with `stts-export calibrate`"


@dataclass(frozen=True)
class Calibration:
    """Scales of a checkpoint for a recipe."""

    recipe: Recipe
    layers: dict[str, LayerQuantization]
    cache: CacheScales | None
    """None where the recipe leaves the KV cache as it is."""
    checkpoint: str
    """Digest of the checkpoint, see `checkpoint_digest`."""
    clips: str | None
    """The clips that were asked for; None for the default set."""
    clips_digest: str
    prune_ratio: float
    max_frames: int
    ranges: dict[str, float]
    """Largest magnitudes, see `overflow.known_ranges`."""
    kept_windows: int
    total_windows: int

    def to_folder(self, folder: Path) -> None:
        """Write `SCALES_FILE`, then `CALIBRATION_FILE`, each whole."""
        arrays: dict[str, Any] = {}
        described: dict[str, Any] = {}
        for name, layer in self.layers.items():
            arrays[f"{name}/weight_scale"] = layer.weight_scale
            if layer.smooth is not None:
                arrays[f"{name}/smooth"] = layer.smooth
            described[name] = {
                "format": layer.format, "input_scale": layer.input_scale, "block": layer.block,
            }  # fmt: skip
        if self.cache is not None:
            arrays |= {"cache/keys": self.cache.keys, "cache/values": self.cache.values}
        with whole(folder / SCALES_FILE) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)
        values = {field.name: getattr(self, field.name) for field in fields(self)[3:]}
        write_json(
            folder / CALIBRATION_FILE,
            {
                "schema": SCHEMA,
                "scales_sha256": sha256(folder / SCALES_FILE),
                **values,
                "recipe": self.recipe.to_dict(),
                "layers": described,
                "tool_versions": {
                    "stts-export": __version__,
                    **{name: version(name) for name in _TOOLS if _is_installed(name)},
                },
            },
        )

    @staticmethod
    def from_folder(folder: Path) -> Calibration:
        """Read what `to_folder` wrote.

        Raises:
            InputError: it is missing, damaged, or of another schema.
        """
        file = folder / CALIBRATION_FILE
        values = json_object(file)
        if not values:
            raise InputError(
                f"has no {CALIBRATION_FILE}",
                where=str(folder),
                fix="pass the folder that `stts-export calibrate -o` wrote; an interrupted "
                "calibration goes on when its command is given again",
            )
        if values.get("schema") != SCHEMA:
            raise InputError(
                f"schema is {values.get('schema')!r}",
                where=str(file),
                allowed=str(SCHEMA),
                fix=_REPEAT,
            )
        try:
            recipe = Recipe.from_dict(values["recipe"], str(file))
            layers = _layers(values["layers"], folder / SCALES_FILE)
            cache = _cache(recipe, folder / SCALES_FILE)
            rest = {field.name: values[field.name] for field in fields(Calibration)[3:]}
            if sha256(folder / SCALES_FILE) != values["scales_sha256"]:
                raise ValueError(f"{SCALES_FILE} is of another calibration, or damaged")
        except (KeyError, TypeError, AttributeError, *BROKEN) as error:
            raise InputError(f"cannot be read: {error}", where=str(file), fix=_REPEAT) from None
        return Calibration(recipe, layers, cache, **rest)


def _is_installed(name: str) -> bool:
    """Whether a distribution is; an int8 cache alone needs no modelopt."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cache(recipe: Recipe, file: Path) -> CacheScales | None:
    if recipe.kv_cache == "base":
        return None
    # NumPy leaves a file open that it cannot read.
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        return CacheScales(arrays["cache/keys"], arrays["cache/values"])


def _layers(described: Mapping[str, Any], file: Path) -> dict[str, LayerQuantization]:
    layers = {}
    # NumPy leaves a file open that it cannot read.
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        for name, values in described.items():
            if values["format"] not in QUANTISED:
                raise ValueError(f"{name} has format {values['format']!r}")
            layers[name] = LayerQuantization(
                values["format"],
                arrays[f"{name}/weight_scale"],
                values["input_scale"],
                arrays.get(f"{name}/smooth"),
                values["block"],
            )
    return layers


def checkpoint_digest(source: Checkpoint) -> str:
    """Digest of what a checkpoint's files hold, wherever they lie."""
    held = sorted(stat[-1] for stat in source.stats().values())
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()


def ratio_of(recipe: Recipe, config: ModelConfig, lowest: float = 0.0) -> float:
    """Fraction of windows to remove while calibrating and judging.

    Args:
        recipe: may say it.
        config: of the model; says what it was trained with.
        lowest: that the bundle accepts.
    """
    pruning = config.vision.pruning
    if pruning is None:
        return 0.0
    asked = recipe.calibration.prune_ratio
    return max(lowest, pruning.trained_prune_ratio if asked is None else asked)


def reference_model(source: Checkpoint) -> SttsModel:
    """Load a checkpoint in fp32, or leave its weights on disk where memory would not do."""
    free = available_memory()
    needed = 4 * sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
    if free is not None and WHOLE_MODEL_ROOM * needed > free:
        return streamed_model(source)
    return model_from_checkpoint(source)


def clips_of(
    recipe: Recipe,
    clips: Path | None,
    work: Path,
    config: ModelConfig,
    on_progress: OnProgress | None = None,
) -> ClipSet:
    """Open the clips that a recipe is calibrated and judged on.

    Args:
        recipe: says how many are needed.
        clips: see `open_clip_set`.
        work: folder that synthetic clips are drawn into.
        config: of the model.
        on_progress: called after every clip that is drawn or read.
    """
    return open_clip_set(
        clips,
        work / _CLIPS,
        needs_calibration=recipe.calibration.clips,
        needs_held_out=recipe.calibration.held_out,
        image_size=max(config.vision.image_size),
        on_progress=counted(on_progress, "clips"),
    )


def calibration_from_checkpoint(
    source: Checkpoint,
    recipe: Recipe,
    output: Path,
    *,
    clips: Path | None = None,
    max_frames: int | None = None,
    min_prune_ratio: float = 0.0,
    answerer: CheckpointAnswerer | None = None,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Find the scales of a checkpoint, and write them to a folder.

    Statistics of every clip are kept in the folder by a hash of the clip, the checkpoint and the
    settings. So an interrupted run goes on where it was, and another recipe costs no second pass.

    Args:
        source: the checkpoint.
        recipe: what is quantised, and how.
        output: folder to write; may be one that was written before.
        clips: a description, a folder of videos, or None for the default set.
        max_frames: sampled frames of a video at most; the checkpoint's own when None.
        min_prune_ratio: lowest ratio of the bundle.
        answerer: of the checkpoint's model; opened when None.
        on_progress: called as work goes on.

    Raises:
        InputError: the recipe quantises nothing or names layers that are not there, clips are too
            few or cannot be decoded, the checkpoint has no tokenizer, or the folder is not ours.
        MissingDependencyError: modelopt is not installed.
    """
    plan = recipe.plan(source.config)
    if not recipe.needs_scales(plan.values()):
        raise InputError(
            f"recipe {recipe.name} has no layer whose format needs scales",
            where="calibrate",
            allowed=f"a recipe with {', '.join(QUANTISED)}, or kv_cache: int8",
            fix=f"build with --precision {recipe.name} as it is",
        )
    check_folder(output)
    is_new = not output.exists()
    try:
        found = clips_of(recipe, clips, output, source.config, on_progress)
        if answerer is None:
            answerer = answerer_of(source, reference_model(source), max_frames)
        check_readable(answerer, (*found.calibration, *found.held_out))
    except InputError:
        if is_new:
            shutil.rmtree(output, ignore_errors=True)
        raise
    output.mkdir(parents=True, exist_ok=True)
    ratio = ratio_of(recipe, source.config, min_prune_ratio)
    statistics = statistics_of(source, answerer, found.calibration, ratio, output, on_progress)
    layers = layers_from_statistics(
        source.config,
        sources(answerer.model),
        plan,
        statistics,
        on_layer=counted(on_progress, "scales of layers"),
    )
    return_freed_memory()
    made = Calibration(
        recipe,
        layers,
        None if recipe.kv_cache == "base" else cache_scales(statistics),
        checkpoint_digest(source),
        None if clips is None else str(clips.absolute()),
        found.digest(),
        ratio,
        answerer.max_frames,
        known_ranges(statistics),
        *statistics.windows,
    )
    made.to_folder(output)
    return made


def statistics_of(
    source: Checkpoint,
    answerer: CheckpointAnswerer,
    clips: Sequence[CalibrationClip],
    ratio: float,
    work: Path,
    on_progress: OnProgress | None = None,
) -> ModelStatistics:
    """Collect statistics in a folder, where those of clips that were seen before are used again.

    Args:
        source: the checkpoint.
        answerer: of its model.
        clips: to collect on.
        ratio: fraction of windows to remove.
        work: folder of a calibration.
        on_progress: called after every clip.

    Raises:
        InputError: as `statistics.collect`.
    """
    return collect(
        answerer.model,
        answerer,
        clips,
        ratio,
        work / _STATISTICS,
        key=f"{checkpoint_digest(source)} {answerer.max_frames}",
        on_progress=counted(on_progress, "statistics of clips"),
    )


def check_readable(answerer: CheckpointAnswerer, clips: Sequence[CalibrationClip]) -> None:
    """Decode clips before hours are spent.

    Raises:
        InputError: one cannot be decoded, or is an image.
    """
    for clip in clips:
        read_clip(answerer, clip.video)


def check_calibration(
    calibration: Calibration,
    source: Checkpoint,
    recipe: Recipe,
    max_frames: int,
    min_prune_ratio: float,
) -> None:
    """Refuse scales of another checkpoint, recipe, length of clips or ratio.

    Raises:
        InputError: they are, or layers are missing.
    """
    if calibration.checkpoint != checkpoint_digest(source):
        raise InputError("is of another checkpoint", where="calibration", fix=_REPEAT)
    if calibration.recipe.digest() != recipe.digest():
        raise InputError(
            f"is for recipe {calibration.recipe.name}, or an earlier version of {recipe.name}",
            where="calibration",
            allowed=f"recipe {recipe.name}, which is built",
            fix=_REPEAT,
        )
    if calibration.max_frames != max_frames:
        raise InputError(
            f"saw clips of up to {calibration.max_frames} frames",
            where="calibration",
            allowed=f"{max_frames}, as the bundle's longest clip has",
            fix=f"calibrate with --max-frames {max_frames}",
        )
    ratio = ratio_of(recipe, source.config, min_prune_ratio)
    if calibration.prune_ratio != ratio:
        raise InputError(
            f"was found at prune ratio {calibration.prune_ratio:g}",
            where="calibration",
            allowed=f"{ratio:g}, which the bundle is judged at",
            fix="leave --calibration out, so that the build finds scales of its own",
        )
    plan = recipe.plan(source.config)
    wanted = {name for name, rule in plan.items() if rule.quantised}
    if wanted != set(calibration.layers):
        odd = sorted(wanted ^ set(calibration.layers))
        raise InputError(
            f"has other layers than the recipe: {odd[0]}", where="calibration", fix=_REPEAT
        )


def check_folder(output: Path) -> None:
    """Refuse to write between files of others.

    Raises:
        InputError: the folder holds what no calibration writes, or is none.
    """
    known = {CALIBRATION_FILE, SCALES_FILE, _CLIPS, _STATISTICS}
    if output.is_dir():
        foreign = sorted(
            path.name
            for path in output.iterdir()
            if path.name.removesuffix(".partial") not in known  # a killed run leaves some
        )
        if foreign:
            raise InputError(
                f"holds {foreign[0]}, which no calibration writes",
                where=str(output),
                fix="choose a new folder, or one that `stts-export calibrate` wrote",
            )
    elif output.exists():
        raise InputError("is not a folder", where=str(output), fix="choose another name")


def counted(on_progress: OnProgress | None, what: str) -> Callable[[int, int], None] | None:
    """Return what reports numbers alone, of one thing that is done; None for nobody to tell."""
    if on_progress is None:
        return None
    return lambda done, total: on_progress(what, done, total)
