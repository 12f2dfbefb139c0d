"""The machine that this runs on: what a number was measured on, and memory."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path


def machine() -> str:
    """Processor, cores and system in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_UNLIMITED = 2**60
"""Bytes; version 1 of control groups has a number near 2^63 where there is no limit."""


def available_memory() -> int | None:
    """Bytes that can be had without swapping, in a container no more than it may have.

    Pages of files that were not read lately count as free, as they do in MemAvailable.

    Returns:
        None where nothing says so.
    """
    free = _meminfo("MemAvailable")
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, taken = (
                int((_CGROUP / name).read_text(encoding="ascii")) for name in (limit, used)
            )
        except (OSError, ValueError):  # no container, or "max"
            continue
        if most >= _UNLIMITED:
            continue
        kept = min(taken, _stat((_CGROUP / limit).with_name("memory.stat"), cache))
        left = max(0, most - taken + kept)
        return left if free is None else min(free, left)
    return free


def _stat(file: Path, name: str) -> int:
    """A number of a container's statistics; 0 where it is not told."""
    try:
        lines = file.read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
    except (OSError, ValueError, IndexError):
        return 0


def total_memory() -> int | None:
    """Bytes of memory of this machine; None where nothing says so."""
    return _meminfo("MemTotal")


def free_swap() -> int:
    """Bytes of swap space that are free."""
    return _meminfo("SwapFree") or 0


def _meminfo(name: str) -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        values = [line.split() for line in lines if line.startswith(f"{name}:")]
        return int(values[0][1]) * 1024
    except (OSError, ValueError, IndexError):
        return None


def return_freed_memory() -> None:
    """Give memory that is free in this process back to the system, where the C library can.

    glibc keeps it, in pieces into which the activations of the next clip do not fit.
    """
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
