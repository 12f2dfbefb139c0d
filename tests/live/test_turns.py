"""Shared graphs: one turn at a time, and nobody is left behind."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from stts_export.live.turns import SharedRunner, Turns, turns_at_a_time


class _Slow:
    """A graph that takes its time and notices company."""

    updates_in_place = True
    cache_capacity: int | None = 12

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.inside = self.most = 0
        self._lock = threading.Lock()

    def __call__(self, inputs: dict[str, Any], in_place: Any = None) -> dict[str, Any]:
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(self.seconds * inputs.get("length", 1))
        with self._lock:
            self.inside -= 1
        return inputs

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    def to_host(self, array: Any) -> Any:
        return array

    def copy(self, target: Any, source: Any) -> None:
        target[...] = source


def _calls(shared: SharedRunner, until: float, length: float) -> int:
    done = 0
    while time.monotonic() < until:
        shared({"length": length})
        done += 1
    return done


@pytest.mark.parametrize("slots", [1, 2])
def test_no_more_calls_at_a_time_than_slots(slots: int):
    runner, turns = _Slow(0.002), Turns(slots)
    until = time.monotonic() + 0.3
    threads = [
        threading.Thread(
            target=_calls, args=(SharedRunner(runner, turns, turns.join()), until, 1.0)
        )
        for number in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert runner.most == slots


def test_long_calls_of_one_do_not_hold_up_short_calls_of_another():
    """Both get about the same time, so the short ones are many more."""
    runner, turns = _Slow(0.005), Turns()
    done: dict[str, int] = {}
    until = time.monotonic() + 1.0

    def run(name: str, length: float) -> None:
        done[name] = _calls(SharedRunner(runner, turns, turns.join()), until, length)

    threads = [threading.Thread(target=run, args=pair) for pair in [("long", 8.0), ("short", 1.0)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert done["short"] >= 3 * done["long"] > 0


def test_answers_go_before_frames_of_their_stream_but_do_not_shut_them_out(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("stts_export.live.turns._PATIENCE", 0.1)
    runner, turns = _Slow(0.005), Turns()
    shared = SharedRunner(runner, turns, turns.join())
    done = {"answers": 0, "frames": 0}
    until = time.monotonic() + 1.0

    def run(role: str, is_urgent: bool) -> None:
        with turns.hurry() if is_urgent else nullcontext():
            assert turns.is_hurried or not is_urgent
            done[role] = _calls(shared, until, 1.0)

    # Two answering threads, so that one always waits.
    threads = [threading.Thread(target=run, args=("answers", True)) for _ in range(2)]
    threads.append(threading.Thread(target=run, args=("frames", False)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert 3 <= done["frames"] <= 20
    assert done["answers"] >= 3 * done["frames"]
    assert not turns.is_hurried


def test_who_was_away_catches_up_with_nothing():
    """Neither one that comes back nor a new one may take all turns, though others idle lower."""
    runner, turns = _Slow(0.005), Turns()
    busy, idle, away = (SharedRunner(runner, turns, turns.join()) for _ in range(3))
    for shared in (idle, away):
        shared({})
    _calls(busy, time.monotonic() + 1.5, 1.0)
    done: dict[str, int] = {}
    until = time.monotonic() + 1.5

    def run(name: str, shared: SharedRunner) -> None:
        done[name] = _calls(shared, until, 1.0)

    threads = [threading.Thread(target=run, args=pair) for pair in [("busy", busy), ("away", away)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert done["busy"] >= 0.25 * done["away"]  # half a second of credit at most


def test_a_party_that_left_in_the_middle_keeps_no_slot():
    turns = Turns()
    party = turns.join()
    with turns.take(party):
        turns.leave(party)
    with turns.take(party), turns.take(turns.join()):
        pass


def test_turns_within_a_turn_are_part_of_it():
    turns = Turns()
    with turns.take(0), turns.take(0):
        other = threading.Thread(target=lambda: turns.take(1).__enter__(), daemon=True)
        other.start()
        other.join(0.05)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()


def test_a_call_that_fails_gives_its_turn_back():
    turns = Turns()

    def fail() -> None:
        with turns.take(0):
            raise ValueError("broken")

    for _ in range(3):
        with pytest.raises(ValueError, match="broken"):
            fail()
    with turns.take(1):
        pass
    turns.leave(0)
    turns.leave(99)


def test_a_shared_runner_is_the_runner():
    shared = SharedRunner(_Slow(0), Turns(), 0)
    assert (shared.updates_in_place, shared.cache_capacity) == (True, 12)
    array = shared.zeros((2,), np.float32)
    shared.copy(array, np.ones(2, np.float32))
    assert shared.to_host(array).tolist() == [1, 1]


def test_turns_at_a_time_fill_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert [turns_at_a_time(threads) for threads in (None, 1, 3, 8, 16)] == [1, 8, 2, 1, 1]
