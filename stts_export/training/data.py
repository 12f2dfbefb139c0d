"""From the data and dev sections of a configuration to what makes examples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.preprocessing import image_preprocessing, video_preprocessing
from stts_export.training.clips import make_clip, split_seed
from stts_export.training.config import DevSettings, SourceSettings, TrainConfig
from stts_export.training.decoding import BrokenClip, Decoder
from stts_export.training.examples import Example, Question
from stts_export.training.feed import ExampleMaker, RecordSource, Source
from stts_export.training.mixture import RatioLaw
from stts_export.training.records import Record, read_records, share_visuals
from stts_export.training.start import Start
from stts_export.training.synthetic import SyntheticSource, clip_example


@dataclass(frozen=True)
class Questions:
    """What the files of a configuration hold, as records; their videos are decoded later."""

    sources: list[list[Record] | None]
    """Of each source; None of the synthetic set."""
    dev: list[Record] | None
    """None for the synthetic set."""


def read_questions(config: TrainConfig) -> Questions:
    """Read and check all files of questions; needs no model.

    Raises:
        InputError: a file cannot be read, or lacks answers, videos or images.
    """
    return Questions(
        [
            _records(source, source.allow_missing) if source.kind == "file" else None
            for source in config.data.sources
        ],
        _records(config.dev)[: config.dev.clips] if config.dev.path else None,
    )


def example_maker(config: TrainConfig, start: Start, questions: Questions) -> ExampleMaker:
    """Make what makes the example at any position of a run."""
    decoder = _decoder(start, config.data.max_frames)
    pruning, settings = config.pruning, config.data.sources
    return ExampleMaker(
        [
            _source(source, config, start.model.config, decoder, records)
            for source, records in zip(settings, questions.sources, strict=True)
        ],
        [source.weight for source in settings],
        RatioLaw(pruning.full_share, pruning.min_ratio, pruning.max_ratio),
        config.seed,
    )


@dataclass(frozen=True)
class DevSet:
    """One process's share of the examples that measure accuracy, in a fixed order."""

    examples: list[Example]
    total: int
    """Examples of all processes."""
    types: tuple[str, ...]
    """Of the questions of all processes."""


def dev_set(
    config: TrainConfig, start: Start, records: list[Record] | None, rank: int = 0, world: int = 1
) -> DevSet:
    """Make the dev examples of a process: every `world`-th, from `rank` on.

    Raises:
        InputError: a video cannot be decoded.
    """
    dev, frames = config.dev, config.data.max_frames
    if records is None:
        vision = start.model.config.vision
        clips = [make_clip(split_seed("dev", index)) for index in range(dev.clips)]
        own = [
            clip_example(clip, clip.questions, vision, frames, dev.prune_ratio)
            for clip in clips[rank::world]
        ]
        return DevSet(own, len(clips), _types(clip.questions for clip in clips))
    decoder = _decoder(start, frames)
    try:
        own = [decoder.example(record, dev.prune_ratio) for record in records[rank::world]]
    except BrokenClip as broken:
        raise InputError(
            str(broken), where="dev", fix="take it out of the data, or repair the file"
        ) from None
    return DevSet(own, len(records), _types(record.questions for record in records))


def _types(questions: Iterable[Sequence[Question]]) -> tuple[str, ...]:
    return tuple(sorted({question.type for some in questions for question in some}))


def _records(settings: SourceSettings | DevSettings, allow_missing: int = 0) -> list[Record]:
    """All questions about one file in one record."""
    records = read_records(
        Path(settings.path),
        settings.layout or None,
        media=Path(settings.media) if settings.media else None,
        split=settings.split or None,
        allow_missing=allow_missing,
    )
    return share_visuals(records)


def _source(
    settings: SourceSettings,
    config: TrainConfig,
    model: ModelConfig,
    decoder: Decoder,
    records: list[Record] | None,
) -> Source:
    data = config.data
    if records is None:
        return SyntheticSource(
            settings, model.vision, config.seed, data.batch_size, data.max_frames
        )
    decoder = replace(decoder, max_questions=settings.max_questions)
    return RecordSource(records, decoder, config.seed)


def _decoder(start: Start, max_frames: int) -> Decoder:
    """Sampling and crops as the checkpoint says, and as deployed."""
    model = start.model.config
    with TemporaryDirectory() as name:
        folder = Path(name)
        start.write_config_files(folder)
        try:
            video = video_preprocessing(folder, model.vision)
            images = image_preprocessing(folder, model.vision)
        except InputError as error:
            where = (error.where or "").replace(name, str(start.description["from"]))
            raise InputError(
                error.message, where=where, allowed=error.allowed, fix=error.fix
            ) from None
    return Decoder(model, max_frames, video.max_fps, images)
