from __future__ import annotations

import av
import numpy as np
import pytest

from stts_export.errors import InputError
from stts_export.runtime.overlay import write_contact_sheet
from stts_export.training.examples import VideoInput
from stts_export.training.pictures import kept_windows_picture, picture_file
from tests.helpers import random_frames

GRID = (2, 3)
CLIP = VideoInput(random_frames(4, (60, 90)), (0.0, 0.5, 1.0, 1.5))
KEEP = np.random.default_rng(1).random((4, 6)) < 0.5
SCORES = np.random.default_rng(2).random((4, 6)).astype(np.float32)


def _pixels(path) -> np.ndarray:
    with av.open(str(path)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize("scores", [SCORES, None], ids=["scores", "no scores"])
def test_draws_what_an_overlay_draws(tmp_path, scores):
    file = picture_file(tmp_path / "run", 250)
    kept_windows_picture(CLIP, scores, KEEP, GRID, file, "What moves? A red ring")
    other = tmp_path / "sheet.png"
    write_contact_sheet(
        other, CLIP.frames, KEEP, GRID, CLIP.timestamps, scores=scores,
        title="What moves? A red ring",
    )  # fmt: skip
    np.testing.assert_array_equal(_pixels(file), _pixels(other))


def test_the_picture_depends_on_masks_scores_and_title(tmp_path):
    def drawn(scores, keep, title):
        kept_windows_picture(CLIP, scores, keep, GRID, tmp_path / "x.png", title)
        return (tmp_path / "x.png").read_bytes()

    kinds = [(SCORES, KEEP, "a"), (None, KEEP, "a"), (SCORES, ~KEEP, "a"), (SCORES, KEEP, "b")]
    assert len({drawn(*kind) for kind in kinds}) == 4


def test_names_sort_by_step(tmp_path):
    names = [picture_file(tmp_path, step).name for step in (50, 250, 10_000)]
    assert names == sorted(names)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_scores_that_are_not_finite(tmp_path, value):
    scores = SCORES.copy()
    scores[1, 2] = value
    with pytest.raises(InputError, match=r"x\.png: 1 of 24 scores are not finite"):
        kept_windows_picture(CLIP, scores, KEEP, GRID, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_refuses_shapes_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"keep has the shape \(3, 6\)"):
        kept_windows_picture(CLIP, SCORES, KEEP[1:], GRID, tmp_path / "x.png")
    with pytest.raises(InputError, match=r"scores has the shape \(4, 5\)"):
        kept_windows_picture(CLIP, SCORES[:, 1:], KEEP, GRID, tmp_path / "x.png")


def test_refuses_names_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        kept_windows_picture(CLIP, SCORES, KEEP, GRID, tmp_path / "file" / "x.png")
    with pytest.raises(InputError, match=r"ends in '\.jpg'"):
        kept_windows_picture(CLIP, SCORES, KEEP, GRID, tmp_path / "x.jpg")
