from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.preprocessing import ImagePreprocessing
from stts_export.runtime.images import image_crops
from stts_export.runtime.session import Session
from stts_export.runtime.video import read_video
from stts_export.training.decoding import BrokenClip, Decoder, as_asked
from stts_export.training.examples import ImageInput, Question, VideoInput
from stts_export.training.records import Record
from tests.helpers import picture, random_model, small_config, write_video

CONFIG = ModelConfig.from_dict(small_config(), has_scorer=True)
SQUARE_VALUES = small_config(
    **{"vit_config.image_default_input_size": [126, 126], "vit_config.image_num_pos": 81}
)
SQUARE = ModelConfig.from_dict(SQUARE_VALUES, has_scorer=True)
IMAGES = ImagePreprocessing(max_crops=4, overlap_margins=(2, 1))
OPEN = Question("kind", "What?", "that")
CHOICE = Question("kind", "Which?", "red", ("blue", "red", "green"))


def of_video(path: Path, *questions: Question) -> Record:
    return Record(path, None, questions or (OPEN,), "data.jsonl:line 3")


def of_image(path: Path) -> Record:
    return Record(None, path, (OPEN,), "data.jsonl:line 4")


def save_picture(path: Path, size: tuple[int, int] = (150, 260)) -> np.ndarray:
    pixels = picture(size)
    Image.fromarray(pixels).save(path)
    return pixels


def test_a_video_is_sampled_as_deployed(tmp_path: Path):
    path = write_video(tmp_path / "clip.mp4", frames=24)
    example = Decoder(CONFIG, max_frames=4, max_fps=2.0).example(of_video(path), 0.4)
    expected = read_video(path, max_frames=4, size=(84, 126))
    assert isinstance(example.visual, VideoInput)
    np.testing.assert_array_equal(example.visual.frames, expected.frames)
    assert example.visual.frames.shape == (4, 84, 126, 3)
    assert example.visual.timestamps == (0.0, 1.0, 2.0, 3.0)
    assert (example.prune_ratio, example.name) == (0.4, "data.jsonl:line 3")
    assert example.questions == (OPEN,)
    slower = Decoder(CONFIG, max_frames=9, max_fps=0.5).example(of_video(path)).clip
    assert slower is not None
    assert slower.timestamps == (0.0, 2.0, 3.0)


def test_an_image_is_cut_as_deployed(tmp_path: Path):
    pixels = save_picture(tmp_path / "p.png")
    example = Decoder(SQUARE, 8, images=IMAGES).example(of_image(tmp_path / "p.png"), 0.5)
    cut = image_crops(pixels, (126, 126), 14, max_crops=4, overlap_margins=(2, 1))
    assert isinstance(example.visual, ImageInput)
    np.testing.assert_array_equal(example.visual.crops, cut.crops)
    np.testing.assert_array_equal(example.visual.pooled_patches, cut.pooled_patches)
    assert example.visual.tokens.grid == cut.grid
    assert example.prune_ratio == 0
    assert example.clip is None
    model = random_model(SQUARE_VALUES)
    arrays = (example.visual.crops, example.visual.pooled_patches)
    with torch.no_grad():
        features = model.encode_images(*map(torch.from_numpy, arrays))
    rows, columns, high_rows, high_columns = example.visual.tokens.grid
    assert len(features) == rows * columns + high_rows * high_columns


def test_a_session_sees_the_same(tmp_path: Path, text_bundle: Path):
    video = write_video(tmp_path / "clip.mp4", frames=20)
    save_picture(tmp_path / "p.jpg")
    with Session.open(text_bundle, threads=1) as session:
        decoder = Decoder(session.config, max_frames=4)
        clip = session.read_video(video, max_frames=4)
        encoded = session.encode_image(tmp_path / "p.jpg")
    seen = decoder.example(of_video(video)).visual
    assert isinstance(seen, VideoInput)
    np.testing.assert_array_equal(seen.frames, clip.frames)
    assert seen.timestamps == tuple(clip.timestamps)
    image = decoder.example(of_image(tmp_path / "p.jpg")).visual
    assert isinstance(image, ImageInput)
    assert image.tokens == encoded.tokens
    assert len(image.crops) == encoded.crops


def test_a_picture_in_a_video_format_is_an_image(tmp_path: Path):
    save_picture(tmp_path / "still.gif")
    example = Decoder(SQUARE, 8, images=IMAGES).example(of_video(tmp_path / "still.gif"), 0.5)
    assert isinstance(example.visual, ImageInput)
    assert example.prune_ratio == 0


def test_text_alone():
    example = Decoder(CONFIG, 8).example(Record(None, None, (OPEN,), "n"), 0.5)
    assert example.visual is None
    assert example.prune_ratio == 0


def test_choices_are_asked_by_letter(tmp_path: Path):
    asked = as_asked(CHOICE)
    assert asked == Question(
        "kind",
        "Which?\nOnly return the correct answer option.\nA. blue\nB. red\nC. green",
        "B",
        ("A", "B", "C"),
    )
    assert as_asked(OPEN) == OPEN
    record = Record(None, None, (OPEN, CHOICE), "n")
    assert Decoder(CONFIG, 8).example(record).questions == (OPEN, asked)
    with pytest.raises(InputError, match=r"Which\?: the answer 'pink' is not among the choices"):
        as_asked(dataclasses.replace(CHOICE, answer="pink"))


def test_no_more_questions_than_allowed():
    questions = tuple(Question("", str(number), "x") for number in range(10))
    record = Record(None, None, questions, "n")
    decoder = Decoder(CONFIG, 8, max_questions=4)
    drawn = {seed: decoder.example(record, seed=(1, seed)).questions for seed in range(20)}
    for chosen in drawn.values():
        assert len(chosen) == 4
        assert sorted(chosen, key=questions.index) == list(chosen)
    assert len(set(drawn.values())) > 10
    assert {question for chosen in drawn.values() for question in chosen} == set(questions)
    assert decoder.example(record, seed=(1, 7)).questions == drawn[7]
    assert Decoder(CONFIG, 8).example(record).questions == questions
    assert Decoder(CONFIG, 8, max_questions=10).example(record).questions == questions


def damaged(folder: Path) -> dict[str, Path]:
    """Files that are broken in different ways, with a part of what is said about them."""
    whole = write_video(folder / "whole.mp4", frames=40).read_bytes()
    contents = {
        "the file is empty": b"",
        "the file is cut off": whole[: len(whole) // 2],
        "is not a video or an image": b"no video at all, but text\n" * 20,
    }
    files = {}
    for number, (reason, content) in enumerate(contents.items()):
        files[reason] = folder / f"broken{number}.mp4"
        files[reason].write_bytes(content)
    files["there is no such file"] = folder / "nowhere.mp4"
    return files


def test_broken_videos_are_named(tmp_path: Path):
    decoder = Decoder(CONFIG, 8)
    for reason, path in damaged(tmp_path).items():
        with pytest.raises(BrokenClip) as caught:
            decoder.example(of_video(path))
        assert caught.value.name == "data.jsonl:line 3"
        assert caught.value.reason.startswith(f"{path}: {reason}")
        assert "\n" not in caught.value.reason
        assert str(caught.value) == f"data.jsonl:line 3: {caught.value.reason}"


def test_broken_images_are_named(tmp_path: Path):
    decoder = Decoder(SQUARE, 8, images=IMAGES)
    save_picture(tmp_path / "p.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "p.png").read_bytes()[:2000])
    with pytest.raises(BrokenClip, match=r"line 4: .*cut\.png: the picture is damaged or cut off"):
        decoder.example(of_image(tmp_path / "cut.png"))
    write_video(tmp_path / "clip.mp4")
    with pytest.raises(BrokenClip, match=r"clip\.mp4: is a video, not an image"):
        decoder.example(of_image(tmp_path / "clip.mp4"))


def test_a_broken_clip_travels_between_processes():
    sent = pickle.loads(pickle.dumps(BrokenClip("n", "why")))
    assert (sent.name, sent.reason, str(sent)) == ("n", "why", "n: why")


def test_a_model_that_takes_no_images_is_no_broken_clip(tmp_path: Path):
    save_picture(tmp_path / "p.png")
    with pytest.raises(InputError, match="a square of whole patches"):
        Decoder(CONFIG, 8).example(of_image(tmp_path / "p.png"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_frames": 0}, "max_frames is 0"),
        ({"max_fps": 0.0}, "max_fps is 0.0"),
        ({"max_questions": 0}, "max_questions is 0"),
    ],
)
def test_limits_are_checked_before_any_file(limits: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(Decoder(CONFIG, 8), **limits)
