"""How a source is read, checked before anything is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stts_export.errors import InputError, did_you_mean

Transport = Literal["tcp", "udp"]
Decoder = Literal["auto", "software", "cuda"]


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read; every source takes what concerns it.

    Raises:
        InputError: a value is of the wrong kind or out of range.
    """

    realtime: bool = False
    """Frames of a file or a folder come when their times say, as from a camera; otherwise as fast
    as they are taken."""
    transport: Transport = "tcp"
    """How RTSP sends its packets. UDP loses some where the network does."""
    connect_timeout: float = 5.0
    """Seconds that each of the two steps of a connection may take: the server's answer, and finding
    out what it sends."""
    read_timeout: float = 5.0
    """Seconds without a frame after which a connection counts as lost; four times as long for the
    pieces of an HLS or DASH playlist."""
    reconnect_for: float = 30.0
    """Seconds without a frame after which a lost source is given up; 0: at once."""
    decoder: Decoder = "auto"
    """Of addresses and cameras: "cuda" decodes on the GPU or fails, "auto" on the GPU where that
    works."""
    folder_fps: float = 2.0
    """Images of a folder per second."""

    def __post_init__(self) -> None:
        if not isinstance(self.realtime, bool):
            raise InputError(
                f"realtime is {self.realtime!r}", where="realtime", allowed="True or False"
            )
        _check_choice("transport", self.transport, get_args(Transport))
        _check_choice("decoder", self.decoder, get_args(Decoder))
        for name in ("connect_timeout", "read_timeout", "folder_fps"):
            _check_number(name, getattr(self, name), above_zero=True)
        _check_number("reconnect_for", self.reconnect_for, above_zero=False)


def refuse_cuda(options: SourceOptions, where: str, reason: str) -> None:
    """Refuse to be told to decode on the GPU, for sources that do not.

    Raises:
        InputError: the decoder is "cuda".
    """
    if options.decoder == "cuda":
        raise InputError(f"decoder is 'cuda', but {reason}", where=where, allowed="auto, software")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise InputError(f"{name} is {value!r}{hint}", where=name, allowed=" or ".join(choices))


def _check_number(name: str, value: Any, *, above_zero: bool) -> None:
    is_number = type(value) in (int, float) and math.isfinite(value)
    if not is_number or value < 0 or (above_zero and value == 0):
        raise InputError(
            f"{name} is {value!r}",
            where=name,
            allowed="a number above 0" if above_zero else "a number, 0 or above",
        )
