from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.training.examples import Question
from stts_export.training.records import LAYOUTS, Record, read_records, share_visuals

GOOD = {"video": "a.mp4", "question": "Which?", "answer": "red"}
CHOICES = {**GOOD, "choices": ["blue", "red"]}
HEADER = "video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files whose existence is all that counts here."""
    for name in ("a.mp4", "b.mp4", "p.jpg"):
        (tmp_path / name).touch()
    return tmp_path


def write_lines(path: Path, *entries: Any) -> Path:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def refused(path: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_records(path, **options)
    text = str(caught.value)
    for part in parts:
        assert part in text
    return text


def test_json_lines(folder: Path):
    file = write_lines(
        folder / "data.jsonl",
        {**CHOICES, "type": "colour", "id": 7, "meta": {"any": ["thing"]}},
        "",
        {"image": "p.jpg", "question": "What?", "answer": "a cat", "video": None, "choices": []},
        {"question": "2 + 2?", "answer": "4", "type": ""},
    )
    first, second, third = read_records(file)
    assert first == Record(
        folder / "a.mp4",
        None,
        (Question("colour", "Which?", "red", ("blue", "red")),),
        f"{file}:line 1",
    )
    assert second.image == second.visual == folder / "p.jpg"
    assert second.name == f"{file}:line 3"
    assert third == Record(None, None, (Question("", "2 + 2?", "4"),), f"{file}:line 4")
    assert third.visual is None


def test_a_list_of_the_same_objects(folder: Path):
    entries = [GOOD, {**GOOD, "video": "b.mp4"}]
    file = write_json(folder / "data.json", entries)
    records = read_records(file)
    assert [record.video for record in records] == [folder / "a.mp4", folder / "b.mp4"]
    assert [record.name for record in records] == [
        f"{file}:line 2, entry 1",
        f"{file}:line 7, entry 2",
    ]


def test_paths_are_relative_to_the_media_folder(folder: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    absolute = {**GOOD, "video": str(folder / "b.mp4")}
    file = write_lines(elsewhere / "data.jsonl", GOOD, absolute)
    refused(file, "1 of 2 files is missing, it is " + str(elsewhere / "a.mp4"))
    records = read_records(file, media=folder)
    assert [record.video for record in records] == [folder / "a.mp4", folder / "b.mp4"]
    refused(file, "there is no such folder of media", media=folder / "nowhere")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(*[st.text(min_size=1).filter(str.strip)] * 3), min_size=1, max_size=5))
def test_any_text_comes_back(tmp_path: Path, texts: list[tuple[str, str, str]]):
    encodable = [
        tuple(text.encode("utf-8", "replace").decode() for text in entry) for entry in texts
    ]
    entries = [
        {"question": question, "answer": answer, "type": kind}
        for question, answer, kind in encodable
    ]
    expected = [Question(kind, question, answer) for question, answer, kind in encodable]
    lines = write_lines(
        tmp_path / "data.jsonl", *(json.dumps(e, ensure_ascii=False) for e in entries)
    )
    assert [record.questions for record in read_records(lines)] == [(q,) for q in expected]
    listed = write_json(tmp_path / "data.json", entries)
    assert [record.questions for record in read_records(listed)] == [(q,) for q in expected]


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"video": "a.mp4", "question": "Which?"}, ["there is no answer"]),
        ({**GOOD, "answer": None}, ["there is no answer"]),
        ({**GOOD, "answer": " \n"}, ["the answer is empty"]),
        ({**GOOD, "answer": 3}, ["answer is 3", "allowed: a string"]),
        ({**GOOD, "question": ""}, ["the question is empty"]),
        ({"answer": "red"}, ["there is no question"]),
        ({**GOOD, "question": ["a"]}, ["question is ['a']", "a string"]),
        ({**GOOD, "question": "\ud800"}, ["question is '\\ud800'", "valid Unicode"]),
        ({**GOOD, "video": ""}, ["the video is empty"]),
        ({**GOOD, "video": ["a.mp4"]}, ["video is ['a.mp4']", "a string"]),
        ({**GOOD, "image": "p.jpg"}, ["has both a video and an image"]),
        ({**GOOD, "type": 0}, ["type is 0", "a string"]),
        ({**GOOD, "awnser": "x"}, ["unknown key 'awnser' (did you mean 'answer'?)", "choices"]),
        ({**GOOD, "choices": "red"}, ["choices is 'red'", "a list of strings"]),
        ({**GOOD, "choices": ["red", 4]}, ["choice 2 is 4", "a string"]),
        ({**GOOD, "choices": ["red", ""]}, ["the choice 2 is empty"]),
        ({**GOOD, "choices": ["red"]}, ["the number of choices is 1", "2 to 26"]),
        ({**GOOD, "choices": ["red", *map(str, range(26))]}, ["the number of choices is 27"]),
        ({**GOOD, "choices": ["red", "a", "a"]}, ["'a' stands twice among the choices"]),
        (
            {**GOOD, "choices": ["reds", "blue"]},
            ["the answer 'red' is not among the choices (did you mean 'reds'?)", "'blue'"],
        ),
        ({**GOOD, "answer": "B", "choices": ["red", "blue"]}, ["not its letter or number"]),
        ([GOOD], ["is [{", "a JSON object"]),
        ('{"question": "a", "question": "b", "answer": "c"}', ["a key stands twice"]),
        ('{"question": "a", "answer": ', ["is not valid JSON: Expecting value"]),
        ("[" * 100_000, ["is not valid JSON"]),
    ],
)  # fmt: skip
def test_an_entry_at_fault_is_named(folder: Path, entry: Any, parts: list[str]):
    file = write_lines(folder / "data.jsonl", GOOD, entry)
    assert refused(file, *parts).startswith(f"{file}:line 2: ")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["holds no questions"]),
        ("[]", ["holds no questions"]),
        ('[{"question": "a", "answer": "b"} {}]', ["neither ',' nor ']' after entry 1"]),
        ('[{"question": "a", "answer": "b"}', ["neither ',' nor ']' after entry 1"]),
        ('[{"question": "a", "answer": "b"}] 1', ["something stands after the list"]),
        ('[\n{"question": "a", "answer": "b"},\n\n\n {"question" 1}]', ["line 5, entry 2: is not"]),
        ("[1]", ["line 1, entry 1: is 1"]),
    ],
)
def test_a_list_at_fault(tmp_path: Path, text: str, parts: list[str]):
    file = tmp_path / "data.json"
    file.write_text(text, encoding="utf-8")
    refused(file, *parts)


def test_a_byte_order_mark_is_no_matter_and_other_encodings_are(tmp_path: Path):
    entry = json.dumps({"question": "café?", "answer": "yes"}, ensure_ascii=False)
    file = tmp_path / "data.jsonl"
    file.write_text(entry, encoding="utf-8-sig")
    assert read_records(file)[0].questions[0].text == "café?"
    file.write_text(f"[{entry}]", encoding="utf-8-sig")
    assert read_records(file)[0].questions[0].text == "café?"
    file.write_text(f"\n{entry}", encoding="latin-1")
    refused(file, f"{file}:line 2: is not UTF-8")


def test_missing_files_are_all_counted_at_once(folder: Path, caplog: pytest.LogCaptureFixture):
    names = ["a.mp4", "gone.mp4", "gone.mp4", "lost.mp4", "b.mp4"]
    file = write_lines(folder / "data.jsonl", *({**GOOD, "video": name} for name in names))
    message = f"2 of 4 files are missing, the first is {folder / 'gone.mp4'}"
    refused(file, f"{file}: {message}", "allowed: no missing files")
    refused(file, message, "allowed: 1 missing files", allow_missing=1)
    with caplog.at_level(logging.WARNING):
        records = read_records(file, allow_missing=2)
    assert [record.name for record in records] == [f"{file}:line 1", f"{file}:line 5"]
    assert message in caplog.text
    assert "3 records left out" in caplog.text


def test_a_folder_is_no_video_and_nothing_may_be_left(folder: Path):
    (folder / "c.mp4").mkdir()
    file = write_lines(folder / "data.jsonl", {**GOOD, "video": "c.mp4"})
    refused(file, "1 of 1 files is missing")
    refused(file, "nothing is left", allow_missing=9)


def test_llava(folder: Path):
    turns = [
        {"from": "human", "value": "<image>\nWhat is this?"},
        {"from": "gpt", "value": "A <image> tag."},
        {"from": "human", "value": "And then,<video> what?"},
        {"from": "gpt", "value": "Nothing."},
    ]
    file = write_json(
        folder / "data.json",
        [
            {"id": "x", "video": "a.mp4", "conversations": turns, "data_source": "y"},
            {"id": "z", "conversations": [{"from": "human", "value": "Hi"}, turns[1]]},
        ],
    )
    first, second = read_records(file)
    assert first.video == folder / "a.mp4"
    assert first.questions == (
        Question("", "What is this?", "A <image> tag."),
        Question("", "And then, what?", "Nothing."),
    )
    assert second.visual is None
    assert second.name.endswith("entry 2")
    lines = write_lines(folder / "data.jsonl", *json.loads(file.read_text(encoding="utf-8")))
    assert [record.questions for record in read_records(lines)] == [
        first.questions,
        second.questions,
    ]


HUMAN, GPT = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({}, ["conversations is None"]),
        ({"conversations": []}, ["conversations is []"]),
        ({"conversations": [HUMAN]}, ["the last turn has no answer"]),
        ({"conversations": [GPT, HUMAN]}, ["turn 1 is {'from': 'gpt'", '"human"']),
        ({"conversations": [HUMAN, HUMAN]}, ["turn 2 is {'from': 'human'"]),
        ({"conversations": [HUMAN, "That."]}, ["turn 2 is 'That.'"]),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, ["turn 2: there is no value"]),
        ({"conversations": [HUMAN, {**GPT, "value": " "}]}, ["turn 2: the value is empty"]),
        ({"conversations": [{**HUMAN, "value": "<video>\n"}, GPT], "video": "a.mp4"},
         ["a question is empty"]),
        ({"conversations": [{**HUMAN, "value": "<video> What?"}, GPT]},
         ["is about a video or an image, the entry names none"]),
        ({"conversations": [HUMAN, GPT], "video": ["a.mp4"]}, ["video is ['a.mp4']"]),
        ({"conversations": [HUMAN, GPT], "video": "a.mp4", "image": "p.jpg"}, ["both"]),
    ],
)  # fmt: skip
def test_a_llava_entry_at_fault_is_named(folder: Path, entry: Any, parts: list[str]):
    file = write_lines(folder / "data.jsonl", {"conversations": [HUMAN, GPT]}, entry)
    assert refused(file, *parts).startswith(f"{file}:line 2")


def nextqa(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_nextqa(folder: Path):
    (folder / "12.webm").touch()
    file = nextqa(
        folder / "val.csv",
        'a,369,640,480,"how, exactly",3,6,CH,one,two,three,four,five',
        "12,1,1,1,why,0,1,CW,x,y,z,y,w",
    )
    first, second = read_records(file)
    choices = ("one", "two", "three", "four", "five")
    assert first == Record(
        folder / "a.mp4",
        None,
        (Question("CH", "how, exactly", "four", choices),),
        f"{file}:line 2",
    )
    assert second.video == folder / "12.webm"
    # As in the published files, wrong choices may repeat themselves.
    assert second.questions[0].choices == ("x", "y", "z", "y", "w")


@pytest.mark.parametrize("map_is_with_media", [False, True])
def test_nextqa_names_videos_through_its_map(tmp_path: Path, map_is_with_media: bool):
    media = tmp_path / "media"
    (media / "1164").mkdir(parents=True)
    (media / "1164" / "7.mkv").touch()
    (media / "8.mp4").touch()
    place = media if map_is_with_media else tmp_path
    write_json(place / "map_vid_vidorID.json", {"7": "1164/7", "8": "0000/8"})
    file = nextqa(
        tmp_path / "val.csv", "7,1,1,1,why,0,1,CW,a,b,c,d,e", "8,1,1,1,q,0,1,CW,a,b,c,d,e"
    )
    records = read_records(file, media=media)
    assert [record.video for record in records] == [media / "1164" / "7.mkv", media / "8.mp4"]


def test_nextqa_questions_with_two_right_letters_are_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    row = "a,1,1,1,why,0,1,CW,x,y,x,z,w"
    file = nextqa(folder / "val.csv", "a,1,1,1,why,1,1,CW,x,y,x,z,w", row)
    assert [record.name for record in read_records(file)] == [f"{file}:line 2"]
    assert (
        f"1 questions left out, as the right answer stands twice among their choices: {file}:line 3"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ("a,1,1,1,why,5,1,CW,x,y,z,v,w", ["answer is '5'", "0 to 4"]),
        ("a,1,1,1,why,x,1,CW,x,y,z,v,w", ["answer is 'x'"]),
        ("a,1,1,1,why,,1,CW,x,y,z,v,w", ["the answer is empty"]),
        ("a,1,1,1,,0,1,CW,x,y,z,v,w", ["the question is empty"]),
        ("a,1,1,1,why,0,1,CW,x,y,z,,w", ["the a3 is empty"]),
        ("a,1,1,1,why,0,1,CW,x,y,z,v", ["has 12 fields", "allowed: 13"]),
        ('a,1,1,1,"why" not,0,1,CW,x,y,z,v,w', ["cannot be read as CSV"]),
    ],
)
def test_a_nextqa_row_at_fault_is_named(folder: Path, row: str, parts: list[str]):
    file = nextqa(folder / "val.csv", "a,1,1,1,why,0,1,CW,x,y,z,v,w", row)
    assert refused(file, *parts).startswith(f"{file}:line 3: ")


def test_a_csv_file_of_another_kind(folder: Path):
    file = nextqa(folder / "val.csv", header="video,question,answer,type,a0,a1")
    refused(file, f"{file}: the header has no a2, a3, a4", "a header with video, question")
    file.write_bytes(HEADER.encode() + b"\na,1,1,1,caf\xe9,0,1,CW,x,y,z,v,w\n")
    refused(file, f"{file}: is not UTF-8")
    file.write_text("", encoding="utf-8")
    refused(file, "the header has no video")


def test_layouts_are_told_apart_or_refused(folder: Path):
    text = folder / "data.txt"
    text.write_text("{}", encoding="utf-8")
    refused(text, "cannot be told from the suffix '.txt'", ".jsonl, .json or .csv")
    refused(folder / "nothing.jsonl", "there is no such file", "layout hf")
    refused(folder, "is a folder")
    refused(text, "layout is 'lava' (did you mean 'llava'?)", ", ".join(LAYOUTS), layout="lava")
    good = write_lines(folder / "data.jsonl", GOOD)
    refused(good, "split is 'train'", split="train")
    refused(good, "conversations is None", layout="llava")
    text.write_text(json.dumps(GOOD), encoding="utf-8")
    assert read_records(text, layout="jsonl") == read_records(str(text), "jsonl", media=folder)


def test_questions_about_the_same_file_share_it():
    def record(number: int, video: str | None = None, image: str | None = None) -> Record:
        return Record(
            Path(video) if video else None,
            Path(image) if image else None,
            (Question("", f"q{number}", "a"),),
            f"n{number}",
        )

    records = [
        record(0, "a"), record(1), record(2, image="a"), record(3, "b"), record(4, "a"), record(5)
    ]  # fmt: skip
    shared = share_visuals(records)
    assert [record.name for record in shared] == ["n0", "n1", "n2", "n3", "n5"]
    assert [question.text for question in shared[0].questions] == ["q0", "q4"]
    assert shared[1:] == [records[1], records[2], records[3], records[5]]
