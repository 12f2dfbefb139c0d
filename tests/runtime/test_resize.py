from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stts_export.errors import InputError
from stts_export.runtime.resize import check_frames, resize_frames

SIDES = st.one_of(st.integers(1, 12), st.integers(13, 200))


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread():
    """Torch takes another code path, with other rounding, on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _torch_resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float().contiguous()
    resized = torch.nn.functional.interpolate(
        pixels, size, mode="bilinear", align_corners=False, antialias=False
    )
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@settings(max_examples=150, deadline=None)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(1, 3), st.integers(0, 2**32 - 1))
@example(1, 1, 7, 9, 1, 0)
@example(9, 1, 1, 9, 1, 0)
@example(100, 100, 50, 200, 1, 0)
def test_equals_torch_bit_for_bit(height, width, new_height, new_width, count, seed):
    frames = _noise(count, height, width, 3, seed=seed)
    size = (new_height, new_width)
    np.testing.assert_array_equal(resize_frames(frames, size), _torch_resize(frames, size))


@pytest.mark.parametrize(
    "source",
    [
        (1080, 1920),
        (1920, 1080),
        (756, 756),
        (189, 189),
        (377, 379),
        (240, 426),
        (1, 1),
        (1, 997),
        (997, 1),
        (2, 3),
        (1499, 2003),
    ],
)
def test_model_size_equals_torch(source):
    frames = _noise(2, *source, 3)
    size = (378, 378)
    np.testing.assert_array_equal(resize_frames(frames, size), _torch_resize(frames, size))


@pytest.mark.parametrize("height", [1, 15, 16, 17, 500])
def test_bands_of_rows_equal_the_whole(height):
    frames = _noise(2, 333, 127, 3)
    size = (height, 41)
    banded = resize_frames(frames, size, reuse=False)
    np.testing.assert_array_equal(banded, resize_frames(frames, size))
    np.testing.assert_array_equal(banded, _torch_resize(frames, size))


def test_a_picture_that_is_resized_once_needs_no_weights_of_its_size():
    picture, size = _noise(60, 80, 3), (1400, 1500)
    tracemalloc.start()
    try:
        resize_frames(picture, size, reuse=False)
        assert tracemalloc.get_traced_memory()[1] < 3 * size[0] * size[1] * 3
    finally:
        tracemalloc.stop()


def test_layout_of_torchs_input_does_not_matter():
    """torchvision hands over frames as they come from a decoder, channels last."""
    frames = _noise(2, 240, 426, 3)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(pixels, (378, 378), mode="bilinear")
    expected = resized.round().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(resize_frames(frames, (378, 378)), expected)


def test_ties_round_to_even():
    frame = np.zeros((1, 8, 3), np.uint8)
    frame[0, ::2] = np.array([1, 3, 4, 7])[:, None]
    assert resize_frames(frame, (1, 4))[0, :, 0].tolist() == [0, 2, 2, 4]  # 0.5, 1.5, 2, 3.5


def test_one_frame_keeps_its_layout():
    frame = _noise(20, 30, 3)
    resized = resize_frames(frame, (7, 5))
    assert resized.shape == (7, 5, 3)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, _torch_resize(frame[None], (7, 5))[0])


def test_frames_that_are_not_contiguous():
    frames = _noise(4, 40, 50, 6)[::2, 5:, ::-1, 3:]
    expected = _torch_resize(np.ascontiguousarray(frames), (21, 33))
    np.testing.assert_array_equal(resize_frames(frames, (21, 33)), expected)


def test_same_size_is_returned_as_it_is():
    frames = _noise(2, 6, 9, 3)
    assert resize_frames(frames, (6, 9)) is frames


@pytest.mark.parametrize(
    ("frames", "got"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), r"float32 of shape \(2, 4, 4, 3\)"),
        (np.zeros((2, 3, 4, 4), np.uint8), r"uint8 of shape \(2, 3, 4, 4\)"),
        (np.zeros((4, 4), np.uint8), r"uint8 of shape \(4, 4\)"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"uint8 of shape \(0, 4, 4, 3\)"),
    ],
)
def test_refuses_what_is_not_frames(frames, got):
    with pytest.raises(InputError, match=got):
        resize_frames(frames, (2, 2))


@pytest.mark.parametrize(
    ("dimensions", "allowed"),
    [
        ((4,), r"uint8 \(T, height, width, 3\) in RGB"),
        ((3,), r"uint8 \(height, width, 3\) in RGB"),
        ((3, 4), r"uint8 \(height, width, 3\) or \(T, height, width, 3\) in RGB"),
    ],
)
def test_the_message_allows_what_is_taken(dimensions, allowed):
    with pytest.raises(InputError, match=rf"^clip: got uint8 of shape \(5,\)[^$]*{allowed}"):
        check_frames(np.zeros(5, np.uint8), dimensions=dimensions, where="clip")


@pytest.mark.parametrize("size", [(0, 4), (4, -1)])
def test_refuses_an_empty_size(size):
    with pytest.raises(InputError, match="size is"):
        resize_frames(_noise(4, 4, 3), size)
