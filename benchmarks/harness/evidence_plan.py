"""What the evidence consists of: variants of one training run, and what their models are asked.

A variant is the main configuration with a few other values. Each is trained once per seed, from the
same base, and examined on test clips that belong to the seed and to no other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stts_export.errors import InputError, did_you_mean
from stts_export.training.clips import TOP_LEVEL
from stts_export.training.config import TrainConfig
from stts_export.training.evaluation import RATIOS
from stts_export.training.exam import CLIPS, QUESTIONS
from stts_export.training.selectors import EVS, RANDOM, SELECTORS, STTS, TOME, UNIFORM_FRAMES

MAIN, UNPRUNED = "main", "unpruned"
_OWN_RATIOS = (0.0, 0.5, 0.8)

SCALING: tuple[tuple[int, float], ...] = (
    (2, 0.0), (4, 0.5), (10, 0.8),
    (3, 0.0), (6, 0.5), (10, 0.7),
    (5, 0.0), (10, 0.5),
    (7, 0.0), (14, 0.5),
)  # fmt: skip
"""Frames at most and prune ratio: from one line to its next, more frames at equally many tokens.

Test clips have 11 samples or more, so up to 10 frames a clip has all of them; of the 14 of the last
line it may have fewer, and then fewer tokens too.
"""


@dataclass(frozen=True)
class Variant:
    """A training run that differs from the main one in what it is to show."""

    name: str
    shows: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """"section.key" of the configuration -> value."""
    selectors: tuple[str, ...] = (STTS,)
    """That its models are examined with."""
    ratios: tuple[float, ...] = _OWN_RATIOS
    refill: bool = True
    """In the examination; as in its training."""
    default: bool = True
    """Whether it is run when no variants are named."""


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(MAIN, "learned scores", selectors=SELECTORS, ratios=RATIOS),
        Variant(
            UNPRUNED,
            "the same fine-tuning with nothing removed; pruned after it by what needs no training",
            {"pruning.full_share": 1.0, "dev.prune_ratio": 0.0},
            selectors=(RANDOM, UNIFORM_FRAMES, TOME, EVS),
        ),
        Variant(
            "random",
            "trained and examined with random windows: the paper's trained baseline",
            {"pruning.selector": RANDOM},
            selectors=(RANDOM,),
        ),
        Variant(
            "tome",
            "trained and examined with token merging",
            {"pruning.selector": TOME},
            selectors=(TOME,),
        ),
        Variant(
            "uniform-frames",
            "trained and examined with fewer frames",
            {"pruning.selector": UNIFORM_FRAMES},
            selectors=(UNIFORM_FRAMES,),
            default=False,
        ),
        Variant(
            "evs",
            "trained and examined with repeats dropped after the tower",
            {"pruning.selector": EVS},
            selectors=(EVS,),
            default=False,
        ),
        Variant("aux-0", "no similarity loss", {"pruning.similarity_coefficient": 0.0}),
        Variant(
            "aux-reference",
            "similarity loss with the reference's coefficient",
            {"pruning.similarity_coefficient": 0.5},
        ),
        Variant("prune-at-0", "removal after an earlier block", {"start.prune_at": 0}),
        Variant("prune-at-2", "removal after a later block", {"start.prune_at": 2}),
        Variant(
            "refill-off",
            "frames alone in their bin do not see what was removed from them",
            {"pruning.refill": False},
            refill=False,
        ),
    )
}


@dataclass(frozen=True)
class ExamSize:
    """How many questions each seed's models are asked, and about how many clips."""

    questions: int = QUESTIONS
    clips: int = CLIPS
    level: int = TOP_LEVEL
    """Difficulty of the clips."""


@dataclass(frozen=True)
class Training:
    """A training run, in a folder of its own."""

    name: str
    """For messages."""
    folder: Path
    config: TrainConfig
    base: str = ""
    """Hash of the checkpoint that it starts with; empty from scratch."""

    @property
    def run(self) -> Path:
        """Folder that `stts-export train` writes."""
        return self.folder / "run"

    @property
    def checkpoint(self) -> Path:
        """The model after the last step; there when the run is finished."""
        return self.run / f"step{self.config.optim.steps}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this run and no other, wherever its files lie; plain values for JSON."""
        return {"config": without_places(self.config.to_dict()), "base": self.base}


@dataclass(frozen=True)
class Examination:
    """What a finished run is asked with one number of frames."""

    name: str
    training: Training
    seed: int
    """Of the test clips."""
    exam: ExamSize
    ratios: tuple[float, ...]
    selectors: tuple[str, ...]
    max_frames: int | None
    """As the checkpoint says when None."""
    refill: bool

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it this examination and no other; plain values for JSON."""
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in ("name", "training", "exam")
        }
        exam = dataclasses.asdict(self.exam)
        return plain({**values, "exam": exam, "training": digest(self.training.identity)})

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return self.training.folder / f"{self.name}-{digest(self.identity)}.json"


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON gives back of some values."""
    parsed: dict[str, Any] = json.loads(json.dumps(values))
    return parsed


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration's plain values without those that say where files lie."""
    values = plain(config)
    del values["output"], values["start"]["checkpoint"]
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return found


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name what two mappings do not have in common; what one lacks is None."""
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


def digest(values: Mapping[str, Any]) -> str:
    """Return twelve digits that stand for plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def chosen_variants(names: Sequence[str] | None, *, with_main: bool = True) -> list[Variant]:
    """Return the variants of these names in their order of `VARIANTS`; the default ones for None.

    Args:
        names: of variants.
        with_main: whether `main` has to be among them.

    Raises:
        InputError: there is no such variant, or `main` is not among them and has to be.
    """
    if names is None:
        return [variant for variant in VARIANTS.values() if variant.default]
    for name in names:
        if name not in VARIANTS:
            raise InputError(
                f"unknown variant {name!r}{did_you_mean(name, VARIANTS)}",
                where="--variants",
                allowed=", ".join(VARIANTS),
            )
    if with_main and MAIN not in names:
        raise InputError(
            f"{MAIN} is not among the variants",
            where="--variants",
            fix=f"add it: all others are compared with {MAIN}; or --extend results that have it",
        )
    return [variant for name, variant in VARIANTS.items() if name in names]


def with_overrides(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """Return a configuration with other values.

    Args:
        config: any.
        overrides: "key" or "section.key" -> value.

    Raises:
        InputError: a value is not allowed.
    """
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        if name:
            value = replace(getattr(config, section), **{name: value})
        config = replace(config, **{section: value})
    return config


def base_trainings(configs: Sequence[TrainConfig], seed: int, work: Path) -> list[Training]:
    """Return the runs that make a seed's own base, each from the one before.

    Raises:
        InputError: the first configuration does not begin from scratch, or a later one does.
    """
    runs: list[Training] = []
    for number, config in enumerate(configs, start=1):
        if bool(config.start.checkpoint) != bool(runs):
            raise InputError(
                f"start.checkpoint of configuration {number} is {config.start.checkpoint!r}",
                where="--base-config",
                allowed="absent in the first one, set in the others",
            )
        if runs:
            config = with_overrides(config, {"start.checkpoint": str(runs[-1].checkpoint)})
        folder = work / f"base{number}-seed{seed}"
        own = _own(config, seed, folder)
        runs.append(Training(f"base {number}, seed {seed}", folder, own))
    return runs


def training(
    variant: Variant, config: TrainConfig, seed: int, checkpoint: Path, base: str, work: Path
) -> Training:
    """Return a variant's run.

    Args:
        variant: which.
        config: the main configuration.
        seed: of the run.
        checkpoint: folder that it starts with.
        base: hash of that.
        work: folder of all runs.

    Raises:
        InputError: the variant's values do not go with the configuration's.
    """
    folder = work / f"{variant.name}-seed{seed}"
    start = {"start.checkpoint": str(checkpoint.resolve())}
    own = _own(with_overrides(config, {**start, **variant.overrides}), seed, folder)
    return Training(f"{variant.name}, seed {seed}", folder, own, base)


def _own(config: TrainConfig, seed: int, folder: Path) -> TrainConfig:
    values = {"seed": seed, "output": str(folder / "run"), "threads": 1, "keep_checkpoints": 1}
    return with_overrides(config, values)


def changes_nothing(variant: Variant, config: TrainConfig) -> bool:
    """Whether a variant other than `main` is what `main` is already."""
    return variant.name != MAIN and with_overrides(config, variant.overrides) == config


def examinations(
    variant: Variant, training: Training, seed: int, exam: ExamSize, scaling: bool = True
) -> list[Examination]:
    """Return what a run's model is asked.

    Args:
        variant: that the run is of.
        training: the run.
        seed: of the test clips.
        exam: their size.
        scaling: whether `main` is asked with other numbers of frames too.
    """
    asked = [
        Examination(
            "selectors", training, seed, exam, variant.ratios, variant.selectors, None,
            variant.refill,
        )
    ]  # fmt: skip
    if variant.name == MAIN and scaling:
        by_frames: dict[int, list[float]] = {}
        for frames, ratio in SCALING:
            by_frames.setdefault(frames, []).append(ratio)
        asked += [
            Examination(f"frames{frames}", training, seed, exam, tuple(ratios), (STTS,), frames,
                        variant.refill)
            for frames, ratios in sorted(by_frames.items())
        ]  # fmt: skip
    return asked
