"""Decoding with a KV cache that is updated where it lies.

Axes: L prompt tokens, K feature rows, C width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stts_export.config import ModelConfig
from stts_export.errors import InputError
from stts_export.runtime.answer_text import AnswerText
from stts_export.runtime.logits import Sampling, TokenChooser, TokenLogprob, log_probabilities
from stts_export.tensors import KvCache, Precision, cache_dtype, past_names, present_names

OnToken = Callable[[int], None]


class NotFiniteError(InputError):
    """Logits have NaN or infinity."""


class Runner(Protocol):
    """What a back end opens: `engines.onnxruntime.Runner` or `engines.runner.Runner`.

    It has arrays in a memory of its own, where graphs leave what the next graph takes: NumPy
    arrays for ONNX Runtime, `engines.cuda.DeviceArray` for engines. Of both, slices of the first
    axis are views.
    """

    updates_in_place: bool
    """Whether a cache output lies where the input of it does; otherwise the two are apart."""
    cache_capacity: int | None
    """Tokens of a cache where the graph takes only one size; None where any size does."""

    def __call__(
        self, inputs: dict[str, Any], in_place: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Run the graph on named arrays of the host or of its own memory.

        Args:
            inputs: all inputs.
            in_place: outputs to write into arrays of its own memory.

        Returns:
            The other outputs on the host.
        """

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Array of zeros in its own memory."""

    def to_host(self, array: Any) -> NDArray[Any]:
        """Array of its own memory as a NumPy array."""

    def copy(self, target: Any, source: Any) -> None:
        """Copy an array of the host or of its own memory into one of its own memory."""


class ObservedRunner:
    """A runner with the memory of another; what it does beside running the graph is up to it.

    Args:
        runner: what runs the graph.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.updates_in_place = runner.updates_in_place
        self.cache_capacity = runner.cache_capacity

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """See `Runner`."""
        return self._runner.zeros(shape, dtype)

    def to_host(self, array: Any) -> NDArray[Any]:
        """See `Runner`."""
        return self._runner.to_host(array)

    def copy(self, target: Any, source: Any) -> None:
        """See `Runner`."""
        self._runner.copy(target, source)


@dataclass(frozen=True)
class Continuation:
    """New tokens and what they cost."""

    token_ids: list[int]
    """Without the one that ends an answer; with those that spell a stop string."""
    finish_reason: str
    """"stop" when the model or a stop string ended the answer, "length" when the limit did."""
    prefill_seconds: float
    decode_seconds: float
    logprobs: list[TokenLogprob] | None = None
    """One per token; None when not asked for."""


class KVCache:
    """Keys and values of one sequence in the runner's memory, allocated once.

    Per layer a key and a value, each (1, kv_heads, capacity, head_dim); rows at and after
    `length` are zero or stale and are masked by the graph. A graph that cannot write new rows in
    place gets a second buffer, and the two change roles after each call.

    Args:
        runner: the `decoder` graph.
        config: the model.
        precision: of the graph.
        capacity: most tokens; a graph that takes only one size gets that one.
        kv_cache: type of the graph's cache; int8 is scaled within the graph.
    """

    def __init__(
        self,
        runner: Runner,
        config: ModelConfig,
        precision: Precision,
        capacity: int,
        kv_cache: KvCache = "base",
    ) -> None:
        text, dtype = config.text, cache_dtype(precision, kv_cache)
        capacity = runner.cache_capacity or capacity
        shape = (1, text.num_kv_heads, capacity, text.head_dim)
        names = [
            pair
            for layer in range(text.num_layers)
            for pair in zip(past_names(layer), present_names(layer), strict=True)
        ]
        self.length = 0
        """Tokens that are in it; lowering it takes the last ones back."""
        self._runner = runner
        self._names = names
        self._has_two = not runner.updates_in_place
        self.past = {past: runner.zeros(shape, dtype) for past, _ in names}
        """What the graph reads, by input name."""
        self.present = {
            present: runner.zeros(shape, dtype) if self._has_two else self.past[past]
            for past, present in names
        }
        """Where the graph writes, by output name."""

    def advance(self, tokens: int) -> None:
        """Count tokens that a call has written, and make what it wrote the next one's input."""
        self.length += tokens
        if self._has_two:
            for past, present in self._names:
                self.past[past], self.present[present] = self.present[present], self.past[past]

    def remove(self, start: int, count: int) -> None:
        """Take tokens out of the middle; later ones move up and keep their rotary positions.

        Args:
            start: first one, by its place.
            count: how many.
        """
        kept, target = slice(start + count, self.length), slice(start, self.length - count)
        for past, _ in self._names:
            with self._on_host(past) as rows:
                rows[:, target] = rows[:, kept].copy()
        self.length -= count

    def edit_keys(self, change: Callable[[int, NDArray[Any]], None]) -> None:
        """Change keys where they lie.

        Args:
            change: gets the layer and its keys of all tokens, (kv_heads, length, head_dim).
        """
        for layer in range(len(self._names) // 2):
            with self._on_host(past_names(layer)[0]) as rows:
                change(layer, rows[:, : self.length])

    @contextmanager
    def _on_host(self, past: str) -> Iterator[NDArray[Any]]:
        """Yield rows (kv_heads, capacity, head_dim) on the host; what is changed is kept."""
        array = self.past[past]
        host = self._runner.to_host(array)
        yield host[0]
        if host is not array:
            self._runner.copy(array, host)


def generate(
    runner: Runner,
    cache: KVCache,
    ids: NDArray[np.int64],
    groups: NDArray[np.int32],
    features: NDArray[Any],
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    positions: NDArray[np.int64] | None = None,
    sampling: Sampling | None = None,
    logprobs: int = 0,
    text: AnswerText | None = None,
    on_token: OnToken | None = None,
    earlier: Sequence[int] | NDArray[np.integer[Any]] = (),
) -> Continuation:
    """Continue a sequence token by token until the answer ends.

    Args:
        runner: the `decoder` graph.
        cache: with room for `ids` and `max_new_tokens`; gets both.
        ids: (L,) compact prompt, or what comes after the tokens in `cache`.
        groups: (L,) clip of a visual token, -1 for text.
        features: (K, C), one row per `<im_patch>`; a zero row when there is none.
        max_new_tokens: upper limit, 1 or more.
        eos_ids: tokens that end the answer; the one that does is not part of the result.
        positions: (L,) rotary positions of `ids`, from the cache's length on when None; new tokens
            go on after the last of them.
        sampling: how tokens are chosen; the most likely ones when None.
        logprobs: how many of the most likely tokens to report beside each chosen one; 0: none.
        text: gets the tokens, and may end the answer.
        on_token: called with every new token as it is chosen.
        earlier: tokens that are in `cache`, which the repetition penalty counts too.
    """
    if positions is None:
        positions = cache.length + np.arange(len(ids))
    choose = TokenChooser(
        sampling or Sampling(), np.concatenate([np.asarray(earlier, np.int64), ids])
    )
    started = time.perf_counter()
    logits = step(runner, cache, ids, groups, features, positions)
    token = choose(logits)
    prefilled = time.perf_counter()
    no_group = np.array([-1], dtype=np.int32)
    no_features = np.zeros((1, features.shape[1]), features.dtype)
    new: list[int] = []
    reported: list[TokenLogprob] = []
    text_ends = False
    while token not in eos_ids:
        new.append(token)
        if logprobs:
            reported.append(log_probabilities(logits, token, logprobs))
        if on_token:
            on_token(token)
        text_ends = text is not None and text.ends(new)
        if text_ends or len(new) == max_new_tokens:
            break
        position = positions[-1:] + len(new)
        logits = step(runner, cache, np.array([token]), no_group, no_features, position)
        token = choose(logits)
    if text is not None and not text_ends:
        text_ends = text.finish(new)
    reason = "stop" if text_ends or token in eos_ids else "length"
    seconds = prefilled - started, time.perf_counter() - prefilled
    return Continuation(new, reason, *seconds, reported if logprobs else None)


def step(
    runner: Runner,
    cache: KVCache,
    ids: NDArray[np.int64],
    groups: NDArray[np.int32],
    features: NDArray[Any],
    positions: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Feed tokens and update the cache; arguments as in `generate`.

    Returns:
        (V,) logits after the last of them.

    Raises:
        NotFiniteError: logits have NaN or infinity, as after an overflow in fp16.
    """
    inputs = {
        "input_ids": ids[None],
        "features": np.ascontiguousarray(features),
        "visual_group": groups[None],
        "position_ids": positions.astype(np.int64)[None],
        "cache_position": np.array([cache.length], dtype=np.int64),
    }
    outputs = runner({**inputs, **cache.past}, cache.present)
    cache.advance(len(ids))
    logits: NDArray[np.float32] = outputs["logits"][0]
    if not np.isfinite(logits).all():
        raise NotFiniteError(
            "logits are not finite",
            where="decoder",
            fix="a value overflowed: build the bundle with --precision fp32",
        )
    return logits
