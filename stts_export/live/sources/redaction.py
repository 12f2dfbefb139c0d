"""Addresses without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import quote, unquote

HIDDEN = "***"

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
_SETTING = re.compile(r"([\w:-]+=)?(.*)", re.DOTALL)
_SECRET_NAME = re.compile(r"pass|pw|secret|token|user|auth|cookie|headers", re.IGNORECASE)


def redacted(url: str) -> str:
    """Return an address without user, password and the values of its query.

    An "@" behind the host may be one of a password with "/", "?" or "#" in it, so nothing but the
    scheme of such an address is shown.
    """
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    behind = rest[len(authority) :]
    if "@" in behind:
        return f"{scheme}://{HIDDEN}"
    path, mark, query = behind.partition("#")[0].partition("?")
    values = re.sub(r"(^|&)([^=&]*=)?[^&]*", rf"\1\2{HIDDEN}", query) if query else ""
    return f"{scheme}://{authority.rpartition('@')[2]}{path}{mark}{values}"


def redacted_words(words: Iterable[str]) -> list[str]:
    """Return the words of a pipeline, such as `user-pw=word`, without what is secret in them."""
    shown = []
    for word in words:
        name, value = _setting(word)
        is_secret = name and _SECRET_NAME.search(name)
        shown.append(name + (HIDDEN if is_secret else redacted(value)))
    return shown


def secrets_of(words: Iterable[str]) -> list[str]:
    """Find users and passwords in the words of a pipeline, in all forms they may take."""
    found = []
    for name, value in map(_setting, words):
        if name and _SECRET_NAME.search(name):
            found.append(value)
        credentials, mark, _ = value.partition("://")[2].rpartition("@")
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
        text = text.replace(secret, HIDDEN)
    return _ADDRESS.sub(lambda match: redacted(match[0]), text)


def _setting(word: str) -> tuple[str, str]:
    """Split a word: "name=" or nothing, and the rest."""
    match = _SETTING.fullmatch(word)
    assert match is not None
    return match[1] or "", match[2]
