from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from stts_export.errors import InputError, MissingDependencyError
from stts_export.runtime import drawing, overlay, writing
from stts_export.runtime.drawing import ACCENT, FrameLabel, draw_windows, label_strip, text_block
from stts_export.runtime.font import draw_text, text_width
from stts_export.runtime.overlay import write_contact_sheet, write_overlay
from stts_export.runtime.video import read_video

GRID = (2, 3)
COLOUR = (200, 40, 90)


def _frames(count: int, height: int = 120, width: int = 180) -> np.ndarray:
    return np.full((count, height, width, 3), COLOUR, np.uint8)


def _video(path: Path, count: int = 30, size: tuple[int, int] = (120, 180)) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p"
        for number, pixels in enumerate(_frames(count, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _decoded(path: Path) -> tuple[list[float], np.ndarray]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [float(frame.time or 0) for frame in frames]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def _is_kept(page: np.ndarray, top: int, grid: tuple[int, int] = GRID) -> np.ndarray:
    """Which windows of a drawn frame still have the frame's colour, read at their centres."""
    rows, columns = grid
    height, width = 120 * page.shape[1] // 180, page.shape[1]
    at = top + (np.arange(rows) * 2 + 1) * height // (2 * rows)
    centres = page[at][:, (np.arange(columns) * 2 + 1) * width // (2 * columns)].astype(int)
    kept = np.abs(centres - COLOUR).max(axis=-1) < 16
    grey = np.ptp(centres, axis=-1) < 16
    assert (kept ^ grey).all()
    return kept


KEEP = np.array([[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]], dtype=bool)
TIMES = [0.0, 1.0, 2.0]


def test_overlay_of_a_file_shows_every_frame_with_the_mask_in_force(tmp_path):
    path = _video(tmp_path / "clip.mp4")
    write_overlay(tmp_path / "out.mp4", path, KEEP, GRID, TIMES)
    times, pages = _decoded(tmp_path / "out.mp4")
    np.testing.assert_allclose(times, np.arange(30) / 10, atol=1e-3)
    for number, page in enumerate(pages):
        np.testing.assert_array_equal(_is_kept(page, 0), KEEP[number // 10].reshape(GRID))


def test_overlay_of_frames_shows_each_until_the_next(tmp_path):
    write_overlay(tmp_path / "out.mp4", _frames(3), KEEP, GRID, [5.0, 5.5, 8.0])
    times, pages = _decoded(tmp_path / "out.mp4")
    np.testing.assert_allclose(times, [0.0, 0.5, 3.0, 4.5], atol=1e-3)
    for page, keep in zip(pages, KEEP[[0, 1, 2, 2]], strict=True):
        np.testing.assert_array_equal(_is_kept(page, 0), keep.reshape(GRID))


def test_overlay_of_repeated_times_and_of_one_image(tmp_path):
    write_overlay(tmp_path / "out.mp4", _frames(2), KEEP[:2], GRID, [0.0, 0.0])
    assert len(_decoded(tmp_path / "out.mp4")[0]) == 3
    write_overlay(tmp_path / "one.mp4", _frames(1), KEEP[:1], GRID, [0.0])
    assert _decoded(tmp_path / "one.mp4")[0] == [0.0, 1.0]


def test_overlay_of_an_odd_size_with_a_title(tmp_path):
    path = _video(tmp_path / "clip.mp4", 5, (121, 501))
    write_overlay(tmp_path / "out.mp4", path, KEEP, GRID, TIMES, title="What colour? Red.")
    _, pages = _decoded(tmp_path / "out.mp4")
    assert pages.shape[1] % 2 == 0
    assert pages.shape[2] == 502
    assert (pages[0][:20] > 180).any(), "no title"


def test_overlay_thins_long_videos_out(tmp_path, monkeypatch):
    monkeypatch.setattr(overlay, "_MAX_VIDEO_FRAMES", 10)
    path = _video(tmp_path / "clip.mp4")
    write_overlay(tmp_path / "out.mp4", path, KEEP, GRID, TIMES)
    times, _ = _decoded(tmp_path / "out.mp4")
    np.testing.assert_allclose(times, np.arange(0, 30, 3) / 10, atol=1e-3)


def test_overlay_reports_progress(tmp_path):
    calls: list[tuple[int, int]] = []
    write_overlay(
        tmp_path / "out.mp4",
        _video(tmp_path / "clip.mp4", 4),
        KEEP,
        GRID,
        TIMES,
        on_progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_failure_leaves_nothing_behind_and_keeps_what_was_there(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"earlier result")
    source = _video(tmp_path / "clip.mp4")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_overlay(target, source, KEEP, GRID, TIMES, on_progress=stop)
    assert target.read_bytes() == b"earlier result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "out.mp4"]


def test_bad_source_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match=r"gone\.mp4: there is no such file"):
        write_overlay(tmp_path / "out.mp4", tmp_path / "gone.mp4", KEEP, GRID, TIMES)
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_never_written_over(tmp_path):
    path = _video(tmp_path / "clip.mp4", 4)
    (tmp_path / "other.mp4").symlink_to(path)
    before = path.read_bytes()
    for name in ("clip.mp4", "other.mp4"):
        with pytest.raises(InputError, match=r"is the input .*clip\.mp4 and would be overwritten"):
            write_overlay(tmp_path / name, path, KEEP, GRID, TIMES)
    assert path.read_bytes() == before


def test_full_disk(tmp_path, monkeypatch):
    def full(image: np.ndarray) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(overlay, "png_bytes", full)
    with pytest.raises(InputError, match=r"out\.png: cannot be written: No space left on device"):
        write_contact_sheet(tmp_path / "out.png", _frames(3), KEEP, GRID, TIMES)
    assert list(tmp_path.iterdir()) == []


def test_ffmpeg_without_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_ENCODER", "libnothing")
    with pytest.raises(MissingDependencyError, match=r"lacks the H\.264 encoder libnothing"):
        write_overlay(tmp_path / "out.mp4", _frames(3), KEEP, GRID, TIMES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["nowhere/out", "file/out", "folder"])
def test_place_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    for suffix in (".mp4", ".png"):
        (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_overlay(tmp_path / f"{place}.mp4", _frames(3), KEEP, GRID, TIMES)
    with pytest.raises(InputError, match="cannot be written"):
        write_contact_sheet(tmp_path / f"{place}.png", _frames(3), KEEP, GRID, TIMES)
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize("name", ["out", "out.avi", "out.png"])
def test_wrong_suffix_of_a_video(tmp_path, name):
    with pytest.raises(InputError, match=r"allowed: a name in \.mp4"):
        write_overlay(tmp_path / name, _frames(3), KEEP, GRID, TIMES)


def test_wrong_suffix_of_a_sheet(tmp_path):
    with pytest.raises(InputError, match=r"the name ends in '\.jpg'"):
        write_contact_sheet(tmp_path / "out.jpg", _frames(3), KEEP, GRID, TIMES)


@pytest.mark.parametrize(
    ("keep", "times", "message"),
    [
        (KEEP, [0.0, 1.0], r"keep has the shape \(3, 6\)"),
        (KEEP[:, :5], TIMES, r"keep has the shape \(3, 5\)"),
        (KEEP[:2], TIMES[:2], "there are 3 frames and 2 timestamps"),
    ],
)
def test_shapes_must_fit(tmp_path, keep, times, message):
    with pytest.raises(InputError, match=message):
        write_overlay(tmp_path / "out.mp4", _frames(3), keep, GRID, times)
    with pytest.raises(InputError, match=message):
        write_contact_sheet(tmp_path / "out.png", _frames(3), keep, GRID, times)


def test_scores_must_fit(tmp_path):
    scores = np.zeros((3, 5), np.float32)
    with pytest.raises(InputError, match=r"scores has the shape \(3, 5\)"):
        write_overlay(tmp_path / "out.mp4", _frames(3), KEEP, GRID, TIMES, scores=scores)


def _sheet(path: Path) -> np.ndarray:
    clip = read_video(path, max_frames=1)
    assert clip.is_image
    return clip.frames[0]


def test_contact_sheet(tmp_path):
    path = tmp_path / "out.png"
    write_contact_sheet(path, _frames(3), KEEP, GRID, TIMES, title="What colour? Red.")
    sheet = _sheet(path)
    gap, width = overlay._GAP, overlay._TILE_WIDTH
    columns = (sheet.shape[1] - gap) // (width + gap)
    tile_height = 168 + drawing.strip_height(1)
    header = 2 * drawing.strip_height(2)
    for place, keep in enumerate(KEEP):
        top = header + gap + place // columns * (tile_height + gap)
        left = gap + place % columns * (width + gap)
        tile = sheet[top : top + tile_height, left : left + width]
        np.testing.assert_array_equal(_is_kept(tile, 0), keep.reshape(GRID))


def test_contact_sheet_shows_squeezed_frames_in_their_own_shape(tmp_path):
    frames = _frames(1, 126, 126)
    write_contact_sheet(tmp_path / "a.png", frames, KEEP[:1], GRID, [0.0])
    write_contact_sheet(tmp_path / "b.png", frames, KEEP[:1], GRID, [0.0], frame_size=(360, 720))
    square, wide = _sheet(tmp_path / "a.png"), _sheet(tmp_path / "b.png")
    assert square.shape[0] - wide.shape[0] == overlay._TILE_WIDTH // 2


def test_contact_sheet_shows_at_most_64_frames(tmp_path):
    count = 200
    keep = np.ones((count, 6), bool)
    for name, number in (("some.png", 64), ("all.png", count)):
        path = tmp_path / name
        write_contact_sheet(path, _frames(number, 12, 18), keep[:number], GRID, range(number))
    assert _sheet(tmp_path / "some.png").shape == _sheet(tmp_path / "all.png").shape


def test_nothing_removed_leaves_the_frame_untouched():
    frame = _frames(1)[0]
    np.testing.assert_array_equal(draw_windows(frame, np.ones(GRID, bool)), frame)


def test_border_between_kept_and_removed_is_marked():
    keep = np.array([[True, False, False]])
    drawn = draw_windows(_frames(1, 60, 90)[0], keep)
    assert (drawn[:, 30] == ACCENT).all()
    assert (drawn[:, :30] == COLOUR).all()
    assert (drawn[:, 60] != drawn[:, 61]).all(), "no grid between removed windows"


def test_windows_of_a_grid_that_does_not_divide_the_frame():
    keep = np.array([[True, False, True, False, True, False, True]])
    drawn = draw_windows(_frames(1, 20, 100)[0], keep)
    kept = (drawn[10] == COLOUR).all(axis=-1)
    expected = keep[0, np.arange(100) * 7 // 100]
    edges = np.flatnonzero(np.diff(expected)) + 1
    np.testing.assert_array_equal(np.delete(kept, edges), np.delete(expected, edges))


def test_scores_are_drawn_from_dark_to_yellow():
    scores = np.array([[0.0, 0.5, 1.0]], np.float32)
    drawn = draw_windows(_frames(1, 60, 180)[0], np.ones((1, 3), bool), scores)
    chips = drawn[20, [20, 80, 140]].tolist()
    assert chips == [[68, 1, 84], [33, 145, 140], [253, 231, 37]]


def test_scores_are_relative_to_the_clip_and_leave_the_first_frame_out(tmp_path):
    scores = np.linspace(0.4, 0.6, 18, dtype=np.float32).reshape(3, 6)
    scores[0] = 100
    masks = overlay._Masks.checked(KEEP, GRID, TIMES, scores)
    assert masks.scores is not None
    assert (masks.scores[1:].min(), masks.scores[1:].max()) == (0, 1)
    page = overlay._page(_frames(3)[0], masks, 0)
    np.testing.assert_array_equal(page[:120], _frames(1)[0])


def test_equal_scores_can_be_drawn(tmp_path):
    scores = np.full((3, 6), 0.5, np.float32)
    write_contact_sheet(tmp_path / "out.png", _frames(3), KEEP, GRID, TIMES, scores=scores)
    assert _sheet(tmp_path / "out.png").size


@pytest.mark.parametrize(("kept", "share"), [(0, 0.0), (3, 0.5), (6, 1.0)])
def test_bar_shows_the_kept_share(kept, share):
    strip = label_strip(FrameLabel(1.5, kept, 6), 480, 2)
    row = strip[8 + 4 + 1]
    bar = (row == ACCENT).all(axis=-1).sum()
    full = (label_strip(FrameLabel(1.5, 6, 6), 480, 2)[13] == ACCENT).all(axis=-1).sum()
    assert bar == round(full * share)


def test_long_text_takes_at_most_three_lines():
    one, many = text_block("short", 300, 2), text_block("many words " * 50, 300, 2)
    assert one.shape[0] == drawing.strip_height(2)
    assert many.shape == (drawing.strip_height(2) + 2 * 20, 300, 3)
    assert text_block("", 300, 2).shape == one.shape


def test_letters():
    image = np.zeros((7, text_width("H1", 1), 3), np.uint8)
    draw_text(image, "H1", 0, 0, scale=1, colour=(255, 255, 255))
    rows = ["".join("#" if pixel else "." for pixel in row) for row in image[..., 0]]
    assert rows == [
        "#...#...#...",
        "#...#..##...",
        "#...#...#...",
        "#####...#...",
        "#...#...#...",
        "#...#...#...",
        "#...#..###..",
    ]


def test_text_is_cut_at_the_edge_and_unknown_letters_are_marked():
    image = np.zeros((10, 8, 3), np.uint8)
    draw_text(image, "東東東", 5, 0, scale=1, colour=(9, 9, 9))
    expected = np.zeros((10, 8, 3), np.uint8)
    draw_text(expected, "???", 5, 0, scale=1, colour=(9, 9, 9))
    assert image.any()
    np.testing.assert_array_equal(image, expected)
