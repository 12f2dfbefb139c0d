"""What is asked, and which answers count."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from stts_export.errors import InputError
from stts_export.training.clips import ANSWERS, TOP_LEVEL, TYPES, Clip, split_seed
from stts_export.training.exam import (
    Exam,
    file_exam,
    is_right,
    prompt_of,
    right_answers,
    synthetic_exam,
)
from stts_export.training.examples import Question
from tests.helpers import write_video

CHOICE = Question("", "Which colour?", "Red hat", ("Blue hat", "Red hat"))


@pytest.fixture(scope="module", params=range(TOP_LEVEL + 1))
def exam(request: pytest.FixtureRequest) -> Exam:
    return synthetic_exam(level=request.param)


def _clips(exam: Exam) -> list[Clip]:
    return [item.source for item in exam.items if isinstance(item.source, Clip)]


def test_five_hundred_questions_about_250_clips_of_the_test_split(exam: Exam):
    seeds = {clip.seed for clip in _clips(exam)}
    assert len(seeds) == 250
    assert min(seeds) >= split_seed("test", 0)
    assert len(list(exam.questions())) == 500
    assert all(len(set(item.questions)) == len(item.questions) > 0 for item in exam.items)
    assert all(
        question in clip.questions
        for clip, item in zip(_clips(exam), exam.items, strict=True)
        for question in item.questions
    )


def test_types_and_answers_are_balanced(exam: Exam):
    types = Counter(question.type for question in exam.questions())
    assert exam.types == TYPES
    assert max(types.values()) - min(types.values()) <= 5
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in exam.questions():
        answers[question.type][question.answer] += 1
    for name, counts in answers.items():
        assert max(counts.values()) <= 1.35 * types[name] / len(counts), name


def test_chance_is_a_guess_among_the_possible_answers(exam: Exam):
    for name in ("colour", "direction", "shape", "last"):
        assert exam.chance[name] == pytest.approx(1 / len(ANSWERS[name]))
    assert exam.chance["order"] == 0.5
    assert exam.level is not None
    assert exam.chance["count"] == pytest.approx(1 / (2 + exam.level))


def test_seeds_and_splits_have_no_clip_in_common():
    exams = [
        synthetic_exam(40, 20),
        synthetic_exam(40, 20, seed=1),
        synthetic_exam(40, 20, split="dev"),
    ]
    seeds = [{clip.seed for clip in _clips(exam)} for exam in exams]
    assert len(set.union(*seeds)) == 60
    assert exams[0] == synthetic_exam(40, 20)


def test_no_more_clips_than_questions():
    exam = synthetic_exam(3, 250)
    assert [len(item.questions) for item in exam.items] == [1, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"questions": 50, "clips": 2}, "2 clips have"),
        ({"questions": 0}, "questions is 0"),
        ({"clips": 30_000, "questions": 30_000}, "clips is 30000"),
        ({"level": 3}, "level is 3"),
        ({"seed": 10_000}, "seed is 10000"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "train"}, "split 'train'"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: dict, text: str):
    with pytest.raises(InputError, match=text):
        synthetic_exam(**arguments)


def test_clips_are_written_as_h264_and_files_are_left_alone(tmp_path: Path):
    item = synthetic_exam(1, 1, level=0).items[0]
    path = item.file(tmp_path)
    assert path is not None
    assert path.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    "text", ["B", "b.", " B\n", "Red hat", "red hat.", "B. Red hat", "b. red hat "]
)
def test_letter_and_text_of_a_choice_are_right(text: str):
    assert is_right(CHOICE, text)


@pytest.mark.parametrize("text", ["", "A", "Blue hat", "A. Red hat", "BB", "red", "The red hat"])
def test_anything_else_is_wrong(text: str):
    assert not is_right(CHOICE, text)


def test_open_answers_and_prompts():
    question = Question("colour", "What colour?", "Red.")
    assert right_answers(question) == ("Red.",)
    assert is_right(question, " red ")
    assert not is_right(question, "dark red")
    assert prompt_of(question) == "What colour?"
    assert prompt_of(CHOICE).endswith("A. Blue hat\nB. Red hat")


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    """Two videos with three questions each of types a and b, and a text with one of type c."""
    entries: list[dict] = []
    for name in ("x.mp4", "y.mp4"):
        write_video(tmp_path / name, 4)
        for number, kind in enumerate("aab"):
            entries.append(
                {"video": name, "question": f"Q{number}?", "answer": "1", "type": kind}
                | ({"choices": ["1", "2", "3", "4"]} if kind == "b" else {})
            )
    entries.append({"question": "Text?", "answer": "1", "type": "c"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return path


def test_a_file_is_asked_whole_and_a_video_once(questions_file: Path):
    exam = file_exam(questions_file)
    assert [len(item.questions) for item in exam.items] == [3, 3, 1]
    assert [item.file(questions_file.parent) for item in exam.items] == [
        questions_file.with_name("x.mp4"), questions_file.with_name("y.mp4"), None,
    ]  # fmt: skip
    assert exam.types == ("a", "b", "c")
    assert exam.chance == {"b": 0.25}
    assert (exam.data, exam.split, exam.level) == (str(questions_file), None, None)


def test_fewer_questions_of_a_file_are_balanced(questions_file: Path):
    exam = file_exam(questions_file, questions=5, seed=3)
    counts = Counter(question.type for question in exam.questions())
    assert counts == {"a": 2, "b": 2, "c": 1}
    assert exam == file_exam(questions_file, questions=5, seed=3)


def test_fewer_clips_of_a_file_depend_on_the_seed(questions_file: Path):
    drawn = {file_exam(questions_file, clips=1, seed=seed).items[0].name for seed in range(20)}
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"clips": 4}, "has 3 clips, not 4"),
        ({"questions": 8}, "have 7 questions, not 8"),
        ({"layout": "json"}, "layout is 'json'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_what_a_file_does_not_have_is_refused(questions_file: Path, arguments: dict, text: str):
    with pytest.raises(InputError, match=text):
        file_exam(questions_file, **arguments)


def test_a_type_named_as_all_of_them_is_refused(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Q?", "answer": "1", "type": "all"}), encoding="utf-8")
    with pytest.raises(InputError, match="the type 'all'"):
        file_exam(path)


def test_missing_files_are_refused_unless_allowed(questions_file: Path):
    questions_file.with_name("x.mp4").unlink()
    with pytest.raises(InputError, match="1 of 2 files is missing"):
        file_exam(questions_file)
    assert len(file_exam(questions_file, allow_missing=1).items) == 2
