"""Synthetic video: a textured scene that pans, rests and cuts, with objects that cross it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SEED = 7
_OBJECTS = 6


def moving_clip(frames: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a clip; (frames, height, width, 3) RGB, the same for the same arguments."""
    rng = np.random.default_rng(_SEED)
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    clip = np.empty((frames, height, width, 3), np.uint8)
    next_cut = 0
    for t in range(frames):
        if t == next_cut:  # a new scene, with its own texture, objects and pace
            next_cut += int(rng.integers(5, 14))
            waves = rng.uniform(0.01, 0.25, (3, 2, 2))
            phase = rng.uniform(0, 2 * np.pi, (3, 2))
            base = rng.uniform(60, 190, 3)
            contrast = rng.uniform(10, 60)
            pan = rng.uniform(-12, 12, 2) * rng.integers(0, 2)
            shift = np.zeros(2)
            place = rng.uniform(0, 1, (_OBJECTS, 2)) * size
            speed = rng.normal(0, 0.06, (_OBJECTS, 2)) * size
            radius = rng.uniform(0.04, 0.16, _OBJECTS) * height
            colour = rng.uniform(0, 255, (_OBJECTS, 3))
        picture = np.empty((height, width, 3), np.float32)
        for channel in range(3):
            a, b = (
                np.sin(w[0] * (y + shift[0]) + w[1] * (x + shift[1]) + p)
                for w, p in zip(waves[channel], phase[channel], strict=True)
            )
            picture[..., channel] = base[channel] + contrast * a * b
        for centre, r, rgb in zip(place, radius, colour, strict=True):
            picture[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < r * r] = rgb
        picture += rng.normal(0, 3, picture.shape)  # sensor noise
        clip[t] = np.clip(picture, 0, 255)
        shift = shift + pan
        place = (place + speed) % np.array(size)
    return clip
