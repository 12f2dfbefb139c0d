"""What a recipe adds to a build: scales before the graphs are written, gates after."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts_export.build_folder import CALIBRATION_FOLDER
from stts_export.bundle import REPORT_FOLDER, Judged, Limits
from stts_export.calibration.calibrate import (
    Calibration,
    OnProgress,
    calibration_from_checkpoint,
    check_calibration,
    check_folder,
    check_readable,
    clips_of,
    counted,
    ratio_of,
    reference_model,
)
from stts_export.calibration.clips import ClipSet, check_clip_set
from stts_export.calibration.formats import needs_engines
from stts_export.calibration.gates import measure
from stts_export.calibration.layers import Numerics, fp32_with
from stts_export.calibration.overflow import (
    LARGEST_FP16,
    check_interface,
    layers_at_risk,
    ranges_of,
)
from stts_export.calibration.quant_report import GATES_FILE, PICTURE_FILE, QuantReport
from stts_export.calibration.recipe import Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.calibration.search import AUTO, find_place, recipe_for_target
from stts_export.checkpoint import Checkpoint
from stts_export.config import ModelConfig
from stts_export.engines.library import ONNXRUNTIME
from stts_export.errors import InputError, MissingDependencyError, VerificationError
from stts_export.files import write_json
from stts_export.graphs.modules import model_at
from stts_export.probe import CHECKED_FRAMES, moving_clip
from stts_export.runtime.session import Session
from stts_export.sizes import weights
from stts_export.training.answerers import BundleAnswerer
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, answerer_of

if TYPE_CHECKING:
    from stts_export.build import BuildSpec

log = logging.getLogger(__name__)

CALIBRATE, RANGES, JUDGE = "calibrate", "check the ranges of activations", "judge on held-out clips"
"""Stages of a build."""


@dataclass(frozen=True)
class Precision:
    """A recipe applied to a checkpoint.

    Args:
        source: the checkpoint.
        recipe: what is quantised, and how.
        given: its scales; they are found when None.
        clips: to calibrate and judge on; a calibration's own, or the default set, when None.
        limits: of the bundle.
        search: see below.

    Raises:
        InputError: the recipe names layers that are not there, the calibration is of something
            else, or is given and not needed.
    """

    source: Checkpoint
    recipe: Recipe
    given: Calibration | None
    clips: Path | None
    limits: Limits
    search: Path | None = None
    """Folder of the search that found the recipe; None when there was none."""

    def __post_init__(self) -> None:
        if self.given is not None:
            lengths = (self.limits.max_frames, self.limits.min_prune_ratio)
            check_calibration(self.given, self.source, self.recipe, *lengths)

    @cached_property
    def rules(self) -> dict[str, Any]:
        """Rule by layer."""
        return dict(self.recipe.plan(self.source.config))

    @property
    def is_quantised(self) -> bool:
        """Whether scales are needed."""
        return self.recipe.needs_scales(self.rules.values())

    @cached_property
    def answerer(self) -> CheckpointAnswerer:
        """The checkpoint in fp32; loaded when it is first needed."""
        return answerer_of(self.source, reference_model(self.source), self.limits.max_frames)

    def stages_before(self) -> list[str]:
        """Stages before the graphs."""
        calibrates = self.is_quantised and self.given is None
        return [RANGES] * (self.recipe.base == "fp16") + [CALIBRATE] * calibrates

    def stages_after(self) -> list[str]:
        """Stages after the graphs and engines."""
        return [JUDGE] * (self.recipe.gates is not None)

    def numerics(
        self, folder: Path, begin: Callable[[str], None], on_progress: OnProgress | None
    ) -> Numerics:
        """Find scales, and layers that fp16 could not hold.

        Args:
            folder: of the build; scales are found in `CALIBRATION_FOLDER` below it.
            begin: called when a stage begins.
            on_progress: called as work goes on.

        Raises:
            InputError: fp16 cannot hold what graphs hand on, or as `calibration_from_checkpoint`.
        """
        fp32 = {name for name, rule in self.rules.items() if rule.format == "fp32"}
        ranges: dict[str, float] = {}
        is_half = self.recipe.base == "fp16"
        if is_half:
            begin(RANGES)
            ranges = self._ranges()
        calibration = self._calibration(folder, begin, on_progress) if self.is_quantised else None
        if calibration is not None:
            for name, largest in calibration.ranges.items():
                ranges[name] = max(largest, ranges.get(name, 0.0))
        if is_half:
            check_interface(ranges, self.source.config)
            at_risk = layers_at_risk(ranges, self.source.config)
            for name, largest in at_risk.items():
                log.warning(
                    "%s stays fp32: values reach %.3g, and fp16 ends at %g",
                    name, largest, LARGEST_FP16,
                )  # fmt: skip
            fp32 |= set(at_risk)
        whole = fp32_with(fp32, self.source.config)
        beside = [name for name in whole if name not in fp32]
        if beside:
            log.warning("in the same parts, and so fp32 as well: %s", ", ".join(beside))
        if calibration is None:
            return Numerics(self.recipe.base, {}, frozenset(whole))
        layers = {name: how for name, how in calibration.layers.items() if name not in whole}
        return Numerics(self.recipe.base, layers, frozenset(whole), calibration.cache)

    def _calibration(
        self, folder: Path, begin: Callable[[str], None], on_progress: OnProgress | None
    ) -> Calibration:
        """The one that was given, or a new one; held-out clips can be decoded either way."""
        if self.given is not None:
            check_readable(self.answerer, self._clips(folder, on_progress).held_out)
            return self.given
        begin(CALIBRATE)
        return calibration_from_checkpoint(
            self.source,
            self.recipe,
            folder / CALIBRATION_FOLDER,
            clips=self.clips,
            min_prune_ratio=self.limits.min_prune_ratio,
            answerer=self.answerer,
            on_progress=on_progress,
        )

    def _clips(self, folder: Path, on_progress: OnProgress | None) -> ClipSet:
        """What the bundle is judged on; refuses other clips than a given calibration's."""
        clips = self.clips
        if clips is None and self.given is not None and self.given.clips is not None:
            clips = Path(self.given.clips)
        work = folder / CALIBRATION_FOLDER
        found = clips_of(self.recipe, clips, work, self.source.config, on_progress)
        if self.given is not None and found.digest() != self.given.clips_digest:
            raise InputError(
                "are other clips than it was calibrated on",
                where=str(clips or "the default clips"),
                fix="pass --clips as to `calibrate`, or calibrate again",
            )
        return found

    def _ranges(self) -> dict[str, float]:
        size = self.source.config.vision.image_size
        return ranges_of(
            self._model_for_ranges(), [moving_clip(CHECKED_FRAMES, size)],
            ratio_of(self.recipe, self.source.config),
        )  # fmt: skip

    def _model_for_ranges(self) -> Any:
        if self.is_quantised:
            return self.answerer.model
        from stts_export.checkpoint import streamed_model

        return streamed_model(self.source)

    def forget_search(self) -> None:
        """Remove what the search collected, once the bundle is written."""
        if self.search is not None:
            shutil.rmtree(self.search, ignore_errors=True)

    def judge(
        self, folder: Path, numerics: Numerics, on_progress: OnProgress | None
    ) -> QuantReport:
        """Compare a bundle with its checkpoint, and write the report into the bundle.

        Args:
            folder: of the bundle, complete but for the report.
            numerics: of its graphs.
            on_progress: called after every clip.
        """
        assert self.recipe.gates is not None
        found = self._clips(folder, on_progress)
        with self._candidate(folder, numerics) as candidate:
            report = measure(
                self.answerer,
                candidate,
                found.held_out,
                ratio=ratio_of(self.recipe, self.source.config, self.limits.min_prune_ratio),
                layers={name: how.format for name, how in numerics.layers.items()},
                gates=self.recipe.gates,
                recipe_name=self.recipe.name,
                base=self.recipe.base,
                on_clip=counted(on_progress, "held-out clips"),
            )
        (folder / REPORT_FOLDER).mkdir(exist_ok=True)
        write_json(folder / GATES_FILE, report.to_dict())
        if report.layers:
            report.write_picture(folder / PICTURE_FILE)
        return report

    @contextmanager
    def _candidate(
        self, folder: Path, numerics: Numerics
    ) -> Iterator[BundleAnswerer | CheckpointAnswerer]:
        """The bundle on ONNX Runtime; in PyTorch where that has no kernels."""
        if needs_engines(self.recipe):
            precision = numerics.precision
            rounded = rounded_model(self.answerer.model, numerics.layers, precision)
            cast = model_at(rounded, precision, numerics.fp32_layers)
            yield answerer_of(self.source, cast, self.limits.max_frames)
            return
        with Session.open(folder, ONNXRUNTIME) as session:
            yield BundleAnswerer(session)


def precision_for_build(
    source: Checkpoint,
    spec: BuildSpec,
    limits: Limits,
    output: Path,
    on_plan: Callable[[str], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Precision:
    """Load the recipe that a build asks for, or search for it.

    Args:
        source: the checkpoint.
        spec: of the build.
        limits: of the bundle.
        output: the bundle; a search works beside it, and goes on from there when interrupted.
        on_plan: called with a line for every step of a search.
        on_progress: called as a search goes on.

    Raises:
        InputError: as `Recipe.load`, `Precision` and `recipe_for_target`; or calibration or clips
            were given and are of no use.
    """
    if spec.auto is not None:
        return _searched(source, spec.auto, spec.clips, limits, output, on_plan, on_progress)
    recipe = Recipe.load(spec.precision or "fp32")
    for name, given in (("calibration", spec.calibration), ("clips", spec.clips)):
        if given is not None and recipe.gates is None:
            raise InputError(
                f"{name} {given} is of no use: recipe {recipe.name} has nothing to calibrate or "
                "judge",
                where="build",
                fix="leave it out, or choose another precision",
            )
    made = None if spec.calibration is None else Calibration.from_folder(spec.calibration)
    precision = Precision(source, recipe, made, spec.clips, limits)
    if any(rule.quantised for rule in precision.rules.values()):
        check_packages("build", "matplotlib", *(["modelopt"] if made is None else []))
    if recipe.gates is not None:
        own = None if made is None or made.clips is None else Path(made.clips)
        _check_clips(recipe, own if spec.clips is None else spec.clips)
    return precision


def _check_clips(recipe: Recipe, clips: Path | None) -> None:
    needs = recipe.calibration
    check_clip_set(clips, needs_calibration=needs.clips, needs_held_out=needs.held_out)


def check_packages(where: str, *names: str) -> None:
    """Find out before the work whether what it needs is installed.

    Args:
        where: the verb, for the message.
        names: modules.

    Raises:
        MissingDependencyError: one is not.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"quantising needs a package that is not installed: {name}",
                where=where,
                fix="pip install 'stts-export[quantize]'",
            )


def likely_recipe(target: str, config: ModelConfig) -> Recipe:
    """A recipe such as a search may find, to see before whether a build is possible at all.

    Args:
        target: see `find_place`.
        config: of the model.

    Returns:
        int4 in the decoder, with gates, or the base alone where its widths do not allow that.
    """
    base = find_place(target).base
    recipe = replace(Recipe.load("int4"), base=base)
    try:
        weights(config, rules=recipe.plan(config))
    except InputError:
        return Recipe.plain(base)
    return recipe


def _searched(
    source: Checkpoint,
    target: str,
    clips: Path | None,
    limits: Limits,
    output: Path,
    on_plan: Callable[[str], None] | None,
    on_progress: OnProgress | None,
) -> Precision:
    find_place(target)
    check_packages("build", "modelopt", "matplotlib")
    recipe = Recipe.plain("fp32")  # which asks for as many clips as the one that is found
    _check_clips(recipe, clips)
    # What an interrupted search has collected serves the next one.
    work = output.with_name(f"{output.name}.search")
    check_folder(work)  # it is removed once the bundle is written
    answerer = answerer_of(source, reference_model(source), limits.max_frames)
    check_readable(answerer, clips_of(recipe, clips, work, source.config, on_progress).held_out)
    found = recipe_for_target(
        source,
        target,
        work,
        clips=clips,
        min_prune_ratio=limits.min_prune_ratio,
        answerer=answerer,
        on_step=None if on_plan is None else (lambda step: on_plan(step.line())),
        on_progress=on_progress,
    )
    made = None
    if found.layers:
        made = calibration_from_checkpoint(
            source,
            found.recipe,
            work,
            clips=clips,
            min_prune_ratio=limits.min_prune_ratio,
            answerer=answerer,
            on_progress=on_progress,
        )
    return Precision(source, found.recipe, made, clips, limits, work)


def judged(report: QuantReport) -> Judged:
    """What a manifest says about gates."""
    return Judged(report.passed, tuple(check.name for check in report.missed()))


def missed_gates(
    report: QuantReport, output: Path, partial: Path, *, force: bool
) -> VerificationError:
    """Say which gates a bundle missed, and what can be done."""
    lines = "; ".join(check.line() for check in report.missed())
    by_search = "let --auto find one, "
    if report.recipe.startswith(AUTO):
        by_search = f"search again with other --clips ({output}.search has what was collected), "
    by_force = "write it all the same with --force"
    if force:
        by_force = f"remove {output}, which --force does not replace by one that misses them"
    return VerificationError(
        f"misses the gates of recipe {report.recipe}: {lines}",
        where=str(output),
        fix=f"see {partial / GATES_FILE}; move layers to another format in a recipe of your own, "
        f"{by_search}or {by_force}",
    )
