"""Addresses without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote, unquote

HIDDEN = "***"

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_NAME = re.compile(r"[\w:-]+=?")
_SETTING = re.compile(r"([\w:-]+\s*=\s*)?(.*)", re.DOTALL)
_SECRET = "(?:pass|pw|secret|token|user|auth|cookie|headers)"
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
# The value may hold any sign: it goes on to the next "&name=" or ";name=".
_SECRET_SETTING = re.compile(
    rf"({_SECRET}[^/;&=?]*=).*?(?=[;&][^/;&=?]*=|$)", re.IGNORECASE | re.DOTALL
)


def redacted(text: str) -> str:
    """Return an address without user, password, the values of its query and secrets in its path.

    An "@" behind the host may be one of a password with "/", "?" or "#" in it, so nothing but the
    scheme of such an address is shown. A text without a scheme may be an address with a slip of the
    pen: nothing before its last "@" is shown.
    """
    scheme, mark, rest = text.partition("://")
    if not mark or not _SCHEME.fullmatch(scheme):
        shown = _without_secrets(text)
        if "@" not in text:
            return shown
        _, mark, rest = shown.rpartition("@")
        return f"{HIDDEN}@{rest}" if mark else HIDDEN
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    if "@" in behind:
        return f"{scheme}://{HIDDEN}"
    path, mark, query = behind.partition("#")[0].partition("?")
    values = re.sub(r"(^|&)([^=&]*=)?[^&]*", rf"\1\2{HIDDEN}", query) if query else ""
    host = authority.rpartition("@")[2]
    return f"{scheme}://{_without_secrets(host + path)}{mark}{values}"


def redacted_message(text: str, words: Sequence[str]) -> str:
    """Return a message without what is secret in the words that it may repeat.

    Args:
        text: of the message.
        words: of a command line.
    """
    for word in sorted({*words, *(word.partition("=")[2] for word in words)}, key=len)[::-1]:
        shown = redacted(word)
        if shown != word:
            text = text.replace(repr(word)[1:-1], shown).replace(word, shown)
    return text


def redacted_words(words: Iterable[str]) -> list[str]:
    """Return the words of a pipeline, such as `user-pw=word`, without what is secret in them."""
    shown = []
    for word in _joined(words):
        name, value = _setting(word)
        is_secret = name and _SECRET_NAME.search(name)
        shown.append(name + (HIDDEN if is_secret else redacted(value)))
    return shown


def secrets_of(words: Iterable[str]) -> list[str]:
    """Find users and passwords in the words of a pipeline, in all forms they may take."""
    found = []
    for name, value in map(_setting, _joined(words)):
        if name and _SECRET_NAME.search(name):
            found.append(value)
        credentials, mark, _ = value.rpartition("://")[2].rpartition("@")
        if mark:
            found += [credentials, *credentials.split(":", 1)]
    return list(dict.fromkeys(filter(None, [*found, *map(unquote, found), *map(quote, found)])))


def redacted_text(text: str, secrets: Iterable[str]) -> str:
    """Return a text of another program without addresses' secrets, and without others.

    Args:
        text: what it said.
        secrets: what must not be left in it.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        # Whole words only: a user may be called "a".
        before = r"(?<!\w)" if re.match(r"\w", secret) else ""
        behind = r"(?!\w)" if re.search(r"\w\Z", secret) else ""
        text = re.sub(before + re.escape(secret) + behind, HIDDEN, text)
    return _ADDRESS.sub(lambda match: redacted(match[0]), text)


def _without_secrets(text: str) -> str:
    return _SECRET_SETTING.sub(rf"\1{HIDDEN}", text)


def _joined(words: Iterable[str]) -> list[str]:
    """Words of a pipeline, where a setting may be three: "name", "=" and "value"."""
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if _NAME.fullmatch(last) and (last.endswith("=") or word.startswith("=")):
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _setting(word: str) -> tuple[str, str]:
    """Split a word: "name=" or nothing, and the rest."""
    match = _SETTING.fullmatch(word)
    assert match is not None
    return match[1] or "", match[2]
