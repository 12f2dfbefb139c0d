"""Frames to compare implementations on: deterministic, and nearer to video than noise is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHECKED_FRAMES = 5
"""Frames of the clip that an exported graph is compared on."""


def moving_clip(frames: int, size: tuple[int, int], seed: int = 0) -> NDArray[np.uint8]:
    """Smooth texture with a moving patch of another one: (frames, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = rng.uniform(0.01, 0.15, (2, 3, 2)).astype(np.float32)

    def texture(which: int) -> NDArray[np.float32]:
        channels = [np.sin(a * x + b * y) for a, b in waves[which]]
        return np.stack(channels, axis=-1) * 90 + 128

    still, moving = texture(0), texture(1)
    side = max(1, min(size) // 3)
    clip = np.repeat(still[None], frames, axis=0)
    for index in range(frames):
        top = (index * height) // (frames + 3)
        left = (index * width) // (frames + 3)
        patch = (slice(top, top + side), slice(left, left + side))
        clip[index][patch] = moving[patch]
    noisy = clip + rng.normal(0, 4, clip.shape).astype(np.float32)
    return np.clip(noisy, 0, 255).astype(np.uint8)
