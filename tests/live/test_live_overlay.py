"""Pictures of a running stream."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stts_export.errors import InputError
from stts_export.live import live_overlay
from stts_export.live.live_overlay import LiveOverlay
from stts_export.runtime import overlay as runtime_overlay
from stts_export.runtime import writing
from stts_export.runtime.drawing import strip_height, text_block
from tests.live.fakes import COLOUR, GRID, answer, frames

SIZE = (120, 180)
WIDTH = 480
TITLE = len(text_block("word " * 200, WIDTH, 2))
FIRST = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]], dtype=bool)
SECOND = ~FIRST


def _decoded(path: Path) -> tuple[list[float], np.ndarray]:
    with av.open(str(path)) as container:
        shown = list(container.decode(video=0))
    times = [float(frame.time or 0) for frame in shown]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in shown])


def _is_kept(page: np.ndarray, height: int = 320, width: int = WIDTH) -> np.ndarray:
    """Which windows still have the frame's colour, read at their centres."""
    at = TITLE + (np.arange(2) * 2 + 1) * height // 4
    centres = page[at][:, (np.arange(3) * 2 + 1) * width // 6].astype(int)
    kept = np.abs(centres - COLOUR).max(axis=-1) < 16
    grey = np.ptp(centres, axis=-1) < 16
    assert (kept ^ grey).all()
    return kept.reshape(-1)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _raise(error: Exception) -> Any:
    def failing(*_: object, **__: object) -> None:
        raise error

    return failing


def test_a_frame_is_shown_once_with_the_first_mask_at_its_time(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer((0.0, 0.5, 1.0), FIRST), frames(), SIZE)
        overlay(answer((0.5, 1.0, 3.25), SECOND), frames(), SIZE)
    times, pages = _decoded(tmp_path / "out.mp4")
    # The last one is there twice: a file has no other way to say how long it stays.
    np.testing.assert_allclose(times, [0.0, 0.5, 1.0, 3.25, 5.5], atol=1e-3)
    for page, keep in zip(pages, [*FIRST, SECOND[2], SECOND[2]], strict=True):
        np.testing.assert_array_equal(_is_kept(page), keep)


def test_a_stream_that_is_seen_late_keeps_its_times(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer((40.0,), FIRST[:1]), frames(1), SIZE)
    np.testing.assert_allclose(_decoded(tmp_path / "out.mp4")[0], [40.0, 41.0], atol=1e-3)


def test_the_title_is_the_answer_that_saw_the_frame_first(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer((0.0, 0.5, 1.0), FIRST, text="I"), frames(), SIZE)
        overlay(answer((0.5, 1.0, 1.5), FIRST, text="words " * 100), frames(), SIZE)
        overlay(answer((1.0, 1.5, 2.0), FIRST, text=""), frames(), SIZE)
    _, pages = _decoded(tmp_path / "out.mp4")
    ink = [(page[:TITLE] > 128).any(axis=-1).sum() for page in pages]
    assert 0 < ink[0] < 100
    assert ink[3] > 1000
    assert ink[4] == 0
    np.testing.assert_allclose(ink[:3], ink[0], atol=8)


def test_nothing_is_named_like_the_video_before_it_is_complete(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer(), frames(), SIZE)
        assert "out.mp4" not in _names(tmp_path)
        assert overlay.written == [tmp_path / "out.png"]
    assert _names(tmp_path) == ["out.mp4", "out.png"]
    assert overlay.written == [tmp_path / "out.mp4", tmp_path / "out.png"]


def test_the_sheet_is_that_of_the_newest_answer(tmp_path: Path):
    overlay = LiveOverlay(tmp_path / "out.png", GRID)
    overlay(answer(keep=FIRST, text="one"), frames(), SIZE)
    first = (tmp_path / "out.png").read_bytes()
    overlay(answer((1.0, 1.5, 2.0), SECOND, text="two"), frames(), SIZE)
    second = (tmp_path / "out.png").read_bytes()
    assert first != second
    runtime_overlay.write_contact_sheet(
        tmp_path / "same.png", frames(), SECOND, GRID, [1.0, 1.5, 2.0], frame_size=SIZE, title="two"
    )
    assert second == (tmp_path / "same.png").read_bytes()
    overlay.close()
    assert _names(tmp_path) == ["out.png", "same.png"]
    assert overlay.written == [tmp_path / "out.png"]


def test_frames_have_the_shape_of_the_source_and_pages_one_size(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer((0.0,), FIRST[:1]), frames(1), (360, 720))
        overlay(answer((0.5,), SECOND[1:2]), frames(1), (720, 360))
    _, pages = _decoded(tmp_path / "out.mp4")
    assert pages.shape[1:3] == (TITLE + 240 + strip_height(2), WIDTH)
    np.testing.assert_array_equal(_is_kept(pages[0], 240), FIRST[0])
    np.testing.assert_array_equal(_is_kept(pages[1], 240, 120), SECOND[1])
    assert (pages[1][TITLE:, 130:] < 48).all()


def test_frames_are_not_held(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        given = frames()
        overlay(answer(keep=FIRST), given, SIZE)
        held = weakref.ref(given)
        del given
        gc.collect()
        assert held() is None


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), av.FFmpegError(5, "gone")]
)
def test_a_video_that_cannot_be_written_is_reported_once(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer((0.0, 0.5, 1.0), FIRST), frames(), SIZE)
        monkeypatch.setattr(writing.VideoWriter, "write", _raise(error))
        for start in (1, 2, 3):
            overlay(answer((start, start + 0.5, start + 1), FIRST), frames(), SIZE)
        assert _names(tmp_path) == ["out.png"]
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "out.mp4: cannot be written: " in record.message
    assert "goes on without pictures" in record.message
    assert _names(tmp_path) == ["out.png"]
    assert overlay.written == [tmp_path / "out.png"]


def test_when_the_sheet_cannot_be_written_the_video_ends_there(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    overlay = LiveOverlay(tmp_path / "out.mp4", GRID)
    overlay(answer((0.0, 0.5, 1.0), FIRST), frames(), SIZE)
    with monkeypatch.context() as broken:
        broken.setattr(runtime_overlay, "png_bytes", _raise(OSError(28, "No space left")))
        overlay(answer((1.0, 1.5, 2.0), FIRST), frames(), SIZE)
    overlay(answer((2.0, 2.5, 3.0), FIRST), frames(), SIZE)
    overlay.close()
    assert len(caplog.records) == 1
    assert "out.png: cannot be written: No space left" in caplog.text
    assert overlay.written == [tmp_path / "out.mp4", tmp_path / "out.png"]
    np.testing.assert_allclose(_decoded(tmp_path / "out.mp4")[0], np.arange(6) / 2, atol=1e-3)


def test_a_video_that_cannot_be_finished_is_reported(
    tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
):
    overlay = LiveOverlay(tmp_path / "out.mp4", GRID)
    overlay(answer(), frames(), SIZE)
    monkeypatch.setattr(writing.VideoWriter, "finish", _raise(OSError(28, "No space left")))
    overlay.close()
    overlay.close()
    assert len(caplog.records) == 1
    assert "out.mp4: cannot be written: No space left" in caplog.text
    assert _names(tmp_path) == ["out.png"]


def test_ffmpeg_without_encoder(tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(writing, "_ENCODER", "libnothing")
    with LiveOverlay(tmp_path / "out.mp4", GRID) as overlay:
        overlay(answer(), frames(), SIZE)
        overlay(answer(), frames(), SIZE)
    assert caplog.text.count("lacks the H.264 encoder libnothing") == 1
    assert _names(tmp_path) == []


@pytest.mark.parametrize("name", ["out.gif", "out", "none/out.mp4", "folder.mp4"])
def test_names_that_cannot_be_written_are_refused_at_once(tmp_path: Path, name: str):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError):
        LiveOverlay(tmp_path / name, GRID)


def test_without_an_answer_there_is_no_file(tmp_path: Path):
    with LiveOverlay(tmp_path / "out.mp4", GRID):
        pass
    assert _names(tmp_path) == []


def test_an_answer_after_the_end_is_not_drawn(tmp_path: Path):
    overlay = LiveOverlay(tmp_path / "out.mp4", GRID)
    overlay.close()
    overlay(answer(), frames(), SIZE)
    assert _names(tmp_path) == []


def test_the_end_waits_for_an_answer_that_is_being_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    drawing, go_on = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        drawing.set()
        assert go_on.wait(10)

    monkeypatch.setattr(live_overlay, "write_contact_sheet", slow)
    overlay = LiveOverlay(tmp_path / "out.mp4", GRID)
    answering = threading.Thread(target=overlay, args=(answer(keep=FIRST), frames(), SIZE))
    closing = threading.Thread(target=overlay.close)
    answering.start()
    assert drawing.wait(10)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    answering.join(10)
    closing.join(10)
    assert len(_decoded(tmp_path / "out.mp4")[0]) == 4


@pytest.mark.parametrize("name", ["out.mp4", "o[u]t*.png"])
def test_what_is_half_written_is_removed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    overlay, draws, go_on = LiveOverlay(tmp_path / name, GRID), threading.Event(), threading.Event()
    (tmp_path / ".other.partial-1.mp4").touch()

    def hangs(path: Path, *_: object, **__: object) -> None:
        with writing.finished_file(path, ".png") as partial:
            partial.touch()
            draws.set()
            go_on.wait(10)

    monkeypatch.setattr(live_overlay, "write_contact_sheet", hangs)
    thread = threading.Thread(target=overlay, args=(answer((0.0,), FIRST[:1]), frames(1), SIZE))
    thread.start()
    assert draws.wait(10)
    (tmp_path / f".{Path(name).stem}.partial-{os.getpid()}.mp4").touch()
    assert len(_names(tmp_path)) == 3
    overlay.discard()
    assert _names(tmp_path) == [".other.partial-1.mp4"]
    go_on.set()
    thread.join()
    overlay.close()
