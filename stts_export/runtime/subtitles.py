"""Subtitle files, SubRip (.srt) and WebVTT (.vtt), as lines of a prompt."""

from __future__ import annotations

import codecs
import html
import itertools
import re
from pathlib import Path

from stts_export.errors import InputError
from stts_export.runtime.prompt import Subtitle

# What looks like a line of times, to be refused where it is malformed.
_TIMED = re.compile(r"\s*\d+:[\d:.,]*\s*-->")
_TIME = re.compile(r"(?:(\d+):)?([0-5]?\d):([0-5]?\d)[.,](\d{1,3})")
# WebVTT's `align:start`, SubRip's `X1:40`.
_SETTINGS = re.compile(r"(?:\s+[A-Za-z]\w*:\S+)*\s*")
_NEWLINE = re.compile(r"\r\n|\n|\r")
# <i>, <c.yellow>, <font color="red">; {\an8}
_MARKUP = re.compile(
    r"</?(?:b|i|u|s|c|font|ruby|rt)(?:\.[^\s<>.]+)*>"
    r"""|<font(?:\s+\w+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s<>"']+))+\s*>"""
    r"|\{\\[^{}]*\}",
    re.IGNORECASE,
)
# <v Name>, <lang en>, <00:01.500>
_VTT_MARKUP = re.compile(r"</?(?:v|lang)(?:\.[^\s<>.]+)*(?:\s[^<>]*)?>|<(?:\d+:)?\d\d:\d\d\.\d{3}>")
_VTT_HEAD = re.compile(r"WEBVTT(?:[ \t].*)?")
_VTT_NOTE = re.compile(r"NOTE(?:[ \t].*)?|(?:STYLE|REGION)[ \t]*")
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_subtitles(path: Path) -> tuple[Subtitle, ...]:
    """Read a subtitle file.

    A subtitle begins at every line of the form 'START --> END', whether or not an empty line or a
    number comes before it. Markup is taken out of the texts, and their lines are joined by spaces.
    Times count from the video's first frame.

    Raises:
        InputError: the file cannot be read, is of another kind, has a time that is malformed or
            ends before it begins, or has no subtitles.
    """
    lines = _NEWLINE.split(_text(path))
    is_vtt = _VTT_HEAD.fullmatch(lines[0]) is not None
    if is_vtt:
        lines = _without_notes(lines)
    starts = [row for row, line in enumerate(lines) if _TIMED.match(line)]
    is_numbered = bool(starts) and lines[_name_row(lines, starts[0], False)].strip().isdecimal()
    ends = [*(_name_row(lines, start, is_numbered) for start in starts), len(lines)]
    _check_blank(lines, 0, ends[0], path)
    subtitles: list[Subtitle] = []
    for start, end in zip(starts, ends[1:], strict=True):
        begins, stops = _times(lines[start], path, start + 1)
        text = lines[start + 1 : end]
        if is_vtt:  # an empty line ends the text
            text = list(itertools.takewhile(str.strip, text))
            _check_blank(lines, start + 1 + len(text), end, path)
        subtitles.append(Subtitle(begins, stops, _plain(text, is_vtt)))
    if not subtitles:
        raise InputError("has no subtitles", where=str(path), allowed="SubRip or WebVTT")
    return tuple(subtitles)


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    marks = (name for mark, name in _BYTE_ORDER_MARKS.items() if content.startswith(mark))
    try:
        return content.decode(next(marks, "utf-8"))
    except UnicodeDecodeError:
        raise InputError(
            "is not text in UTF-8", where=str(path), fix="save the subtitles in UTF-8"
        ) from None


def _without_notes(lines: list[str]) -> list[str]:
    """Empty the lines of WebVTT's head, and of blocks that are no subtitles."""
    kept: list[str] = []
    is_head, is_note, before = True, False, ""
    for line in lines:
        is_head = is_head and bool(line.strip()) and not _TIMED.match(line)
        if not line.strip():
            is_note = False
        elif not before.strip():
            is_note = _VTT_NOTE.fullmatch(line) is not None
        kept.append("" if is_head or is_note else line)
        before = line
    return kept


def _name_row(lines: list[str], start: int, is_numbered: bool) -> int:
    """Return the row of the number or name of the subtitle whose times are in row `start`.

    That is a line right between an empty one and the times. A number may also have an empty line
    after it, or, in a file that numbers its subtitles, text right before it.

    Returns:
        The row; `start` when the subtitle has none.
    """
    row = start - 1
    while row >= 0 and not lines[row].strip():
        row -= 1
    if row < 0 or _TIMED.match(lines[row]):
        return start
    is_next = row == start - 1
    is_first = row == 0 or not lines[row - 1].strip()
    is_number = lines[row].strip().isdecimal()
    if (is_first and (is_next or is_number)) or (is_next and is_number and is_numbered):
        return row
    return start


def _check_blank(lines: list[str], first: int, end: int, path: Path) -> None:
    """Refuse text that belongs to no subtitle."""
    for row in range(first, end):
        if lines[row].strip():
            raise InputError(
                f"line {row + 1} is {lines[row]!r}",
                where=str(path),
                allowed="SubRip or WebVTT: a line with 'START --> END', then the text",
            )


def _times(line: str, path: Path, number: int) -> tuple[float, float]:
    start, _, rest = line.partition("-->")
    end = (rest.split() or [""])[0]
    seconds = []
    for word in (start.strip(), end):
        match = _TIME.fullmatch(word)
        if match is None:
            raise InputError(
                f"line {number} has the time {word!r}", where=str(path), allowed="HH:MM:SS,mmm"
            )
        hours, minutes, whole, part = match.groups()
        total = int(hours or 0) * 3600 + int(minutes) * 60 + int(whole)
        seconds.append(float(f"{total}.{part.ljust(3, '0')}"))
    after = rest.partition(end)[2]
    if not _SETTINGS.fullmatch(after):
        raise InputError(
            f"line {number} has {after.strip()!r} after the times",
            where=str(path),
            allowed="the text in the lines below",
        )
    if seconds[1] < seconds[0]:
        raise InputError(f"line {number} ends before it begins: {line.strip()}", where=str(path))
    return seconds[0], seconds[1]


def _plain(lines: list[str], is_vtt: bool) -> str:
    text = [_MARKUP.sub("", line) for line in lines]
    if is_vtt:
        text = [_VTT_MARKUP.sub("", line) for line in text]
    return html.unescape(" ".join(line.strip() for line in text if line.strip())).strip()
