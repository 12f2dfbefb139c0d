"""When the frames of a video are shown, and what has to be decoded for some of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from av.packet import Packet
from numpy.typing import NDArray

# Decoding on is cheaper than starting anew at a later keyframe for less than this many packets.
_MIN_SKIP = 24


class PacketInfo(NamedTuple):
    """What the index needs to know of a packet, without its data."""

    pts: int | None
    length: int
    is_key: bool
    is_corrupt: bool
    is_shown: bool

    @staticmethod
    def of(packet: Packet[Any]) -> PacketInfo:
        """Describe a packet."""
        return PacketInfo(
            packet.pts,
            packet.duration or 0,
            packet.is_keyframe,
            packet.is_corrupt,
            not packet.is_discard,
        )


@dataclass(frozen=True)
class FrameIndex:
    """When each frame of a stream is shown, in the order of display."""

    keys: NDArray[np.int64]
    """(N,) what a decoded frame is known by: its pts, or its place in the decoder's output."""
    starts: NDArray[np.float64]
    """(N,) seconds on the file's own clock."""
    end: float
    """End of the last frame in seconds."""
    packet_pts: NDArray[np.int64] | None = None
    """(P,) pts of the packets in the order of decoding; None when `keys` are places."""
    packet_is_key: NDArray[np.bool_] | None = None
    """(P,) whether decoding can start at the packet."""

    @staticmethod
    def from_packets(
        packets: Sequence[PacketInfo], time_base: Fraction, frame_ticks: int
    ) -> FrameIndex | None:
        """Index frames by their packets.

        Args:
            packets: in the order of decoding, at least one of them shown.
            time_base: seconds per tick.
            frame_ticks: length of the last frame where its packet states none.

        Returns:
            The index; None when packets lack times.
        """
        if any(packet.pts is None for packet in packets):
            return None
        pts = np.array([packet.pts for packet in packets], dtype=np.int64)
        shown = np.array([packet.is_shown for packet in packets])
        last = packets[int(np.flatnonzero(shown)[np.argmax(pts[shown])])]
        ticks = np.sort(pts[shown])
        return FrameIndex(
            ticks,
            _seconds(ticks, time_base),
            float((int(ticks[-1]) + (last.length or frame_ticks)) * time_base),
            pts,
            np.array([packet.is_key for packet in packets]),
        )

    @staticmethod
    def from_frames(pts: Sequence[int], time_base: Fraction, frame_ticks: int) -> FrameIndex:
        """Index decoded frames by their place in the decoder's output."""
        ticks = np.sort(np.array(pts, dtype=np.int64))
        end = float((int(ticks[-1]) + frame_ticks) * time_base)
        return FrameIndex(np.arange(len(ticks)), _seconds(ticks, time_base), end)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return self.end - float(self.starts[0])

    def shown_at(self, times: NDArray[np.float64]) -> NDArray[np.int64]:
        """Keys of the frames on screen `times` seconds after the first frame's start."""
        ends = np.append(self.starts[1:], self.end)
        shown = np.searchsorted(ends, times + self.starts[0], side="right")
        keys: NDArray[np.int64] = self.keys[np.minimum(shown, len(ends) - 1)]
        return keys

    def packets_for(self, keys: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Say which packets to decode for certain frames: runs from a keyframe up to each.

        Args:
            keys: (K,) keys of the frames; the index must have been made from packets.

        Returns:
            (P,) bool.
        """
        assert self.packet_pts is not None
        assert self.packet_is_key is not None
        needed = np.zeros(len(self.packet_pts), dtype=np.bool_)
        for key in keys:
            place = int(np.flatnonzero(self.packet_pts == key)[-1])
            # A keyframe with a later pts may be followed by frames that need what precedes it.
            is_entry = self.packet_is_key[: place + 1] & (self.packet_pts[: place + 1] <= key)
            entries = np.flatnonzero(is_entry)
            # One packet more, for pictures that come as two fields.
            needed[int(entries[-1]) if entries.size else 0 : place + 2] = True
        for before, after in itertools.pairwise(np.flatnonzero(needed)):
            if after - before < _MIN_SKIP:
                needed[before:after] = True
        return needed


def _seconds(ticks: NDArray[np.int64], time_base: Fraction) -> NDArray[np.float64]:
    seconds: NDArray[np.float64] = ticks * time_base.numerator / time_base.denominator
    return seconds
