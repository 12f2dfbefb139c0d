"""Bounded queues: what is given up is the oldest, and counted; who waits is let go in the end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stts_export.live.events import Counters, LiveEnd, LiveNotice
from stts_export.live.queues import (
    Ask,
    Desk,
    EventQueue,
    Inbox,
    Piece,
    Question,
    next_event,
)
from stts_export.live.sample import Sample


def _never(what: Any) -> None:
    raise AssertionError(what)


def _sample(number: int) -> Sample:
    return Sample(number / 2, number, np.zeros((1, 1, 3), np.uint8), 0.0, (1, 1), None)


def _question(number: int, is_due: bool = True) -> Question:
    return Question(f"question {number}", 0.0, (), (1, 1), None, 0.0, is_due)


def _started(run: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run in a thread that is expected to wait."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive(), results
    return thread, results


def _ended(thread: threading.Thread) -> None:
    thread.join(10)
    assert not thread.is_alive()


def test_the_newest_samples_win():
    dropped: list[int] = []
    inbox = Inbox(3, "newest", dropped.append)
    assert all(inbox.put(_sample(number)) for number in range(5))
    assert len(inbox) == 3
    taken = inbox.take(8)
    assert isinstance(taken, list)
    assert [sample.index for sample in taken] == [2, 3, 4]
    assert sum(dropped) == 2


def test_a_source_that_waits_loses_nothing_until_its_patience_ends():
    dropped: list[int] = []
    inbox = Inbox(1, "wait", dropped.append)
    assert inbox.put(_sample(0))
    assert not inbox.put(_sample(1), timeout=0)
    assert sum(dropped) == 1
    thread, results = _started(lambda: inbox.put(_sample(2)))
    assert isinstance(inbox.take(1), list)
    _ended(thread)
    assert results == [True]
    assert len(inbox) == 1


def test_a_question_is_about_what_came_before_it():
    inbox = Inbox(3, "newest", lambda _: None)
    inbox.put(_sample(0))
    inbox.ask(Ask("now?", 1.0))
    inbox.put(_sample(1))
    inbox.put(_sample(2))
    inbox.put(_sample(3))  # pushes out the first one, not the question
    assert inbox.take(8) == Ask("now?", 1.0)
    inbox.finish()
    assert not inbox.put(_sample(4))
    assert not inbox.ask(Ask("too late?", 1.0))
    assert len(inbox) == 3
    for numbers in ([1, 2], [3]):
        taken = inbox.take(2)
        assert isinstance(taken, list)
        assert [sample.index for sample in taken] == numbers
    assert inbox.take(8) is None


def test_closing_lets_everybody_go():
    inbox = Inbox(1, "wait", lambda _: None)
    reader, read = _started(lambda: inbox.take(1))
    inbox.close()
    _ended(reader)
    assert read == [None]
    assert len(inbox) == 0
    assert not inbox.put(_sample(0))


def test_a_question_that_is_due_replaces_one_that_waits():
    skipped: list[Question] = []
    desk = Desk("newest", 2, skipped.append)
    asked, piece = _question(0, is_due=False), Piece((), 0.0)
    for work in (_question(1), asked, piece, _question(2), _question(3)):
        assert desk.put(work)
    assert [entry.prompt for entry in skipped] == ["question 2"]
    desk.finish()
    assert [desk.take() for _ in range(5)] == [_question(1), asked, piece, _question(3), None]


def test_questions_are_taken_even_if_segments_come_faster_than_they_are_taken():
    skipped: list[Question] = []
    desk = Desk("newest", 2, skipped.append)

    def bring() -> None:
        for number in range(20):
            desk.put(Piece((), number))
            desk.put(_question(number))
        desk.finish()

    thread, _ = _started(bring)
    taken = []
    while (work := desk.take()) is not None:
        taken.append(work)
    _ended(thread)
    assert sum(isinstance(work, Question) for work in taken) == 20
    assert skipped == []


def test_questions_of_a_file_wait_for_each_other():
    desk = Desk("wait", 2, _never)
    desk.put(_question(1))
    thread, results = _started(lambda: desk.put(_question(2)))
    assert desk.take() == _question(1)
    _ended(thread)
    assert results == [True]


@pytest.mark.parametrize("policy", ["newest", "wait"])
def test_pieces_wait_under_both_policies(policy: Any):
    desk = Desk(policy, 1, _never)
    desk.put(Piece((), 1.0))
    thread, results = _started(lambda: desk.put(Piece((), 2.0)))
    assert desk.take() == Piece((), 1.0)
    _ended(thread)
    desk.close()
    assert results == [True]
    assert not desk.put(Piece((), 3.0))
    assert desk.take() is None


def _notice(number: int) -> LiveNotice:
    return LiveNotice("a", "gap", str(number))


def test_events_that_nobody_fetches_are_bounded_and_the_end_stays():
    dropped: list[int] = []
    queue = EventQueue("newest", dropped.append)
    for number in range(1000):
        queue.put(_notice(number))
    queue.put(LiveEnd("a", None, Counters()))
    left = []
    while (event := next_event([queue], 0)) is not None:
        left.append(event)
    assert len(left) + sum(dropped) == 1001
    assert len(left) < 300
    assert isinstance(left[-1], LiveEnd)
    assert left[-2] == _notice(999)
    assert queue.is_over
    assert next_event([queue], None) is None


def test_events_of_several_streams_until_the_last_has_ended():
    first, second = EventQueue("newest", _never), EventQueue("newest", _never)
    second.put(_notice(1))
    assert next_event([first, second], None) == _notice(1)
    assert next_event([first, second], 0.01) is None
    first.put(LiveEnd("a", None, Counters()))
    assert isinstance(next_event([first, second], None), LiveEnd)
    thread, results = _started(lambda: next_event([first, second], None))
    second.put(LiveEnd("b", None, Counters()))
    _ended(thread)
    assert isinstance(results[0], LiveEnd)
    assert next_event([first, second], None) is None
