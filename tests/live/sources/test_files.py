from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stts_export.errors import InputError
from stts_export.live.sources import SourceOptions, open_source
from stts_export.runtime.video import read_video
from tests.live.sources.helpers import Heard, encode, jpeg, number_of, numbered, picture, take

REALTIME = SourceOptions(realtime=True)


def test_all_frames_in_the_order_of_display(tmp_path):
    path = encode(tmp_path / "clip.mp4", 60, options={"bf": "2"})
    source, heard = open_source(path), Heard()
    assert (source.name, source.is_live) == (str(path), False)
    assert numbered(source, None, heard) == list(range(60))
    assert heard.notices == []


def test_times(tmp_path):
    path = encode(tmp_path / "clip.mp4", 60, options={"bf": "2"})
    arrivals = take(open_source(str(path)))
    assert [arrival.pts for arrival in arrivals] == pytest.approx(
        [place / 25 for place in range(60)]
    )
    assert {arrival.duration for arrival in arrivals} == {0.04}
    assert [arrival.is_first for arrival in arrivals] == [True] + [False] * 59


def test_realtime(tmp_path):
    source = open_source(encode(tmp_path / "clip.mp4", 10, rate=20), REALTIME)
    assert source.is_live
    began = time.monotonic()
    came = [time.monotonic() - began for _ in source.arrivals(threading.Event(), Heard())]
    assert len(came) == 10
    assert all(moment >= place / 20 - 0.01 for place, moment in enumerate(came))


def test_stopping_between_frames(tmp_path):
    source = open_source(encode(tmp_path / "clip.mp4", 10, rate=1), REALTIME)
    stop = threading.Event()
    arrivals = source.arrivals(stop, Heard())
    next(arrivals)
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    began = time.monotonic()
    assert list(arrivals) == []
    assert time.monotonic() - began < 0.5
    timer.join()


def test_damage_is_counted(tmp_path):
    path = encode(tmp_path / "clip.mp4", 50, options={"g": "1"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[start : start + 600] = bytes(600)
    path.write_bytes(data)
    heard = Heard()
    assert len(take(open_source(path), None, heard)) < 50
    assert heard.counts["damaged"] >= 1
    assert heard.kinds == ["damaged"]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_a_file_that_is_cut_off_ends_with_a_notice(tmp_path, name):
    path = encode(tmp_path / name, 250)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    heard = Heard()
    numbers = numbered(open_source(path), None, heard)
    assert numbers == list(range(len(numbers)))
    assert heard.kinds[-1] == "damaged"
    assert "the file is cut off" in heard.text
    assert "of 10.0 s can be read" in heard.text


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("clip.h264", "libx264", {"bf": "2"}), ("clip.avi", "mpeg4", {"bf": "2"})],
)
def test_a_file_with_few_times_is_not_taken_for_cut_off(tmp_path, name, codec, options):
    path = encode(tmp_path / name, 60, codec=codec, options=options)
    heard = Heard()
    assert len(take(open_source(path), None, heard)) == 60
    assert heard.notices == []


def test_a_still_image_is_refused(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(jpeg(1))
    with pytest.raises(InputError, match="is a still image") as error:
        open_source(tmp_path / "photo.jpg")
    assert error.value.allowed == "a video, or a folder of images"


@pytest.mark.parametrize("content", [b"", b"words\n" * 50])
def test_no_video(tmp_path, content):
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(InputError, match=r"is not a video or an image|the file is empty"):
        open_source(tmp_path / "clip.mp4")


def test_files_are_not_decoded_by_the_gpu(tmp_path):
    path = encode(tmp_path / "clip.mp4", 3)
    with pytest.raises(InputError, match="decoder is 'cuda', but files are decoded by the CPU"):
        open_source(path, SourceOptions(decoder="cuda"))


def _folder(path: Path, names: list[str]) -> Path:
    path.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(picture(number)).save(path / name)
    return path


def test_a_folder_is_sorted_as_one_counts(tmp_path):
    folder = _folder(tmp_path / "images", ["shot2.png", "shot10.png", "Shot1.png", ".hidden.png"])
    (folder / "notes.txt").write_text("no image")
    (folder / "deeper").mkdir()
    source = open_source(folder)
    assert not source.is_live
    assert numbered(source) == [2, 0, 1]


def test_times_of_a_folder(tmp_path):
    folder = _folder(tmp_path / "images", ["1.png", "2.png", "3.png"])
    arrivals = take(open_source(folder, SourceOptions(folder_fps=4.0)))
    assert [arrival.pts for arrival in arrivals] == [0.0, 0.25, 0.5]
    assert [arrival.duration for arrival in arrivals] == [0.25] * 3
    assert [arrival.is_first for arrival in arrivals] == [True, False, False]


def test_pixels_of_a_folder_are_those_of_the_images(tmp_path):
    folder = _folder(tmp_path / "images", ["1.jpg"])
    (arrival,) = take(open_source(folder))
    np.testing.assert_array_equal(
        arrival.rgb(), read_video(folder / "1.jpg", max_frames=1).frames[0]
    )


def test_a_folder_in_real_time(tmp_path):
    folder = _folder(tmp_path / "images", ["1.png", "2.png", "3.png"])
    source = open_source(folder, replace(REALTIME, folder_fps=10.0))
    assert source.is_live
    began = time.monotonic()
    assert len(take(source)) == 3
    assert time.monotonic() - began >= 0.19


def test_a_broken_image_leaves_a_gap(tmp_path):
    folder = _folder(tmp_path / "images", ["1.png", "2.png", "3.png"])
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:40])
    heard = Heard()
    arrivals = take(open_source(folder), None, heard)
    assert [number_of(arrival.rgb()) for arrival in arrivals] == [0, 2]
    assert [arrival.pts for arrival in arrivals] == [0.0, 1.0]
    assert heard.counts == {"damaged": 1}
    assert heard.kinds == ["damaged"]
    assert heard.text.startswith("2.png is left out: ")


def test_only_broken_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "1.png").write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 1 images in the folder can be read"):
        take(open_source(folder))


def test_a_folder_without_images(tmp_path):
    with pytest.raises(InputError, match="there is no image in the folder"):
        open_source(tmp_path)
