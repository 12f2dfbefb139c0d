"""Names of hosts, looked up with a limit: FFmpeg's look-up can be neither bounded nor stopped."""

from __future__ import annotations

import os
import socket
import threading
import time
from threading import Event
from urllib.parse import urlsplit

from stts_export.live.sources.failures import LostError

_GLANCE = 0.05
"""Seconds between two looks at `stop`."""


def look_up(url: str, seconds: float, stop: Event) -> None:
    """See whether the name of an address's host is known, so that what comes next is quick.

    Args:
        url: with a host.
        seconds: to wait at most.
        stop: ends the wait.

    Raises:
        LostError: the name is not known, or nobody answers who might know it.
    """
    try:
        host = urlsplit(url).hostname
    except ValueError:
        return  # FFmpeg reads it in its own way
    if not host or (url.startswith("http") and _has_proxy()):
        return
    found: list[bool] = []
    thread = threading.Thread(target=_resolve, args=(host, found), daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive() and not stop.is_set():
        if time.monotonic() > deadline:
            raise LostError(f"nobody answers where host {host} is", seconds)
        thread.join(_GLANCE)
    if found == [False]:
        raise LostError(f"the host name {host} is not known")


def _has_proxy() -> bool:
    """Whether there may be a proxy, which may know names that this machine does not."""
    return any(name.lower().endswith("_proxy") for name in os.environ)


def _resolve(host: str, found: list[bool]) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        found.append(False)
    else:
        found.append(True)
