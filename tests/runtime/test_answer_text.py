"""Text in pieces and stop strings, with tokens of one byte each, so that all is spread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel

from stts_export.errors import InputError
from stts_export.runtime.answer_text import AnswerText, check_stop
from stts_export.runtime.tokenizer import decode

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(BPE({letter: index for index, letter in enumerate(_ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = _byte_tokenizer()


def _ids(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text).ids
    return ids


def _decode(ids: Sequence[int]) -> str:
    return decode(TOKENIZER, ids)


def _run(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[str, list[str], bool, int]:
    """Text, pieces, whether a stop string ended it, and how many tokens that took."""
    pieces: list[str] = []
    text = AnswerText(_decode, stop, pieces.append)
    for count in range(1, len(ids) + 1):
        if text.ends(ids[:count]):
            return text.text, pieces, True, count
    ended = text.finish(ids)
    return text.text, pieces, ended, len(ids)


def test_characters_come_whole():
    assert len(_ids("é→🙂")) == 9
    text, pieces, ended, _ = _run(_ids("aé→🙂."))
    assert pieces == ["a", "é", "→", "🙂", "."]
    assert (text, ended) == ("aé→🙂.", False)


def test_a_character_that_is_never_completed_comes_at_the_end():
    text, pieces, _, _ = _run(_ids("ok 🙂")[:-1])
    assert pieces == ["o", "k", " ", "�"]
    assert text == "ok �"


def test_what_may_become_a_stop_string_is_held_back():
    _, pieces, ended, _ = _run(_ids("a, b and c"), ["and so"])
    assert pieces == ["a,", " ", "b", " ", "and c"]
    assert not ended


@pytest.mark.parametrize(
    ("said", "stop", "text", "tokens"),
    [
        ("one two", ["two"], "one ", 7),
        ("one two", [" ", "two"], "one", 4),
        ("one two", ["one"], "", 3),
        ("one two", ["e t", "ne "], "o", 4),  # the first to be complete, not the first to begin
        ("aaab", ["aab"], "a", 4),
        ("x🙂y", ["🙂"], "x", 5),
        ("abcabd", ["abd", "bx"], "abc", 6),
        ("line\n\nnext", ["\n\n"], "line", 6),
    ],
)
def test_the_text_ends_before_the_first_stop_string(
    said: str, stop: list[str], text: str, tokens: int
):
    got, pieces, ended, count = _run(_ids(said), stop)
    assert (got, "".join(pieces), ended, count) == (text, text, True, tokens)


def test_a_stop_string_in_what_was_held_back_ends_the_text_too():
    ids = _ids("no 🙂")[:-1]
    text = AnswerText(_decode, ["�"])
    assert not any(text.ends(ids[:count]) for count in range(1, len(ids) + 1))
    assert text.finish(ids)
    assert text.text == "no "


def test_without_stop_strings_and_listener_nothing_is_decoded_until_the_end():
    calls: list[Sequence[int]] = []

    def count(ids: Sequence[int]) -> str:
        calls.append(ids)
        return _decode(ids)

    text = AnswerText(count)
    assert not text.ends(_ids("ab"))
    assert not calls
    assert not text.finish(_ids("abc"))
    assert text.text == "abc"


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 255), max_size=30), st.lists(st.text("ab🙂�", min_size=1), max_size=3)
)
@example(_ids("ab🙂🙂"), ["b🙂"])
def test_pieces_make_up_the_text_for_any_bytes(ids: list[int], stop: list[str]):
    _check_pieces(ids, stop)


@settings(deadline=None)
@given(
    st.text("ab🙂 é", max_size=20), st.lists(st.text("ab🙂 é", min_size=1, max_size=4), max_size=3)
)
def test_pieces_make_up_the_text_for_any_text(said: str, stop: list[str]):
    _check_pieces(_ids(said), stop)


def _check_pieces(ids: list[int], stop: list[str]) -> None:
    text, pieces, _, count = _run(ids, stop)
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any(word in text for word in stop)
    assert _decode(ids[:count]).startswith(text)
    if not any(word in _decode(ids) for word in stop):
        assert text == _decode(ids)
    silent = AnswerText(_decode, stop)
    if not any(silent.ends(ids[:n]) for n in range(1, len(ids) + 1)):
        silent.finish(ids)
    assert silent.text == text


def test_a_decoder_that_takes_text_back_is_refused_only_when_streaming():
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, "a"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    fused = partial(decode, tokenizer)

    silent = AnswerText(fused)
    silent.finish([0, 1])
    assert silent.text == "X"
    text = AnswerText(fused, on_text=lambda _: None)
    assert not text.ends([0])
    assert not text.ends([0, 1])
    with pytest.raises(InputError, match=r"changes text after the fact, as of 'a' to 'X'"):
        text.finish([0, 1])


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3], None, 3, {"a": 1}, b"a"])
def test_stop_strings_that_are_none(stop: Any):
    with pytest.raises(InputError, match="stop is"):
        check_stop(stop)


def test_one_stop_string_or_several():
    assert check_stop("ab") == ("ab",)
    assert check_stop(["a", "b"]) == ("a", "b")
    assert check_stop(()) == ()
