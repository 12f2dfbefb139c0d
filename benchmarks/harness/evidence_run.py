"""The evidence from beginning to end: bases, runs, examinations, speed, and all in one JSON."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import evidence_jobs as jobs
from benchmarks.harness.evidence_extend import Held
from benchmarks.harness.evidence_jobs import Say, Unit, Workers
from benchmarks.harness.evidence_plan import (
    MAIN,
    SCALING,
    Examination,
    ExamSize,
    Training,
    Variant,
    base_trainings,
    changes_nothing,
    examinations,
    plain,
    training,
)
from benchmarks.harness.evidence_work import exam_of
from benchmarks.harness.timing import machine
from stts_export.checkpoint import open_checkpoint
from stts_export.errors import InputError
from stts_export.files import json_object, write_json
from stts_export.training import clips as clips_module
from stts_export.training import rendering as rendering_module
from stts_export.training.config import TrainConfig
from stts_export.training.evaluation import RATIOS
from stts_export.training.exam import ALL
from stts_export.training.selectors import SELECTORS

BASE_CONFIGS = (Path("configs/demo-pretrained.yaml"), Path("configs/demo-base.yaml"))
_OF_EXAMINATION = ("max_frames", "dtype")
_OF_TRAINING = ("steps", "examples", "training_seconds", "dev_accuracy", "machine", "torch")


@dataclass(frozen=True)
class Settings:
    """What is asked for."""

    config: TrainConfig
    """Of `main`."""
    config_name: str
    work: Path
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    base: str | None
    """Checkpoint; None to train one for each seed."""
    base_configs: tuple[TrainConfig, ...]
    """Of that training, one after the other; empty where a base is given."""
    exam: ExamSize = field(default_factory=ExamSize)
    scaling: bool = True
    jobs: int = 1
    speed_repeats: int = 20
    extends: Held | None = None
    """Results that the variants are added to."""


def run(settings: Settings, workers: Workers, command: str, say: Say) -> dict[str, Any]:
    """Do everything that is not done yet; returns what `-o` writes.

    Raises:
        InputError: the base, a configuration or the work folder is at fault, or does not go with
            the results that are extended.
        JobError: a run failed.
        KeyboardInterrupt: what was begun is saved.
    """
    bases = _bases(settings)
    _check(settings, bases)
    clips = _clips_folder(settings.work)
    first = [_clips_unit(settings, seed, clips, workers) for seed in settings.seeds]
    first += [_base_unit(runs, workers, say) for runs in bases.values()]
    jobs.do_all("test clips and bases", first, settings.jobs, workers, say)
    starts = {seed: _start(settings, bases, seed) for seed in settings.seeds}
    if settings.extends is not None:
        settings.extends.check_bases({seed: sha256 for seed, (_, sha256) in starts.items()})
    runs = {
        (variant.name, seed): training(
            variant, settings.config, seed, *starts[seed], work=settings.work
        )
        for variant in settings.variants
        for seed in settings.seeds
        if not changes_nothing(variant, settings.config)
    }
    asked = {
        (variant.name, seed): examinations(
            variant, runs[variant.name, seed], seed, settings.exam, settings.scaling
        )
        for variant in settings.variants
        for seed in settings.seeds
        if (variant.name, seed) in runs
    }
    for one in runs.values():
        jobs.claim(one)
    units = [_run_unit(one, asked[key], clips, workers, say) for key, one in runs.items()]
    jobs.do_all("runs", units, settings.jobs, workers, say)
    # All is there by now, so nothing is done here but reading.
    found = {
        key: [jobs.examine(one, clips, workers) for one in examined]
        for key, examined in asked.items()
    }
    added: dict[str, list[Any]] = {
        "runs": [_run_described(*key, one) for key, one in runs.items()],
        "same_as_main": [
            one.name for one in settings.variants if changes_nothing(one, settings.config)
        ],
        "evaluations": [
            _evaluation(variant, examined, result)
            for (variant, _), examineds in asked.items()
            for examined, result in zip(examineds, found[variant, _], strict=True)
        ],
    }
    made = {
        "command": command,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "torch": version("torch"),
    }
    if settings.extends is not None:
        return _extended(settings, settings.extends, added, made, found)
    speed = _speed(settings, runs[MAIN, settings.seeds[0]], clips, workers, say)
    return {
        "benchmark": "evidence",
        **made,
        "settings": _described(settings, found),
        "config": plain(settings.config.to_dict()),
        "base": _base_described(settings, starts),
        "runs": added["runs"],
        "same_as_main": added["same_as_main"],
        "exams": {
            str(seed): [" ".join(clip) for clip in found[MAIN, seed][0]["asked"]]
            for seed in settings.seeds
        },
        "chance": found[MAIN, settings.seeds[0]][0]["chance"],
        "evaluations": added["evaluations"],
        "speed": speed,
    }


def _extended(
    settings: Settings,
    held: Held,
    added: Mapping[str, Sequence[Any]],
    made: Mapping[str, Any],
    found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Add what was found to earlier results, once it is known to fit them."""
    for results in found.values():
        held.check_settings({key: results[0][key] for key in _OF_EXAMINATION})
    held.check_windows(added["evaluations"])
    variants = [one.name for one in settings.variants]
    return held.extended(added, {**made, "clips_code": _clips_code(), "variants": variants})


def _bases(settings: Settings) -> dict[int, list[Training]]:
    """Seed -> the runs that make its base; none where a base is given."""
    if not settings.base_configs:
        return {}
    return {
        seed: base_trainings(settings.base_configs, seed, settings.work) for seed in settings.seeds
    }


def _check(settings: Settings, bases: Mapping[int, Sequence[Training]]) -> None:
    """Refuse, before any work, what would fail later."""
    if settings.extends is not None:
        _check_extended(settings, settings.extends)
    if not bases:
        _, sha256 = _start(settings, bases, settings.seeds[0])
        if settings.extends is not None:
            settings.extends.check_bases(dict.fromkeys(settings.seeds, sha256))
    for variant in settings.variants:
        training(variant, settings.config, 1, Path("base"), "", settings.work)
    for runs in bases.values():
        for base in runs:
            jobs.claim(base)


def _check_extended(settings: Settings, held: Held) -> None:
    held.check_variants([one.name for one in settings.variants])
    held.check_settings(_asked(settings))
    held.check_config(settings.config.to_dict())
    exams = {
        str(seed): [
            " ".join(question.type for question in item.questions)
            for item in exam_of({"seed": seed, "exam": asdict(settings.exam)}).items
        ]
        for seed in settings.seeds
    }
    held.check_clips(exams, _clips_code())


def _start(
    settings: Settings, bases: Mapping[int, Sequence[Training]], seed: int
) -> tuple[Path, str]:
    """Folder of the checkpoint that a seed's runs start with, and a hash of what is read of it.

    Raises:
        InputError: it cannot be read, or has a scorer that the runs would go on with.
    """
    source = bases[seed][-1].checkpoint if seed in bases else settings.base
    assert source is not None
    checkpoint = open_checkpoint(source)
    if checkpoint.has_scorer and not settings.config.start.fresh_scorer:
        raise InputError(
            f"{source} has a scorer already, and the evidence is about what a new one learns",
            where=settings.config_name,
            fix="set start.fresh_scorer: true",
        )
    total = hashlib.sha256()
    for file in sorted(checkpoint.files):
        total.update(f"{file.name}\n".encode())
        total.update(file.read_bytes())
    return checkpoint.folder, total.hexdigest()


def _clips_folder(work: Path) -> Path:
    """Folder of the test clips, named after the code that draws them."""
    return work / f"clips-{_clips_code()}"


def _clips_code() -> str:
    """Twelve digits that stand for the code that draws test clips."""
    sources = [Path(str(module.__file__)) for module in (clips_module, rendering_module)]
    return jobs.digest_of_files(sources)


def _clips_unit(settings: Settings, seed: int, clips: Path, workers: Workers) -> Unit:
    task = {"kind": "clips", "clips": str(clips), "seed": seed, "exam": asdict(settings.exam)}
    name = f"seed{seed}-{settings.exam.questions}-{settings.exam.clips}-{settings.exam.level}"
    done = clips / f"{name}.json"

    def do() -> None:
        write_json(done, workers.work(task, clips / f"{name}.log"))

    return Unit(f"test clips, seed {seed}", done.exists(), do)


def _base_unit(runs: Sequence[Training], workers: Workers, say: Say) -> Unit:
    def do() -> None:
        for one in runs:
            jobs.train(one, workers, say)

    return Unit(runs[-1].name, all(jobs.is_trained(one) for one in runs), do)


def _run_unit(
    one: Training, asked: Sequence[Examination], clips: Path, workers: Workers, say: Say
) -> Unit:
    """A training run and everything its model is asked."""

    def do() -> None:
        jobs.train(one, workers, say)
        say(f"{one.name}: {len(asked)} examinations")
        for examined in asked:
            jobs.examine(examined, clips, workers)

    is_done = jobs.is_trained(one) and all(examined.file.exists() for examined in asked)
    return Unit(one.name, is_done, do)


def _speed(
    settings: Settings, one: Training, clips: Path, workers: Workers, say: Say
) -> dict[str, Any]:
    """Measure the speed of a run's model while nothing else of ours runs; empty if not wanted."""
    if not settings.speed_repeats:
        return {}
    seed = settings.seeds[0]
    task = {
        "kind": "speed", "checkpoint": str(one.checkpoint), "clips": str(clips), "seed": seed,
        "exam": asdict(settings.exam), "ratios": list(RATIOS), "repeats": settings.speed_repeats,
    }  # fmt: skip
    file = one.folder / "speed.json"
    kept = json_object(file)
    if kept.get("task") != task:
        say("speed: all settings in turn")
        measured = {
            "machine": machine(),
            "torch": version("torch"),
            "seed": seed,
            **workers.work(task, one.folder / "speed.log"),
        }
        kept = {"task": task, "result": measured}
        write_json(file, kept)
    result: dict[str, Any] = kept["result"]
    return result


def _described(
    settings: Settings, found: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    return {
        "config": settings.config_name,
        **_asked(settings),
        **{key: found[MAIN, settings.seeds[0]][0][key] for key in _OF_EXAMINATION},
        "selectors": list(SELECTORS),
        "scaling": [list(one) for one in SCALING] if settings.scaling else [],
        "clips_code": _clips_code(),
    }


def _asked(settings: Settings) -> dict[str, Any]:
    """What decides which questions are asked, and with how much removed."""
    return {"seeds": list(settings.seeds), **asdict(settings.exam), "ratios": list(RATIOS)}


def _base_described(settings: Settings, starts: Mapping[int, tuple[Path, str]]) -> dict[str, Any]:
    folder, _ = starts[settings.seeds[0]]
    made = json_object(folder / "training.json")
    return {
        "from_scratch": settings.base is None,
        "sha256": {str(seed): digest for seed, (_, digest) in starts.items()},
        "training": {key: made.get(key) for key in ("seed", "parameters", *_OF_TRAINING)},
    }


def _run_described(variant: str, seed: int, one: Training) -> dict[str, Any]:
    made = json_object(one.checkpoint / "training.json")
    return {
        "variant": variant,
        "seed": seed,
        "prune_at": made["start"]["prune_at"],
        **{key: made[key] for key in _OF_TRAINING},
    }


def _evaluation(variant: str, examined: Examination, result: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            **{
                key: row[key]
                for key in ("prune_ratio", "selector", "kept_windows", "total_windows", "marks")
            },
            "right": row["right"][ALL],
        }
        for row in result["rows"]
    ]
    return {
        "variant": variant,
        "seed": examined.seed,
        "max_frames": examined.max_frames,
        "refill": examined.refill,
        "rows": rows,
    }
