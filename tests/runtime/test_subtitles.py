from __future__ import annotations

from pathlib import Path

import pytest

from stts_export.errors import InputError
from stts_export.runtime.prompt import Subtitle
from stts_export.runtime.subtitles import read_subtitles

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello, <i>you</i>.

2
01:02:03,04 --> 01:02:04,567 X1:40 X2:600
{\\an8}two
lines &amp; more

and a line after an empty one

3
00:00:05,000 --> 00:00:05,000
"""
VTT = """WEBVTT - a title

STYLE
::cue { color: red }

NOTE not shown --> at all

intro
00:01.000 --> 00:02.500 align:start position:0%
<v Anna>Hello, <c.loud>you</c><00:00:02.000>.

100:00:00.000 --> 100:00:01.250
a < b &gt; c
"""


def _write(folder: Path, text: str | bytes) -> Path:
    path = folder / "lines.srt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_subrip(tmp_path, newline, encoding):
    path = _write(tmp_path, SRT.replace("\n", newline).encode(encoding))
    assert read_subtitles(path) == (
        Subtitle(1.0, 2.5, "Hello, you."),
        Subtitle(3723.04, 3724.567, "two lines & more and a line after an empty one"),
        Subtitle(5.0, 5.0, ""),
    )


def test_webvtt(tmp_path):
    assert read_subtitles(_write(tmp_path, VTT)) == (
        Subtitle(1.0, 2.5, "Hello, you."),
        Subtitle(360000.0, 360001.25, "a < b > c"),
    )


def test_subrip_without_numbers(tmp_path):
    path = _write(tmp_path, "00:00:00,0 --> 00:00:01,0\na\n\n00:00:01,0 --> 00:00:02,0\nb")
    assert [line.text for line in read_subtitles(path)] == ["a", "b"]


def _read(folder: Path, text: str) -> list[tuple[float, str]]:
    return [(line.start, line.text) for line in read_subtitles(_write(folder, text))]


A, B = "00:01,000 --> 00:02,000\n", "00:03,000 --> 00:04,000\n"
VTT_A, VTT_B = A.replace(",", "."), B.replace(",", ".")
TWO = [(1.0, "a"), (3.0, "b")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"1\n{A}a\n2\n{B}b\n", TWO),  # no empty line between
        (f"{A}a\n{B}b\n", TWO),
        (f"1\n\n{A}a\n\n2\n\n{B}b\n", TWO),  # an empty line after the number
        (f"{A}a\n{B}\nb\n", TWO),  # and after the times
        (f"1\n{A}2\n\n2\n{B}3\n4", [(1.0, "2"), (3.0, "3 4")]),
        (f"{A}a\n42\n{B}b", [(1.0, "a 42"), (3.0, "b")]),  # no numbers in this file
        (f"{A}\n\n{B}b", [(1.0, ""), (3.0, "b")]),
        (f"1\r{A}a\r\r2\r{B}b".replace("\n", "\r"), TWO),
        (f"1\n{A}a --> b\nc\n", [(1.0, "a --> b c")]),
        (f"1\n{A}NOTE a\n\nSTYLE\n", [(1.0, "NOTE a STYLE")]),  # SubRip has no such blocks
        (f"WEBVTT\n{VTT_A}a\n\n{VTT_B}b\n", TWO),  # right below the head
        (f"WEBVTT x\nKind: captions\n\n{VTT_A}a\n\nname\n{VTT_B}b\n", TWO),
        (f"WEBVTT\n\nNOTE\n{VTT_A}c\n\n{VTT_A}a\n{VTT_B}b\n\nNOTE\nc", TWO),
        (f"WEBVTT\n\nREGION\nid:x\n\nNOTES on\n{VTT_A}a\nNOTE\n", [(1.0, "a NOTE")]),
    ],
)
def test_where_subtitles_begin_and_end(tmp_path, text, expected):
    assert _read(tmp_path, text) == expected


@pytest.mark.parametrize("space", ["\v", "\f", "\x1c", "\x85", "\u2028"])
def test_only_newlines_end_a_line(tmp_path, space):
    assert _read(tmp_path, f"1\n{A}x{space}{space}1{space}{B}") == [
        (1.0, f"x{space}{space}1{space}{B.strip()}")
    ]


@pytest.mark.parametrize(
    ("text", "in_subrip", "in_webvtt"),
    [
        ("if a<b and c>d then", "if a<b and c>d then", "if a<b and c>d then"),
        ("2<i>3</i>4 <br> <x>", "234 <br> <x>", "234 <br> <x>"),
        ("<B>x</B> <s>y</s> <u>z</u>", "x y z", "x y z"),
        ('<font color="#ff0000" size=3>x</font>', "x", "x"),
        ("a <font b> c", "a <font b> c", "a <font b> c"),
        ("<ruby>x<rt>y</rt></ruby> <c.loud.red>z</c>", "xy z", "xy z"),
        ("<v.loud Anna B>x</v> <lang en-GB>y</lang>", None, "x y"),
        ("x<00:00:02.000>y<01:02.000>z", "x<00:00:02.000>y<01:02.000>z", "xyz"),
        ("{\\an8}x {y}", "x {y}", "x {y}"),
    ],
)
def test_only_markup_is_taken_out(tmp_path, text, in_subrip, in_webvtt):
    assert _read(tmp_path, f"1\n{A}{text}\n") == [(1.0, in_subrip or text)]
    assert _read(tmp_path, f"WEBVTT\n\n{VTT_A}{text}\n") == [(1.0, in_webvtt)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no subtitles"),
        ("WEBVTT\n\nNOTE nothing\n", "has no subtitles"),
        ("[Script Info]\nTitle: x\n", r"line 1 is '\[Script Info\]'"),
        ("WEBVTT\n\nsome text\n", "line 3 is 'some text'"),
        ("1\n00:00:01 --> 00:00:02,000\na\n", "line 2 has the time '00:00:01'"),
        ("1\n00:00:01,000 -->\na\n", "line 2 has the time ''"),
        (f"1\n{A.strip()} Hello\n", "line 2 has 'Hello' after the times"),
        (f"WEBVTT\n\n{VTT_A}a\n\nb\n", "line 6 is 'b'"),
        (f"x\n\n{A}a\n", "line 1 is 'x'"),
        ("1\n00:99:01,000 --> 00:00:02,000\na\n", "line 2 has the time '00:99:01,000'"),
        ("\n\n1\n00:00:03,000 --> 00:00:02,000\na\n", "line 4 ends before it begins"),
        (b"1\n00:00:01,000 --> 00:00:02,000\ncaf\xe9\n", "is not text in UTF-8"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    path = _write(tmp_path, text)
    with pytest.raises(InputError, match=message) as error:
        read_subtitles(path)
    assert str(path) in str(error.value)


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_subtitles(tmp_path / "none.srt")
    with pytest.raises(InputError, match="cannot be read"):
        read_subtitles(tmp_path)
