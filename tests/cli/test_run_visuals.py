"""`run`: images, and several files in one prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stts_export import Session
from stts_export.cli import main
from stts_export.runtime import session as session_module
from stts_export.runtime import vision
from stts_export.runtime.images import ImageCrops, image_crops
from stts_export.runtime.writing import png_bytes
from tests.helpers import picture, write_video

QUESTION = "What colour is the square?"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A picture, and videos of 3 and 2 samples."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(png_bytes(picture((90, 61))))
    long, short = (
        write_video(tmp_path / f"{name}.mp4", frames, seed)
        for name, frames, seed in (("long", 8, 1), ("short", 4, 2))
    )
    return {"photo": str(photo), "long": str(long), "short": str(short)}


@pytest.fixture
def ask(text_bundle: Path) -> list[str]:
    return ["run", str(text_bundle), "-p", QUESTION, "--max-new-tokens", "2", "--threads", "1"]


def _json(arguments: list[str], capsys) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_every_input_is_listed(ask: list[str], files: dict[str, str], capsys):
    names = [files["photo"], files["long"], files["short"]]
    values = _json([*ask[:2], *names, *ask[2:], "--prune-ratio", "0.25"], capsys)
    assert (values["frames"], values["total_windows"]) == (5, 80)
    assert (values["kept_windows"], values["prune_ratio"]) == (36 + 24, 0.25)
    assert [entry["file"] for entry in values["inputs"]] == names
    assert [entry["kind"] for entry in values["inputs"]] == ["image", "video", "video"]
    assert [entry["kept_windows"] for entry in values["inputs"]][1:] == [36, 24]
    image = values["inputs"][0]
    assert image["kept_windows"] == image["total_windows"]
    assert "images are not pruned" in image["note"]
    assert "visuals" not in values


def test_the_answer_is_that_of_the_library(
    ask: list[str], text_bundle: Path, files: dict[str, str], capsys
):
    names = [files["photo"], files["short"]]
    values = _json([*ask[:2], *names, *ask[2:]], capsys)
    with Session.open(text_bundle, threads=1) as session:
        answer = session.generate([Path(name) for name in names], QUESTION, 2)
    assert (values["token_ids"], values["text"]) == (answer.token_ids, answer.text)


def test_an_image_is_never_pruned(ask: list[str], files: dict[str, str], capsys):
    assert main([*ask[:2], files["photo"], *ask[2:], "--prune-ratio", "0.5"]) == 0
    text = capsys.readouterr().out
    assert "crops (nothing was removed: images are not pruned)" in text
    assert "windows" not in text


def test_a_line_for_each_of_several_files(ask: list[str], files: dict[str, str], capsys):
    names = [files["photo"], files["long"], files["short"]]
    assert main([*ask[:2], *names, *ask[2:]]) == 0
    text = capsys.readouterr().out
    assert f"{files['long']}: kept 24 of 48 windows in 3 frames (prune ratio 0.5)" in text
    assert f"{files['photo']}: " in text
    assert "all videos: kept 40 of 80 windows in 5 frames (prune ratio 0.5)" in text


def test_an_overlay_for_each_video(ask: list[str], files: dict[str, str], tmp_path: Path, capsys):
    names = [files["photo"], files["long"], files["short"]]
    out = tmp_path / "out" / "seen.mp4"
    out.parent.mkdir()
    values = _json([*ask[:2], *names, *ask[2:], "--overlay", str(out)], capsys)
    written = [
        str(out.with_name(f"seen-{n}{suffix}")) for n in (2, 3) for suffix in (".mp4", ".png")
    ]
    assert values["overlay"] == written
    assert sorted(map(str, out.parent.iterdir())) == sorted(written)


def test_no_overlay_of_images_alone(
    ask: list[str], files: dict[str, str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(vision, "encode_image", None)
    arguments = [*ask[:2], files["photo"], *ask[2:], "--overlay", str(tmp_path / "out.png")]
    assert main(arguments) == 1
    assert "nothing is removed from images" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_no_overlay_over_any_input(ask: list[str], files: dict[str, str], tmp_path: Path, capsys):
    taken = Path(files["long"]).rename(tmp_path / "out-2.mp4")
    arguments = [*ask[:2], files["photo"], str(taken), *ask[2:]]
    assert main([*arguments, "--overlay", str(tmp_path / "out.mp4")]) == 1
    assert "would be overwritten" in capsys.readouterr().err


def test_an_image_is_cut_once(
    ask: list[str], files: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    cuts = [0]

    def counted(*given: Any, **settings: Any) -> ImageCrops:
        cuts[0] += 1
        return image_crops(*given, **settings)

    monkeypatch.setattr(session_module, "image_crops", counted)
    assert main([*ask[:2], files["photo"], files["photo"], *ask[2:]]) == 0
    assert cuts == [2]


def test_images_come_before_videos(ask: list[str], files: dict[str, str], capsys):
    assert main([*ask[:2], files["short"], files["photo"], *ask[2:]]) == 1
    assert "an image comes after a video" in capsys.readouterr().err


def test_a_tower_that_images_do_not_fit(small_bundle: Path, tmp_path: Path, capsys):
    photo, ids = tmp_path / "photo.png", tmp_path / "ids.json"
    photo.write_bytes(png_bytes(np.zeros((40, 60, 3), np.uint8)))
    ids.write_text("[1, 2]")
    assert main(["run", str(small_bundle), str(photo), "--prompt-ids", str(ids)]) == 1
    assert "a model input of 84 x 126 pixels" in capsys.readouterr().err
