"""The errors a user can meet: each says where, what was got, what is allowed, and how to fix it.

The command line turns an `SttsError` into one message and its `exit_code`; any other exception is a
bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SttsError(Exception):
    """Base of all errors that are meant for the user.

    Args:
        message: one sentence that names what is wrong, with the value that was got.
        where: file, stage or argument that the error is about.
        allowed: what would have been accepted.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.allowed = allowed
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        lines = [head]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.fix:
            lines.append(f"  fix: {self.fix}")
        return "\n".join(lines)


class InputError(SttsError):
    """The user's input is at fault: a checkpoint, a bundle, a video, an argument."""

    exit_code = 1


class TrainingError(SttsError):
    """A training run cannot go on: a loss or a gradient is not finite."""

    exit_code = 1


class VerificationError(SttsError):
    """What was built does not agree with what it was built from."""

    exit_code = 3


class MissingDependencyError(SttsError):
    """This environment lacks a package, a driver or a device."""

    exit_code = 4


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
