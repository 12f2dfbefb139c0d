"""Ten thousand frames through a window: memory and threads stay what they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stts_export import Session
from tests.helpers import random_frames

WARM, FRAMES = 2000, 10_000
GROWTH = 8.0
"""MB: the tokenizer's own cache of words grows by about 4 with the times that are printed. One
frame's hidden tokens, never freed, would be 150."""


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@pytest.mark.parametrize("mode", ["exact", "incremental"])
def test_memory_is_flat(text_bundle: Path, mode: str):
    pictures = random_frames(50, (48, 48))
    with (
        Session.open(text_bundle, threads=1) as session,
        session.stream(
            prompt="How many objects are there?", mode=mode, window="4s", every="30s",
            segment="1s" if mode == "incremental" else None, policy="wait", max_new_tokens=2,
        ) as live,
    ):  # fmt: skip
        before, threads = 0.0, threading.active_count()
        answers = 0
        for number in range(FRAMES):
            assert live.push(pictures[number % 50], number / 2, timeout=60)
            while live.get(timeout=0) is not None:
                answers += 1
            if number == WARM:
                before = _resident_mb()
        assert _resident_mb() - before < GROWTH
        assert threading.active_count() == threads
        live.finish()
        answers += sum(1 for _ in live)
        assert live.counters.encoded == FRAMES
        assert answers >= FRAMES // 60
