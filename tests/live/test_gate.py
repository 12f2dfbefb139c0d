"""Frames in which nothing changes are left out, small changes are not."""

from __future__ import annotations

import numpy as np

from stts_export.live.gate import Gate


def _scene(noise: int = 0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    base = np.full((96, 120, 3), 100)
    return (base + rng.integers(-noise, noise + 1, base.shape)).astype(np.uint8)


def test_noise_stays_out_and_a_small_object_comes_through():
    gate = Gate(8, longest=100)
    assert gate.passes(_scene(noise=12))
    assert not any(gate.passes(_scene(noise=12, seed=seed)) for seed in range(1, 40))
    small = _scene(noise=12, seed=50)
    small[40:50, 60:70] = 220
    assert gate.passes(small)
    assert not gate.passes(small)
    assert gate.passes(_scene())  # it went away again


def test_slow_changes_add_up():
    gate = Gate(10, longest=1000)
    passed = [gate.passes(np.full((64, 64, 3), level, np.uint8)) for level in range(50, 100)]
    assert passed == [level % 10 == 0 for level in range(50, 100)]


def test_one_of_every_window_passes_anyway():
    gate = Gate(8, longest=5)
    passed = [gate.passes(_scene()) for _ in range(21)]
    assert passed == [number % 5 == 0 for number in range(21)]
    assert all(Gate(8, longest=1).passes(_scene()) for _ in range(3))


def test_frames_of_another_size_are_new():
    gate = Gate(8, longest=100)
    assert gate.passes(np.zeros((64, 64, 3), np.uint8))
    assert gate.passes(np.zeros((32, 64, 3), np.uint8))
    assert gate.passes(np.zeros((5, 5, 3), np.uint8))  # smaller than a cell
