"""`run --subtitles`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stts_export import Session
from stts_export.cli import main
from stts_export.runtime import session as session_module
from stts_export.runtime.prompt import Subtitle
from stts_export.runtime.writing import png_bytes
from tests.helpers import picture, write_video

QUESTION = "What colour is the square?"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One second, three samples."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def test_subtitles_are_those_of_the_library(text_bundle: Path, video: Path, tmp_path, capsys):
    path = tmp_path / "lines.srt"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nred\n")
    arguments = ["run", str(text_bundle), str(video), "-p", QUESTION, "--threads", "1", "--json"]
    options = ["--max-new-tokens", "8", "--logprobs", "1", "--subtitles", str(path)]
    assert main([*arguments, *options]) == 0
    values = json.loads(capsys.readouterr().out)
    with Session.open(text_bundle, threads=1) as session:
        lines = [Subtitle(0.0, 1.0, "red")]
        answer = session.generate(video, QUESTION, 8, subtitles=lines, logprobs=1)
        without = session.generate(video, QUESTION, 8, logprobs=1)
    assert answer.logprobs is not None
    assert without.logprobs is not None
    assert values["token_ids"] == answer.token_ids
    assert values["logprobs"][0]["logprob"] == answer.logprobs[0].logprob
    assert answer.logprobs[0].logprob != without.logprobs[0].logprob


def test_bad_subtitles_are_found_before_the_bundle_is_opened(tmp_path: Path, video: Path, capsys):
    path = tmp_path / "lines.srt"
    path.write_text("hello")
    arguments = ["run", str(tmp_path / "none"), str(video), "-p", QUESTION]
    assert main([*arguments, "--subtitles", str(path)]) == 1
    assert "line 1 is 'hello'" in capsys.readouterr().err


def test_subtitles_that_go_with_no_video_are_refused_before_it_is_read(
    text_bundle: Path,
    video: Path,
    tmp_path: Path,
    capsys,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(session_module, "read_video", None)
    path, ids = tmp_path / "lines.srt", tmp_path / "ids.json"
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nred\n")
    ids.write_text("[1, 2]")
    ask = ["run", str(text_bundle), str(video)]
    assert main([*ask, str(video), "-p", QUESTION, "--subtitles", str(path)]) == 1
    assert "subtitles in a prompt about 2 images and videos" in capsys.readouterr().err
    assert main([*ask, "--prompt-ids", str(ids), "--subtitles", str(path)]) == 1
    assert "subtitles beside token ids" in capsys.readouterr().err
    assert main([*ask, "-p", "<im_patch>"]) == 1
    assert "contains the special token <im_patch>" in capsys.readouterr().err


def test_subtitles_of_an_image(text_bundle: Path, tmp_path: Path, capsys):
    photo, path = tmp_path / "photo.png", tmp_path / "lines.srt"
    photo.write_bytes(png_bytes(picture((90, 61))))
    path.write_text("1\n00:00:00,000 --> 00:00:01,000\nred\n")
    assert (
        main(["run", str(text_bundle), str(photo), "-p", QUESTION, "--subtitles", str(path)]) == 1
    )
    assert "subtitles in a prompt without a video" in capsys.readouterr().err
