"""Which example comes when, and how much is removed from it.

Positions count the examples of a run, over all processes, from 0. What stands at a position
depends on the sources and the seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError

CYCLE = 1000
"""Positions after which every source has had exactly its share."""
_CYCLES, _EPOCHS = range(1, 3)
"""Beside the seed: streams of random numbers that must not repeat each other."""


class Mixture:
    """The order of examples from several sources.

    Within `CYCLE` positions every source has its share by weight, to the nearest whole number, in
    random order. The examples of a source come in epochs: each exactly once, in a new order.

    Args:
        lengths: examples of each source; None for an endless one.
        weights: share of each source, relative to the others.
        seed: of the run, 0 or more.

    Raises:
        InputError: there are no sources or not one weight for each, a weight is not positive or
            too small, or a length is not positive.
    """

    def __init__(self, lengths: Sequence[int | None], weights: Sequence[float], seed: int) -> None:
        if not lengths or len(lengths) != len(weights):
            raise InputError(
                f"{len(lengths)} sources with {len(weights)} weights",
                where="mixture",
                allowed="one weight for each source, at least one",
            )
        for length in lengths:
            if length is not None and length < 1:
                raise InputError(
                    f"a source has {length} examples", where="mixture", allowed="1 or more"
                )
        self._lengths = tuple(lengths)
        self._shares = _shares(weights)
        self._seed = seed
        self._cycle: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    def at(self, position: int) -> tuple[int, int]:
        """Return the source at a position, 0 or more, and which of its examples."""
        cycle, slot = divmod(position, CYCLE)
        sources, earlier = self._order_of_sources(cycle)
        source = int(sources[slot])
        number = cycle * self._shares[source] + int(earlier[slot])
        length = self._lengths[source]
        if length is None:
            return source, number
        epoch, place = divmod(number, length)
        return source, int(self._order_of_examples(source, epoch, length)[place])

    def _order_of_sources(self, cycle: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each slot, and how many slots before it are of the same source."""
        if self._cycle is None or self._cycle[0] != cycle:
            slots = np.repeat(np.arange(len(self._shares)), self._shares)
            sources = np.random.default_rng((self._seed, _CYCLES, cycle)).permutation(slots)
            earlier = np.empty_like(sources)
            for source, share in enumerate(self._shares):
                earlier[sources == source] = np.arange(share)
            self._cycle = cycle, sources, earlier
        return self._cycle[1:]

    def _order_of_examples(self, source: int, epoch: int, length: int) -> NDArray[np.int64]:
        if self._epochs.get(source, (None,))[0] != epoch:
            rng = np.random.default_rng((self._seed, _EPOCHS, source, epoch))
            self._epochs[source] = epoch, rng.permutation(length)
        return self._epochs[source][1]


def _shares(weights: Sequence[float]) -> list[int]:
    """Divide a cycle by weight; the largest remainders are rounded up, the first of equal ones."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(
            f"the weights are {list(weights)}", where="mixture", allowed="positive numbers"
        )
    total = math.fsum(weights)
    exact = [weight / total * CYCLE for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(exact)), key=lambda source: shares[source] - exact[source])
    for source in order[: CYCLE - sum(shares)]:
        shares[source] += 1
    if 0 in shares:
        raise InputError(
            f"weight {weights[shares.index(0)]} of a sum of {total:g}",
            where="mixture",
            allowed=f"at least 1/{CYCLE} of the sum",
        )
    return shares


def step_positions(step: int, batch_size: int, rank: int = 0, world: int = 1) -> range:
    """Return the positions of one process in a step.

    Args:
        step: 0 or more.
        batch_size: examples of a step, over all processes.
        rank: number of this process.
        world: number of processes; together they have the same examples whatever it is.

    Raises:
        InputError: there are fewer examples than processes.
    """
    if batch_size < world:
        raise InputError(
            f"{batch_size} examples a step for {world} processes",
            where="training data",
            allowed="at least one for each process",
        )
    return range(step * batch_size + rank, (step + 1) * batch_size, world)


@dataclass(frozen=True)
class RatioLaw:
    """How prune ratios of training examples are drawn: triangular, the middle most likely.

    Raises:
        InputError: a share or ratio is out of range.
    """

    full_share: float
    """Fraction of examples from which nothing is removed, in [0, 1]."""
    min_ratio: float
    """In [0, max_ratio]."""
    max_ratio: float
    """Below 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.full_share <= 1:
            raise InputError(f"full_share is {self.full_share}", where="pruning", allowed="0 to 1")
        if not 0 <= self.min_ratio <= self.max_ratio < 1:
            raise InputError(
                f"min_ratio is {self.min_ratio}, max_ratio is {self.max_ratio}",
                where="pruning",
                allowed="0 <= min_ratio <= max_ratio < 1",
            )

    def draw(self, rng: np.random.Generator) -> float:
        """Return a ratio."""
        if rng.random() < self.full_share:
            return 0.0
        if self.min_ratio == self.max_ratio:
            return self.min_ratio
        middle = (self.min_ratio + self.max_ratio) / 2
        return float(rng.triangular(self.min_ratio, middle, self.max_ratio))
