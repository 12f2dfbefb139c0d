"""The KV cache of a stream that goes on: segments come in at the end and leave at the beginning.

A sequence is BOS, segments of video, and for the time of an answer a question. Each segment is
prefilled once, when it is complete: its visual tokens see each other in both directions and what
came before causally. A segment that leaves takes its keys and values along; later ones keep what
they have read from it.

Rotary positions: attention depends on their differences only. Segments get ascending positions, and
BOS moves up to stand right before the oldest segment that is left, so that all distances are those
of a prompt of BOS and these segments. Moving a key is a rotation by the same angles as in the model
(RoFormer, arXiv 2104.09864, eq. 34); BOS is always rotated from its first value. Before positions
reach the model's limit, all keys are rotated back so that the oldest segment begins at 1.

Axes: n tokens of a segment, W windows of a frame, C decoder width.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.bundle import Bundle
from stts_export.runtime import decoder
from stts_export.runtime.decoder import KVCache
from stts_export.runtime.prompt import PromptBuilder, VideoTokens, kept_positions, visual_groups
from stts_export.tensors import ACTIVATION


@dataclass(frozen=True)
class Segment:
    """What a part of the cache holds."""

    times: NDArray[np.float64]
    """(T,) of its frames."""
    keep: NDArray[np.bool_]
    """(T, W)."""
    ids: NDArray[np.int64]
    """(n,) tokens without those of removed windows."""
    position: int
    """Rotary position at which it begins."""


class SegmentCache:
    """Keys and values of the segments of one stream.

    Args:
        runner: the `decoder` graph.
        bundle: what it belongs to.
        prompts: makes token sequences.
        capacity: most tokens, a question and its answer among them.
        reserve: of these, for a question and its answer.
    """

    def __init__(
        self,
        runner: decoder.Runner,
        bundle: Bundle,
        prompts: PromptBuilder,
        *,
        capacity: int,
        reserve: int,
    ) -> None:
        self._runner = runner
        self._config = bundle.config
        self._prompts = prompts
        self.reserve = reserve
        """Tokens that a question and its answer may have."""
        self._is_gapped = bundle.manifest.positions == "gapped"
        self._dtype = ACTIVATION[bundle.manifest.precision]
        self.segments: deque[Segment] = deque()
        """Oldest first."""
        self.cache = KVCache(runner, bundle.config, bundle.manifest.precision, capacity)
        self._next = 1
        """Rotary position of what comes next."""
        bos = np.array([prompts.bos_id])
        self._feed(bos, np.zeros((1, self._width), self._dtype), np.zeros(1, np.int64))
        self._bos_keys: list[NDArray[Any]] = []
        self.cache.edit_keys(lambda _, keys: self._bos_keys.append(keys[:, :1].copy()))

    def append(
        self, times: NDArray[np.float64], keep: NDArray[np.bool_], features: NDArray[Any]
    ) -> None:
        """Prefill a segment.

        Args:
            times: (T,) seconds, later than those of the segment before.
            keep: (T, W) windows that stay.
            features: (K, C) of these.
        """
        video = VideoTokens(times, keep.shape[1])
        complete = self._prompts.video_part(video, follows=bool(self.segments))
        kept = kept_positions(complete, keep, self._config.tokens.im_patch)
        places = kept if self._is_gapped else np.arange(len(kept))
        length = len(complete) if self._is_gapped else len(kept)
        self._keep_below_limit(length)
        ids = complete[kept]
        self._feed(ids, features, self._next + places)
        self.segments.append(Segment(times, keep, ids, self._next))
        self._next += length

    def take_back(self) -> None:
        """Undo the last `append`."""
        segment = self.segments.pop()
        self.cache.length -= len(segment.ids)
        self._next = segment.position

    def drop_before(self, time: float) -> None:
        """Let go of the segments that begin at or before a time."""
        count = tokens = 0
        for segment in self.segments:
            if segment.times[0] > time:
                break
            count, tokens = count + 1, tokens + len(segment.ids)
        if count == 0:
            return
        for _ in range(count):
            self.segments.popleft()
        self.cache.remove(1, tokens)
        self._place_bos()

    def ask(self, ids: NDArray[np.int64], **settings: Any) -> decoder.Continuation:
        """Answer a question, and leave the cache as it was.

        Args:
            ids: (L,) tokens of the question.
            settings: as for `decoder.generate`.
        """
        length = self.cache.length
        earlier = [np.array([self._prompts.bos_id]), *(part.ids for part in self.segments)]
        try:
            return decoder.generate(
                self._runner,
                self.cache,
                ids,
                np.full(len(ids), -1, np.int32),
                np.zeros((1, self._width), self._dtype),
                positions=self._next + np.arange(len(ids)),
                earlier=np.concatenate(earlier),
                **settings,
            )
        finally:
            self.cache.length = length

    @property
    def _width(self) -> int:
        return self._config.text.hidden_size

    def _feed(
        self, ids: NDArray[np.int64], features: NDArray[Any], positions: NDArray[np.int64]
    ) -> None:
        groups = visual_groups(ids, self._config.tokens.visual)
        if not len(features):
            features = np.zeros((1, self._width), self._dtype)
        decoder.step(self._runner, self.cache, ids, groups, features, positions)

    def _place_bos(self) -> None:
        first = self.segments[0].position if self.segments else self._next
        moved = [rotated(keys, first - 1, self._config.text.rope_theta) for keys in self._bos_keys]

        def place(layer: int, keys: NDArray[Any]) -> None:
            keys[:, :1] = moved[layer]

        self.cache.edit_keys(place)

    def _keep_below_limit(self, length: int) -> None:
        """Begin at 1 again when positions would reach the model's limit."""
        limit = self._config.text.max_position_embeddings
        if self._next + length + self.reserve <= limit:
            return
        first = self.segments[0].position if self.segments else self._next
        back, theta = 1 - first, self._config.text.rope_theta

        def turn(_: int, keys: NDArray[Any]) -> None:
            keys[:, 1:] = rotated(keys[:, 1:], back, theta)

        self.cache.edit_keys(turn)
        self.segments = deque(
            replace(segment, position=segment.position + back) for segment in self.segments
        )
        self._next += back
        self._place_bos()


def rotated(keys: NDArray[Any], by: int, theta: float) -> NDArray[Any]:
    """Move keys along by a number of positions.

    Args:
        keys: (heads, n, d) after rotary embedding, halves of a head side by side.
        by: positions, also negative.
        theta: base of the rotary embedding.
    """
    half = keys.shape[-1] // 2
    # The model's own frequencies are rounded to fp32 too.
    exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
    angle = by * (np.float32(theta) ** -exponent).astype(np.float64)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first, second = keys[..., :half].astype(np.float32), keys[..., half:].astype(np.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    moved: NDArray[Any] = np.concatenate(turned, axis=-1).astype(keys.dtype)
    return moved


def longest_sequence(prompts: PromptBuilder, frames: int, windows: int, kept: int) -> int:
    """Most tokens of BOS and segments.

    Args:
        prompts: makes token sequences.
        frames: of all segments.
        windows: W.
        kept: most windows that stay of a frame, on average over a segment.
    """
    late = 999_999.5  # printed with more digits than any time of a stream that runs for days
    frame = prompts.video_part(VideoTokens([late], windows), follows=True)
    return 1 + frames * (len(frame) - windows + kept)
