"""Which clips a set has, and which sets are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import av
import pytest
import yaml

from stts_export.bundle import sha256
from stts_export.calibration import clips as calibration_clips
from stts_export.calibration.clips import DEFAULT_PROMPT, DEFAULT_SET, ClipSet, open_clip_set
from stts_export.errors import InputError
from stts_export.training.clips import TYPES, make_clip, split_seed
from stts_export.training.exam import prompt_of


def opened(
    clips: Path | None, cache: Path, needs: tuple[int, int] = (1, 1), **more: Any
) -> ClipSet:
    return open_clip_set(
        clips, cache, needs_calibration=needs[0], needs_held_out=needs[1], image_size=120, **more
    )


def described(path: Path, **values: Any) -> Path:
    path.write_text(yaml.safe_dump({"schema": 1, "name": "own", **values}))
    return path


def generated(path: Path, calibration: int, held_out: int, seed: int = 0) -> Path:
    settings = {"seed": seed, "calibration": calibration, "held_out": held_out, "level": 0}
    return described(path, generate=settings)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of the clips that are written; the files hold some bytes of theirs only."""
    seeds: list[int] = []

    def write(clip: Any, path: Path, *, size: int) -> None:
        seeds.append(clip.seed)
        path.write_bytes(f"{clip.seed} {size}".encode())

    monkeypatch.setattr(calibration_clips, "write_mp4", write)
    return seeds


def videos(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode())
    return folder


def test_the_default_set_is_synthetic_and_asks_about_everything(tmp_path: Path, written: list[int]):
    calls: list[tuple[int, int]] = []
    found = opened(None, tmp_path, (24, 12), on_progress=lambda *call: calls.append(call))
    assert (len(found.calibration), len(found.held_out)) == (24, 12)
    assert calls == [(number, 36) for number in range(1, 37)]
    assert written[:24] == [split_seed("train", index) for index in range(24)]
    assert written[24:] == [split_seed("dev", index) for index in range(12)]
    asked: list[str] = []
    for seed, clip in zip(written, (*found.calibration, *found.held_out), strict=True):
        asked += [
            question.type
            for question in make_clip(seed).questions
            if prompt_of(question) == clip.prompt
        ][:1]
    counts = Counter(asked)
    assert set(counts) == set(TYPES)
    assert sum(counts.values()) == 36
    assert max(counts.values()) <= 12
    shown = Path(__file__).parents[2] / "calibration" / "clips" / DEFAULT_SET.name
    assert shown.resolve() == DEFAULT_SET.resolve()


def test_synthetic_clips_are_real_videos_and_are_written_once(tmp_path: Path):
    settings = generated(tmp_path / "set.yaml", 1, 1)
    cache = tmp_path / "deep" / "cache"
    found = opened(settings, cache)
    with av.open(str(found.held_out[0].video)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert (stream.width, stream.height) == (240, 240)
        frames = sum(1 for _ in container.decode(stream))
    assert frames == make_clip(split_seed("dev", 0), level=0).frame_count
    times = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert opened(settings, cache) == found
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == times
    assert sorted(file.suffix for file in times) == [".json", ".mp4", ".mp4"]
    # A damaged file is written anew.
    damaged = found.calibration[0].video
    damaged.write_bytes(b"")
    assert opened(settings, cache) == found
    assert damaged.stat().st_size


def test_only_what_is_missing_or_damaged_is_written(tmp_path: Path, written: list[int]):
    first = opened(generated(tmp_path / "a.yaml", 2, 1), tmp_path)
    train, dev = split_seed("train", 0), split_seed("dev", 0)
    assert written == [train, train + 1, dev]
    written.clear()
    second = opened(generated(tmp_path / "b.yaml", 3, 1), tmp_path)
    assert written == [train + 2]
    assert second.calibration[:2] == first.calibration
    written.clear()
    (tmp_path / "clips.json").write_text("{")
    assert opened(generated(tmp_path / "a.yaml", 2, 1), tmp_path) == first
    assert written == [train, train + 1, dev]
    # Larger models get other files; other seeds other clips.
    large = open_clip_set(
        tmp_path / "a.yaml", tmp_path, needs_calibration=1, needs_held_out=1, image_size=377
    )
    assert large.calibration[0].video.read_bytes() == f"{train} 378".encode()
    other = opened(generated(tmp_path / "c.yaml", 2, 1, seed=1), tmp_path)
    assert not {clip.sha256 for clip in other.calibration} & {c.sha256 for c in first.calibration}


def test_a_clip_that_is_not_written_to_the_end_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(clip: object, path: Path, *, size: int) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration_clips, "write_mp4", fail)
    with pytest.raises(KeyboardInterrupt):
        opened(generated(tmp_path / "set.yaml", 1, 1), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_description_names_clips_relative_to_itself(tmp_path: Path):
    videos(tmp_path / "a", "1.mp4", "2.mp4")
    elsewhere = videos(tmp_path / "b", "3.mkv") / "3.mkv"
    clips = [{"video": "a/1.mp4", "prompt": "Who?"}, {"video": str(elsewhere), "prompt": "When?"}]
    path = described(
        tmp_path / "set.yml", calibration=clips, held_out=[{"video": "a/2.mp4", "prompt": "Why?"}]
    )
    found = opened(path, tmp_path / "unused", (2, 1))
    assert found.name == "own"
    assert [clip.video for clip in found.calibration] == [tmp_path / "a" / "1.mp4", elsewhere]
    assert [clip.prompt for clip in (*found.calibration, *found.held_out)] == [
        "Who?", "When?", "Why?"
    ]  # fmt: skip
    assert found.held_out[0].name == "a/2.mp4"
    assert not (tmp_path / "unused").exists()


def test_every_third_video_of_a_folder_is_held_out(tmp_path: Path):
    names = [f"{number}.MP4" for number in range(1, 8)]
    folder = videos(tmp_path / "yard", *names, "notes.txt", ".9.mp4")
    found = opened(folder, tmp_path, (5, 2))
    assert [clip.name for clip in found.held_out] == ["3.MP4", "6.MP4"]
    assert [clip.name for clip in found.calibration] == [n for n in names if n[0] not in "36"]
    assert {clip.prompt for clip in found.calibration} == {DEFAULT_PROMPT}
    assert found.name == "yard"


def test_the_digest_is_of_content(tmp_path: Path):
    found = opened(videos(tmp_path / "a", "1.mp4", "2.mp4", "3.mp4"), tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    moved = opened(tmp_path / "b", tmp_path)
    assert moved != found
    assert moved.digest() == found.digest()
    swapped = ClipSet("a", found.calibration[:1], (*found.calibration[1:], *found.held_out))
    (tmp_path / "b" / "1.mp4").write_bytes(b"x")
    assert len({found.digest(), swapped.digest(), opened(tmp_path / "b", tmp_path).digest()}) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"generated": {}}, r"generated: unknown key \(did you mean 'generate'\?\)"),
        ({}, "names no clips"),
        ({"schema": 2, "calibration": []}, "schema: is 2"),
        ({"name": 3, "calibration": []}, "name: is 3"),
        ({"calibration": {}}, "calibration: is {}"),
        ({"calibration": [{"video": "a.mp4", "promt": "?"}]}, r"promt.*did you mean 'prompt'"),
        ({"calibration": [{"video": "a.mp4"}]}, r"calibration\[0\].prompt: is missing"),
        ({"calibration": [{"video": "a.mp4", "prompt": " "}]}, "prompt: is empty"),
        ({"generate": {"seed": 0}}, "generate.calibration: is missing"),
        (
            {"generate": {"seed": 0, "calibration": 1, "held_out": 1, "level": 3}},
            r"generate.level: is 3\n  allowed: an integer, 0 to 2",
        ),
        (
            {"generate": {"seed": -1, "calibration": 1, "held_out": 1, "level": 0}},
            "generate.seed: is -1",
        ),
        (
            {
                "generate": {"seed": 0, "calibration": 1, "held_out": 1, "level": 0},
                "held_out": [],
            },
            "has generate and held_out",
        ),
    ],
)
def test_a_wrong_description_is_refused(tmp_path: Path, values: dict[str, Any], message: str):
    path = described(tmp_path / "set.yaml", **values)
    with pytest.raises(InputError, match=message) as caught:
        opened(path, tmp_path / "cache", (0, 0))
    assert str(caught.value).startswith(str(path))
    assert not (tmp_path / "cache").exists()


def test_too_few_clips_are_refused_before_any_is_written(tmp_path: Path, written: list[int]):
    path = generated(tmp_path / "set.yaml", 4, 2)
    for needs, what, count in (((5, 1), "to calibrate on", 4), ((4, 3), "held out", 2)):
        with pytest.raises(InputError, match=f"too few clips {what}.*: {count}") as caught:
            opened(path, tmp_path / "cache", needs)
        assert f"the recipe asks for at least {max(needs) if count == 4 else 3}" in str(
            caught.value
        )
    with pytest.raises(InputError, match="too few clips") as caught:
        opened(None, tmp_path / "cache", (1000, 1))
    assert "--clips" in str(caught.value)
    with pytest.raises(InputError, match="too few clips held out for the gates: 0"):
        opened(videos(tmp_path / "two", "1.mp4", "2.mp4"), tmp_path / "cache")
    assert written == []


def test_missing_files_are_named(tmp_path: Path):
    videos(tmp_path, "a.mp4")
    clips = [{"video": f"{name}.mp4", "prompt": "?"} for name in "abc"]
    path = described(tmp_path / "set.yaml", calibration=clips)
    with pytest.raises(InputError) as caught:
        opened(path, tmp_path, (1, 0))
    assert f"2 of 3 videos are missing; first {tmp_path / 'b.mp4'}" in str(caught.value)
    assert "calibration[1]" in str(caught.value)
    for path, message in (
        (tmp_path / "nothing", "there is no such file or folder"),
        (tmp_path / "a.mp4", "is a file of another kind"),
        (videos(tmp_path / "empty", "x.txt"), "there is no video in the folder"),
    ):
        with pytest.raises(InputError, match=message):
            opened(path, tmp_path)


@pytest.mark.parametrize("held_out", [False, True])
def test_the_same_video_twice_is_refused_whatever_its_name(tmp_path: Path, held_out: bool):
    videos(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "copy.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())
    first, second, copy = ({"video": f"{n}.mp4", "prompt": n} for n in ("a", "b", "copy"))
    groups = ([first, second], [copy]) if held_out else ([first, copy], [second])
    path = described(tmp_path / "set.yaml", calibration=groups[0], held_out=groups[1])
    role = "held-out" if held_out else "calibration"
    message = f"{role} clip copy.mp4 is the same video as calibration clip a.mp4"
    with pytest.raises(InputError, match=message):
        opened(path, tmp_path)


def test_the_listing_holds_hashes(tmp_path: Path, written: list[int]):
    found = opened(generated(tmp_path / "set.yaml", 1, 1), tmp_path)
    clips = (*found.calibration, *found.held_out)
    listing = json.loads((tmp_path / "clips.json").read_text())
    assert listing == {clip.video.name: sha256(clip.video) for clip in clips}


def test_synthetic_clips_are_the_same_wherever_they_are_drawn(tmp_path: Path, written: list[int]):
    settings = generated(tmp_path / "set.yaml", 1, 1)
    first, second = (opened(settings, tmp_path / name) for name in ("a", "b"))
    assert first.digest() == second.digest()
