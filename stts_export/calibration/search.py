"""Search for the smallest model that passes the gates: number formats by layer for one target.

Every start quantises all that may be, each part to one format that the target runs. While a gate
is missed, the layers with the largest errors go back to the base. Nothing is exported:
candidates run in PyTorch and round as the graphs do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stts_export.calibration.calibrate import (
    OnProgress,
    clips_of,
    counted,
    ratio_of,
    reference_model,
    statistics_of,
)
from stts_export.calibration.clips import CalibrationClip
from stts_export.calibration.formats import check_formats
from stts_export.calibration.gates import measure
from stts_export.calibration.layers import (
    CONNECTOR,
    DECODER,
    NVFP4_BLOCK,
    QUANTISED,
    VISION,
    Format,
    LayerQuantization,
    input_groups,
    layers_by_group,
)
from stts_export.calibration.methods import layers_from_statistics
from stts_export.calibration.quant_report import GateCheck, QuantReport
from stts_export.calibration.recipe import BLOCKS, Base, Gates, LayerRule, Method, Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.checkpoint import Checkpoint
from stts_export.checkpoint.streamed import sources
from stts_export.config import ModelConfig
from stts_export.devices import DEVICES
from stts_export.engines.library import ONNXRUNTIME
from stts_export.engines.onnxruntime import converts_weights
from stts_export.errors import InputError, did_you_mean
from stts_export.files import readable_size
from stts_export.sizes import BITS, weights
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, answerer_of

DEFAULT_GATES = Gates(
    min_sqnr=12, min_jaccard=0.97, min_cosine=0.99, max_kl=0.05, max_answers_changed=0.05
)
"""Those of the shipped recipes that have 4-bit weights."""
AUTO = "auto-"
"""Beginning of the names of recipes that were found."""
CPU = "cpu"
"""The target that has no GPU."""
CLASSES = {"orin": "agx-orin", "thor": "thor", "h200": "h200", "rtx": "rtx-4090"}
"""Device that stands for a class, as the shipped recipes name them: its oldest GPU and library."""

_MULTIPLE: dict[Format, int] = {"int4": BLOCKS[0], "nvfp4": NVFP4_BLOCK}
"""What the inputs of a layer have to be a multiple of."""
_METHODS: dict[tuple[str, Format], Method] = {
    (VISION, "int8"): "smoothquant",
    (DECODER, "int8"): "smoothquant",
}
"""Where it is not the default; as in the shipped recipe int8."""
_FEWEST_CLIPS, _SHARE = 4, 3
"""The search measures on at least so many clips, and on one of so many."""
_PART_MOVED = 10
"""One of so many groups of layers is moved at once."""


@dataclass(frozen=True)
class Place:
    """What runs a bundle on a target; see `formats.check_formats`."""

    backend: str
    sm: str | None
    library_version: str | None

    @property
    def base(self) -> Base:
        """Format of what is not quantised: ONNX Runtime multiplies int8 beside fp32 only."""
        return "fp32" if self.backend == ONNXRUNTIME else "fp16"


@dataclass(frozen=True)
class Step:
    """A candidate that was measured."""

    vision: Format
    """Of vision and connector, where the path starts."""
    decoder: Format
    """Of the decoder, where the path starts."""
    moved: tuple[str, ...]
    """Layers that went back to the base in this step."""
    quantised: int
    """Layers that are left."""
    bytes: int
    """Of all weights with their scales."""
    passed: bool
    missed: str
    """The check that is farthest beyond its limit; empty if all passed."""
    base: Base = "fp16"

    def line(self) -> str:
        """Return the step as text."""
        start = f"vision {self.vision}, decoder {self.decoder}"
        moved = f", {len(self.moved)} moved to {self.base}" if self.moved else ""
        result = "passes" if self.passed else f"misses {self.missed}"
        return (
            f"{start}: {self.quantised} layers{moved}, {readable_size(self.bytes)} of weights, "
            f"{result}"
        )


@dataclass(frozen=True)
class Found:
    """The smallest model that passes."""

    recipe: Recipe
    """Names every quantised layer."""
    layers: dict[str, LayerQuantization]
    """Scales of these layers."""
    steps: tuple[Step, ...]
    """As they were measured, smaller candidates first."""


def find_place(target: str) -> Place:
    """Return what runs a bundle on a target.

    Args:
        target: one of `devices.DEVICES`, of `CLASSES`, or `CPU`.

    Raises:
        InputError: there is no such target.
    """
    if target == CPU:
        return Place(ONNXRUNTIME, None, None)
    known = dict.fromkeys((CPU, *CLASSES, *DEVICES))
    if target not in known:
        raise InputError(
            f"target {target!r}{did_you_mean(target, known)}",
            where="--auto",
            allowed=", ".join(known),
            fix="for another machine take one with a GPU of the same generation",
        )
    device = DEVICES[CLASSES.get(target, target)]
    version = device.tensorrt and ".".join(map(str, device.tensorrt))
    return Place(device.backend, device.sm, version)


def runnable_formats(place: Place) -> tuple[Format, ...]:
    """Quantised formats that run on a target, and that it does not convert on every call."""
    return tuple(name for name in QUANTISED if _runs(name, place))


def _runs(name: Format, place: Place) -> bool:
    if place.backend == ONNXRUNTIME and converts_weights(place.base, (name,)):
        return False
    recipe = Recipe(name, "", place.base, layers=(LayerRule((VISION,), name),), gates=DEFAULT_GATES)
    try:
        check_formats(recipe, place.backend, place.sm, place.library_version)
    except InputError:
        return False
    return True


def starts(formats: Sequence[Format]) -> tuple[tuple[Format, Format], ...]:
    """Pairs of formats that are worth a start: of vision and connector, and of the decoder.

    Both parts get the same format, or the decoder a narrower one: it reads all of its weights for
    every token, and has most of them. Two formats of the same width in one model save nothing.
    """
    return tuple(
        (vision, decoder)
        for vision in formats
        for decoder in formats
        if vision == decoder or BITS[decoder] < BITS[vision]
    )


def weight_bytes(
    config: ModelConfig, plan: Mapping[str, LayerRule], base: Base, *, tied: bool = False
) -> int:
    """Bytes of the weights of a bundle's graphs, scales included.

    Gaps between large tensors are not counted: those of small models would hide what is saved.
    Args as `sizes.weights`.
    """
    held = weights(config, tied=tied, rules=plan).values()
    return sum(tensor.nbytes(base) for graph in held for tensor in graph.tensors)


def recipe_for_target(
    source: Checkpoint,
    target: str,
    work: Path,
    *,
    clips: Path | None = None,
    max_frames: int | None = None,
    min_prune_ratio: float = 0.0,
    answerer: CheckpointAnswerer | None = None,
    gates: Gates = DEFAULT_GATES,
    on_step: Callable[[Step], None] | None = None,
    on_progress: OnProgress | None = None,
) -> Found:
    """Search for the number formats of the smallest bundle that runs on a target and passes.

    Blocks that the scorer reads and the head stay at the base, fp32 on a CPU. Scales come from all
    calibration clips, and the search measures on the last third of these (4 or more). Held-out
    clips are not looked at: they judge the bundle afterwards, and say more when nothing was chosen
    by them. So a bundle can still miss a gate there, by little; also as half precision itself is
    not rounded to here, which is far more exact than any format that is searched.

    Args:
        source: the checkpoint.
        target: where the bundle is to run, see `find_place`.
        work: folder for synthetic clips and statistics, as `calibration_from_checkpoint` keeps
            them: a calibration there finds them again.
        clips: a description, a folder of videos, or None for the default set.
        max_frames: sampled frames of a video at most; the checkpoint's own when None.
        min_prune_ratio: lowest ratio of the bundle.
        answerer: of the checkpoint's model in fp32; opened when None.
        gates: limits.
        on_step: called after every candidate.
        on_progress: called as work goes on.

    Raises:
        InputError: there is no such target, nothing passes even with all layers at the base,
            or as `calibration_from_checkpoint`.
        MissingDependencyError: modelopt is not installed.
    """
    place = find_place(target)
    formats = runnable_formats(place)
    recipe = Recipe(f"{AUTO}{target}", f"smallest that passes on {target}", place.base, gates=gates)
    chosen = clips_of(recipe, clips, work, source.config, on_progress).calibration
    if answerer is None:
        answerer = answerer_of(source, reference_model(source), max_frames)
    ratio = ratio_of(recipe, source.config, min_prune_ratio)
    search = _Search(source, answerer, recipe, chosen, ratio, work, on_step, on_progress)
    return search.run(starts(formats))


def search_clips(clips: Sequence[CalibrationClip]) -> tuple[CalibrationClip, ...]:
    """Calibration clips that the search measures on."""
    return tuple(clips[-max(_FEWEST_CLIPS, len(clips) // _SHARE) :])


_Plan = Mapping[str, LayerRule]


@dataclass(frozen=True)
class _Candidate:
    """A model to measure."""

    pair: tuple[Format, Format]
    """Start of its path."""
    plan: _Plan
    """Rule by quantised layer."""
    moved: tuple[str, ...]
    """Layers that the one before on its path had quantised."""
    size: int
    """Bytes of all weights."""

    def formats(self) -> dict[str, str]:
        """Format by quantised layer."""
        return {name: rule.format for name, rule in self.plan.items()}


class _Search:
    """What all paths share.

    Args:
        source: the checkpoint.
        answerer: of its model in fp32.
        recipe: without layers; name and gates of what is found.
        clips: to calibrate on.
        ratio: fraction of windows to remove.
        work: folder of the statistics.
        on_step: called after every candidate.
        on_progress: called as work goes on.
    """

    def __init__(
        self,
        source: Checkpoint,
        answerer: CheckpointAnswerer,
        recipe: Recipe,
        clips: Sequence[CalibrationClip],
        ratio: float,
        work: Path,
        on_step: Callable[[Step], None] | None,
        on_progress: OnProgress | None,
    ) -> None:
        assert recipe.gates is not None
        self._source, self._answerer, self._recipe = source, answerer, recipe
        self._config, self._gates = source.config, recipe.gates
        self._clips = search_clips(clips)
        self._on_step, self._on_progress = on_step, on_progress
        self._ratio, self._base = ratio, recipe.base
        self._tied = source.looks_tied
        self._weights = sources(answerer.model)
        self._shapes = {
            name.removesuffix(".weight"): weight.shape for name, weight in self._weights.items()
        }
        self._statistics = statistics_of(source, answerer, clips, self._ratio, work, on_progress)
        self._known: dict[tuple[str, Format], LayerQuantization] = {}
        self._steps: list[Step] = []
        self._misses: list[tuple[float, Step]] = []

    def run(self, pairs: Sequence[tuple[Format, Format]]) -> Found:
        """Measure the smallest candidate of all paths, again and again, until one passes.

        Candidates grow along a path, so that none that is left could be smaller.
        """
        paths = {pair: self._candidate(pair, self._start(*pair)) for pair in pairs}
        measured = set()
        while paths:
            candidate = min(paths.values(), key=lambda one: one.size)
            formats = tuple(candidate.formats().items())
            is_new = formats not in measured  # paths may meet, at the latest where nothing is left
            measured.add(formats)
            report = self._measured(candidate) if is_new else None
            if report is not None and report.passed:
                recipe = replace(self._recipe, layers=_named_rules(candidate.plan))
                return Found(recipe, self._layers(candidate.plan), tuple(self._steps))
            if report is not None and candidate.plan:
                paths[candidate.pair] = self._next(candidate, report)
            else:
                del paths[candidate.pair]
        raise self._nothing_passes()

    def _start(self, vision: Format, decoder: Format) -> _Plan:
        """Quantise all layers whose widths a format can hold."""
        groups = layers_by_group(self._config)
        plan = {}
        for group, chosen in ((VISION, vision), (CONNECTOR, vision), (DECODER, decoder)):
            rule = LayerRule((group,), chosen, _METHODS.get((group, chosen)))
            for name in groups[group]:
                if self._shapes[name][1] % _MULTIPLE.get(chosen, 1) == 0:
                    plan[name] = rule
        return plan

    def _candidate(
        self, pair: tuple[Format, Format], plan: _Plan, moved: tuple[str, ...] = ()
    ) -> _Candidate:
        size = weight_bytes(self._config, plan, self._base, tied=self._tied)
        return _Candidate(pair, plan, moved, size)

    def _next(self, candidate: _Candidate, report: QuantReport) -> _Candidate:
        """Move the layers with the largest errors to the base.

        Those that read the same tensor go together.
        """
        sqnr = {layer.layer: layer.sqnr for layer in report.layers}
        groups = [names for names in input_groups(self._config) if names[0] in candidate.plan]
        groups.sort(key=lambda names: min(sqnr[name] for name in names))
        moved = sum(groups[: max(1, len(groups) // _PART_MOVED)], ())
        left = {name: rule for name, rule in candidate.plan.items() if name not in moved}
        return self._candidate(candidate.pair, left, moved)

    def _layers(self, plan: _Plan) -> dict[str, LayerQuantization]:
        """Scales of a plan's layers; each is found once in a format."""
        new = {name: rule for name, rule in plan.items() if (name, rule.format) not in self._known}
        if new:
            found = layers_from_statistics(
                self._config,
                self._weights,
                new,
                self._statistics,
                on_layer=counted(self._on_progress, "scales of layers"),
            )
            self._known |= {(name, how.format): how for name, how in found.items()}
        return {name: self._known[name, rule.format] for name, rule in plan.items()}

    def _measured(self, candidate: _Candidate) -> QuantReport:
        """Compare a candidate with fp32, and note the step."""
        model = rounded_model(self._answerer.model, self._layers(candidate.plan), self._base)
        report = measure(
            self._answerer,
            answerer_of(self._source, model, self._answerer.max_frames),
            self._clips,
            ratio=self._ratio,
            layers=candidate.formats(),
            gates=self._gates,
            recipe_name=self._recipe.name,
            base=self._base,
            on_clip=counted(self._on_progress, "clips that the search measures on"),
        )
        worst = max(report.missed(), key=_excess, default=None)
        step = Step(
            *candidate.pair,
            candidate.moved,
            len(candidate.plan),
            candidate.size,
            report.passed,
            "" if worst is None else worst.line().removeprefix("FAIL "),
            self._base,
        )
        self._steps.append(step)
        if worst is not None:
            self._misses.append((_excess(worst), step))
        if self._on_step is not None:
            self._on_step(step)
        return report

    def _nothing_passes(self) -> InputError:
        _, nearest = min(self._misses, key=lambda miss: miss[0])
        return InputError(
            f"nothing passes the gates, not even {self._base} throughout; nearest: "
            f"{nearest.line()}",
            where=self._recipe.name,
            fix="search with other clips (--clips), or build with --precision fp32",
        )


def _named_rules(plan: _Plan) -> tuple[LayerRule, ...]:
    """Rules that name the layers of a plan one by one."""
    together: dict[LayerRule, list[str]] = {}
    for name, rule in plan.items():
        together.setdefault(replace(rule, match=("*",)), []).append(name)
    return tuple(replace(rule, match=tuple(names)) for rule, names in together.items())


def _excess(check: GateCheck) -> float:
    """Part of the allowed error that was made; what is not finite is worst."""
    return math.inf if math.isnan(check.used) else check.used
