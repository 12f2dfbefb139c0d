"""Measuring recipes one after the other; what is finished in the work folder is not done again."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import stts_export
from benchmarks.harness.evidence_jobs import digest_of_files
from benchmarks.harness.evidence_plan import digest
from benchmarks.harness.evidence_work import clip_file, exam_of, write_clips
from benchmarks.harness.precision_ablation import ablate
from benchmarks.harness.precision_exam import Seen, agreement, examine
from benchmarks.harness.precision_plan import ABLATED, RATIO, REFERENCE, Settings
from benchmarks.harness.precision_sizes import weights_in
from benchmarks.harness.precision_speed import measure_speed
from benchmarks.harness.timing import machine
from stts_export import Session
from stts_export.build import BuildSpec, bundle_from_checkpoint
from stts_export.build_folder import CALIBRATION_FOLDER
from stts_export.bundle import Bundle, is_bundle
from stts_export.calibration.calibrate import (
    Calibration,
    calibration_from_checkpoint,
    checkpoint_digest,
    clips_of,
    reference_model,
)
from stts_export.calibration.clips import ClipSet
from stts_export.calibration.formats import needs_engines
from stts_export.calibration.gates import IN_PYTORCH
from stts_export.calibration.layers import layer_names
from stts_export.calibration.quant_report import QuantReport
from stts_export.calibration.recipe import Recipe
from stts_export.calibration.rounding import rounded_model
from stts_export.checkpoint import Checkpoint, check_tensors, open_checkpoint
from stts_export.engines.library import ONNXRUNTIME
from stts_export.errors import InputError
from stts_export.files import json_object, write_json
from stts_export.graphs.modules import model_at
from stts_export.training import clips as clips_module
from stts_export.training import rendering as rendering_module
from stts_export.training.answerers import Answerer, BundleAnswerer
from stts_export.training.checkpoint_answerer import CheckpointAnswerer, answerer_of
from stts_export.training.exam import Exam, prompt_of

Say = Callable[[str], None]
_PACKAGE = Path(stts_export.__file__).parent
_BUNDLE = "bundle"


def run(settings: Settings, command: str, say: Say) -> dict[str, Any]:
    """Measure everything that is not measured yet; returns what `-o` writes.

    Raises:
        InputError: a recipe, the checkpoint or the size of the exam is at fault.
        MissingDependencyError: a package of the build or of calibration is missing.
    """
    recipes = settings.load()
    bench = Bench(settings, say)
    for recipe in recipes.values():
        recipe.plan(bench.source.config)
    with _one_thread():
        bench.prepare()
        found = {one.name: bench.recipe(name, one) for name, one in recipes.items()}
        ablation = bench.ablation()
        speed = bench.speed({name: one for name, one in recipes.items() if not needs_engines(one)})
    reference = _seen(found[REFERENCE])
    return {
        "benchmark": "precision",
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "nvidia-modelopt")},
        "settings": {
            "checkpoint": settings.checkpoint,
            "checkpoint_sha256": bench.checkpoint,
            "package": bench.code,
            **asdict(settings.exam),
            "seed": settings.seed,
            "split": bench.exam.split,
            "prune_ratio": RATIO,
            "timed_clips": settings.timed_clips,
            "tokens": settings.tokens,
        },
        "exam": [" ".join(one.type for one in item.questions) for item in bench.exam.items],
        "chance": found[REFERENCE]["evaluation"]["chance"],
        "recipes": [_entry(name, one, reference) for name, one in found.items()],
        "ablation": ablation,
        "speed": speed,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seen(found: Mapping[str, Any]) -> list[Seen]:
    return [Seen.from_dict(one) for one in found["evaluation"]["seen"]]


def _entry(name: str, found: Mapping[str, Any], reference: list[Seen]) -> dict[str, Any]:
    return {
        "name": name,
        **{key: value for key, value in found.items() if key != "evaluation"},
        "rows": found["evaluation"]["rows"],
        "agreement": agreement(reference, _seen(found)),
    }


class Bench:
    """The checkpoint, the test clips, and the work folder.

    Args:
        settings: what to measure.
        say: told what is done.

    Raises:
        InputError: the checkpoint cannot be read, or has no scorer; or the exam has not as many
            questions.
    """

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings, self._say, self._work = settings, say, settings.work
        self.source: Checkpoint = open_checkpoint(settings.checkpoint)
        check_tensors(self.source)
        if self.source.config.vision.pruning is None:
            raise InputError(
                "has no scorer, so it keeps every window at any precision",
                where=settings.checkpoint,
                allowed="a checkpoint that was trained with pruning",
            )
        self.exam: Exam = exam_of(self._clips_task)
        self.checkpoint = checkpoint_digest(self.source)
        files = sorted(_PACKAGE.rglob("*.py"))
        self.code = digest(
            {
                str(file.relative_to(_PACKAGE)): hashlib.sha256(file.read_bytes()).hexdigest()
                for file in files
            }
        )

    @cached_property
    def _clips_task(self) -> dict[str, Any]:
        drawn_by = [Path(str(one.__file__)) for one in (clips_module, rendering_module)]
        return {
            "clips": str(self._work / f"clips-{digest_of_files(drawn_by)}"),
            **self._asked,
        }

    @cached_property
    def _asked(self) -> dict[str, Any]:
        """What decides about the questions."""
        return {"seed": self._settings.seed, "exam": asdict(self._settings.exam)}

    @cached_property
    def _answerer(self) -> CheckpointAnswerer:
        """The checkpoint in fp32."""
        return answerer_of(self.source, reference_model(self.source))

    def _files(self) -> list[Path]:
        folder = Path(self._clips_task["clips"])
        return [clip_file(folder, item.seed) for item in self.exam.items]

    def prepare(self) -> None:
        """Write the test clips that are not there yet."""
        self._say(f"{len(self.exam.items)} test clips")
        write_clips(self._clips_task)
        items = zip(self.exam.items, self._files(), strict=True)
        self.exam = replace(
            self.exam, items=tuple(replace(item, source=file) for item, file in items)
        )

    def _identity(self, **more: Any) -> dict[str, Any]:
        """What a result depends on: another version of the package measures anew."""
        return {"package": self.code, "checkpoint": self.checkpoint, **more}

    def _once(
        self, file: Path, identity: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return the result in a file; made now unless it is there already."""
        known = json_object(file)
        if known.get("identity") != identity:
            known = {"identity": identity, "result": make()}
            write_json(file, known)
        result: dict[str, Any] = known["result"]
        return result

    def recipe(self, name: str, recipe: Recipe) -> dict[str, Any]:
        """Build, judge and examine a recipe.

        Returns:
            `recipe` and `digest`; `measured_in`; `layers` of the model, and of those `formats`,
            how many have a format that is not the base; `weights`, bytes by graph with scales;
            `gates`, the report with layers in the order in which they run, None without gates; and
            `evaluation`, see `examine`.
        """
        identity = self._identity(recipe=recipe.digest(), **self._asked)
        file = self._folder(recipe) / "measured.json"
        return self._once(file, identity, lambda: self._measured(name, recipe))

    def _folder(self, recipe: Recipe) -> Path:
        return self._work / recipe.name

    @cached_property
    def _clips(self) -> ClipSet:
        """The default clips, to calibrate and judge on."""
        recipe = Recipe.load(ABLATED)
        return clips_of(recipe, None, self._work / CALIBRATION_FOLDER, self.source.config)

    def _calibrated(self, recipe: Recipe) -> Path | None:
        """Find the scales of a recipe; None where it needs none.

        Statistics of the clips stay in one folder, which serves all recipes.
        """
        if not any(rule.quantised for rule in recipe.plan(self.source.config).values()):
            return None
        self._say(f"{recipe.name}: scales")
        made = calibration_from_checkpoint(
            self.source,
            recipe,
            self._work / CALIBRATION_FOLDER,
            answerer=self._answerer,
        )
        folder = self._folder(recipe) / CALIBRATION_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        made.to_folder(folder)
        return folder

    def _bundle(self, name: str, recipe: Recipe) -> Path:
        """Build the bundle of a recipe unless it is there; gates may be missed."""
        folder = self._folder(recipe)

        def make() -> dict[str, Any]:
            spec = BuildSpec(precision=name, calibration=self._calibrated(recipe))
            bundle_from_checkpoint(
                self.source.folder,
                folder / _BUNDLE,
                spec,
                force=True,
                on_stage=lambda stage, number, total: self._say(
                    f"{recipe.name}: [{number}/{total}] {stage}"
                ),
            )
            return {}

        built = folder / "built.json"
        if not is_bundle(folder / _BUNDLE):
            built.unlink(missing_ok=True)
        self._once(built, self._identity(recipe=recipe.digest()), make)
        return folder / _BUNDLE

    def _measured(self, name: str, recipe: Recipe) -> dict[str, Any]:
        bundle = Bundle.open(self._bundle(name, recipe))
        report = None
        if bundle.manifest.judged is not None:
            report = QuantReport.load(bundle.folder, recipe.name)
        with self._answerer_of(bundle, recipe) as answerer:
            self._say(f"{recipe.name}: the exam")
            evaluation = examine(answerer, self.exam)
        return {
            "recipe": recipe.to_dict(),
            "digest": recipe.digest(),
            "measured_in": IN_PYTORCH if needs_engines(recipe) else ONNXRUNTIME,
            "layers": len(layer_names(self.source.config)),
            "formats": dict(Counter(bundle.manifest.formats.values())),
            "weights": weights_in(bundle.folder),
            "gates": self._gates(report),
            "evaluation": evaluation,
        }

    @contextmanager
    def _answerer_of(self, bundle: Bundle, recipe: Recipe) -> Iterator[Answerer]:
        """The bundle in ONNX Runtime, or PyTorch that rounds as its graphs do."""
        if not needs_engines(recipe):
            with Session.open(bundle.folder, ONNXRUNTIME, threads=1) as session:
                yield BundleAnswerer(session)
            return
        formats, precision = bundle.manifest.formats, bundle.manifest.precision
        scales = self._folder(recipe) / CALIBRATION_FOLDER
        known = Calibration.from_folder(scales).layers if scales.exists() else {}
        layers = {layer: how for layer, how in known.items() if formats.get(layer) == how.format}
        fp32 = {layer for layer, name in formats.items() if name == "fp32"}
        rounded = rounded_model(self._answerer.model, layers, precision)
        yield answerer_of(self.source, model_at(rounded, precision, fp32))

    def _gates(self, report: QuantReport | None) -> dict[str, Any] | None:
        if report is None:
            return None
        order = {name: place for place, name in enumerate(layer_names(self.source.config))}
        layers = sorted(report.layers, key=lambda layer: order[layer.layer])
        return replace(report, layers=tuple(layers)).to_dict()

    def ablation(self) -> dict[str, Any]:
        """Measure what int8 would do to the choice of windows."""
        shipped = Recipe.load(ABLATED)

        def make() -> dict[str, Any]:
            self._say("ablation")
            return ablate(
                self._answerer.model,
                self._answerer.read,
                [clip.video for clip in self._clips.calibration],
                self._files(),
                shipped,
                RATIO,
            )

        identity = self._identity(recipe=shipped.digest(), **self._asked)
        return self._once(self._work / "ablation.json", identity, make)

    def speed(self, recipes: Mapping[str, Recipe]) -> dict[str, Any]:
        """Time the bundles of recipes side by side, while nothing else of ours runs."""
        settings = self._settings
        items = self.exam.items[: settings.timed_clips]
        clips = [
            (file, prompt_of(item.questions[0]))
            for item, file in zip(items, self._files(), strict=False)
        ]
        bundles = {one.name: self._bundle(name, one) for name, one in recipes.items()}

        def make() -> dict[str, Any]:
            self._say("speed: all bundles in turn")
            measured = measure_speed(bundles, REFERENCE, clips, ratio=RATIO, tokens=settings.tokens)
            return {"machine": machine(), **measured}

        identity = self._identity(
            recipes={one.name: one.digest() for one in recipes.values()},
            **self._asked,
            timed=[settings.timed_clips, settings.tokens],
        )
        return self._once(self._work / "speed.json", identity, make)
