"""What is asked of a stream, in the grid's own steps, or refused with the way out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stts_export.bundle import Limits
from stts_export.errors import InputError
from stts_export.live.settings import StreamSettings, plan, seconds

LIMITS = Limits(max_frames=64, max_tokens=4096, max_fps=2.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500ms", 0.5), ("2s", 2.0), ("1.5m", 90.0), ("1min", 60.0), ("2h", 7200.0), ("3", 3.0),
        (" 4 s ", 4.0), (0.25, 0.25), (7, 7.0), (".5s", 0.5),
    ],
)  # fmt: skip
def test_durations(text: Any, expected: float):
    assert seconds(text, "every") == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["", "s", "2 weeks", "-1s", 0, "0s", "1.2.3s", ".", float("nan"), float("inf"), None,
             True, [1], "1e3s", "2S"],
)  # fmt: skip
def test_what_is_no_duration(text: Any):
    with pytest.raises(
        InputError, match=r"every is .*\n  allowed: a duration above 0: seconds, or"
    ):
        seconds(text, "every")


def _plan(**settings: Any) -> Any:
    return plan(StreamSettings(prompt="?", **settings), LIMITS)


def test_defaults_fit_the_bundle():
    steps = _plan()
    assert (steps.fps, steps.window, steps.every, steps.segment) == (2.0, 60, 4, 8)
    short = plan(StreamSettings(prompt="?"), Limits(max_frames=5, max_tokens=99, max_fps=2.0))
    assert (short.window, short.segment) == (5, 5)
    assert _plan(every=None).every is None
    assert _plan(window="8s", fps=1.0, every=3, latency="250ms").latency == 0.25
    assert _plan(fps=0.5, window="10s", every="2s").window == 5
    assert _plan(fps=0.7, window="10s").every == 1  # nearest to 2 s


def test_numbers_of_numpy_are_numbers():
    steps = _plan(
        fps=np.float64(2), every=np.float32(2), window=np.int64(8), gate=np.float32(3),
        queue=np.int64(4),
    )  # fmt: skip
    assert (steps.fps, steps.every, steps.window) == (2.0, 4, 16)


@pytest.mark.parametrize("fps", [0.3, 0.7, 1.3, 1.9])
def test_what_is_told_as_a_way_out_is_one(fps: float):
    with pytest.raises(InputError) as error:
        _plan(fps=fps, window="10s", every="1.01s")
    way_out = str(error.value).partition("fix: ")[2].split(" or ")
    for every in way_out:
        assert _plan(fps=fps, window=f"{20 / fps}s", every=every).every


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": "300ms"}, r"every is 300ms\n  allowed: multiples of 0.5 s.*\n  fix: 0.5s"),
        ({"every": "1.3s"}, r"every is 1.3s\n  allowed: multiples.*\n  fix: 1s or 1.5s"),
        ({"window": "32.3s"}, r"window is 32.3s"),
        ({"window": "1h"}, r"a window of 7200 frames \(1h at 2 frames a second\)\n"
                           r"  allowed: up to 64 frames.*\n  fix: a window of 32 s"),
        ({"segment": "40s", "window": "30s", "mode": "incremental"},
         r"segment is 40s\n  allowed: up to the window"),
        ({"segment": 0.1, "mode": "incremental"}, "segment is 0.1"),
        ({"segment": "2s"}, r"segment is 2s, but there are none in exact mode"),
        ({"latency": 1, "prune_ratio": 0.5}, r"a latency of 1 beside a fixed prune ratio, 0.5"),
        ({"fps": 5.0}, r"fps is 5.0\n  allowed: above 0, up to 2"),
        ({"fps": 0}, "fps is 0"),
        ({"fps": "2"}, "fps is '2'"),
        ({"mode": "fast"}, r"mode is 'fast'\n  allowed: exact or incremental"),
        ({"policy": "drop"}, r"policy is 'drop'\n  allowed: newest or wait"),
        ({"gate": -1}, r"gate is -1\n  allowed: 0 to 255"),
        ({"gate": "low"}, "gate is 'low'"),
        ({"queue": 0}, r"queue is 0\n  allowed: 1 or more frames"),
        ({"latency": "soon"}, "latency is 'soon'"),
    ],
)  # fmt: skip
def test_what_is_refused(settings: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        _plan(**settings)
