"""The examples of a run, each made from its position alone, in worker processes.

What stands at a position (see `mixture`) does not depend on the number of processes and workers,
nor on where a run was resumed.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, tee
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stts_export.errors import InputError, SttsError
from stts_export.training.decoding import BrokenClip, Decoder
from stts_export.training.examples import Example, VideoInput
from stts_export.training.mixture import Mixture, RatioLaw
from stts_export.training.records import Record

_log = logging.getLogger(__name__)

_RATIOS, _QUESTIONS = range(11, 13)
"""Beside the run's seed: streams of random numbers, apart from those of `mixture`."""
_SHOWN = 5


class Source(Protocol):
    """Where examples come from."""

    @property
    def length(self) -> int | None:
        """Number of different examples; None when there is no end."""

    def example(self, index: int, position: int) -> Example:
        """Make an example that depends on the arguments only.

        Args:
            index: which one: below `length`, or the running number within an endless source.
            position: where it stands in the run, for choices that differ from epoch to epoch.

        Raises:
            BrokenClip: its file cannot be decoded.
        """


class RecordSource:
    """A dataset.

    Args:
        records: at least one.
        decoder: makes the examples.
        seed: of the run.

    Raises:
        InputError: there are no records.
    """

    def __init__(self, records: Sequence[Record], decoder: Decoder, seed: int) -> None:
        if not records:
            raise InputError("there are no records", where="training data")
        # One block of bytes reaches a worker at once; a million records would take half a minute.
        pickled = [pickle.dumps(record) for record in records]
        self._block = b"".join(pickled)
        self._ends = np.cumsum([len(record) for record in pickled])
        self._decoder = decoder
        self._seed = seed

    @property
    def length(self) -> int:
        """Number of records."""
        return len(self._ends)

    def example(self, index: int, position: int) -> Example:
        """Decode a record; see `Decoder.example`."""
        start = self._ends[index - 1] if index else 0
        record = pickle.loads(self._block[start : self._ends[index]])
        return self._decoder.example(record, seed=(self._seed, _QUESTIONS, position))


class ExampleMaker:
    """Makes the example at any position of a run; sent to every worker.

    Args:
        sources: where examples come from.
        weights: share of each, relative to the others.
        ratios: prune ratios of examples with a video.
        seed: of the run, 0 or more.

    Raises:
        InputError: see `Mixture`.
    """

    def __init__(
        self, sources: Sequence[Source], weights: Sequence[float], ratios: RatioLaw, seed: int
    ) -> None:
        self._sources = tuple(sources)
        self._mixture = Mixture([source.length for source in sources], weights, seed)
        self._ratios = ratios
        self._seed = seed

    def __call__(self, position: int) -> Example:
        """Make the example at a position, 0 or more.

        Raises:
            BrokenClip: its file cannot be decoded.
        """
        source, index = self._mixture.at(position)
        example = self._sources[source].example(index, position)
        if example.clip is None:
            return example
        rng = np.random.default_rng((self._seed, _RATIOS, position))
        return replace(example, prune_ratio=self._ratios.draw(rng))


class BrokenLimit:
    """Counts what cannot be used; the same clip once, however often it comes.

    Args:
        limit: how many there may be.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reasons: dict[str, str] = {}
        """Why, by name."""

    @property
    def names(self) -> tuple[str, ...]:
        """Records whose files are broken, in the order in which they were met."""
        return tuple(self.reasons)

    @property
    def count(self) -> int:
        """Number of different ones."""
        return len(self.reasons)

    def add(self, broken: BrokenClip) -> None:
        """Count one; `check` refuses, at a moment that is the same for all processes."""
        if broken.name not in self.reasons:
            _log.info("skipped %s", broken)
        self.reasons.setdefault(broken.name, broken.reason)

    def check(self, total: int | None = None) -> None:
        """Refuse to go on with too many.

        Args:
            total: over all processes; `count` when None.

        Raises:
            InputError: there are more than the limit. Names the first ones of this process.
        """
        total = self.count if total is None else total
        if total <= self.limit:
            return
        lines = [f"{name}: {reason}" for name, reason in self.reasons.items()][:_SHOWN]
        many = "1 video or image" if total == 1 else f"{total} videos or images"
        raise InputError(
            "\n    ".join([f"{many} cannot be used{', such as' * bool(lines)}", *lines]),
            where="training data",
            allowed=f"{self.limit or 'none'}",
            fix="repair these files or take them out of the data, or raise the limit",
        )


Made = Example | BrokenClip


class Feed:
    """The examples of one process, step by step; worker processes make them ahead of time.

    An iterator over steps, and a context manager: `close` ends the workers.

    Args:
        make: returns the example at a position or raises `BrokenClip`; pickled for workers.
        positions: returns the positions of this process in a step, see `step_positions`.
        steps: the steps to come.
        workers: number of processes; 0 makes examples in this one. Workers import the main module
            of the program, which must do its work below `if __name__ == "__main__"`.
        prefetch: examples that a worker has ready or under way, 1 or more.

    Raises:
        InputError: a number is out of range.
    """

    def __init__(
        self,
        make: Callable[[int], Example],
        positions: Callable[[int], Sequence[int]],
        steps: Iterable[int],
        *,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise InputError(
                f"workers is {workers}, prefetch is {prefetch}",
                where="training data",
                allowed="0 or more workers, prefetch 1 or more",
            )
        self._steps, ahead = tee(steps)
        self._positions = positions
        self._workers = workers
        self._prefetch = prefetch
        self._make = _Maker(make)
        self._ahead = chain.from_iterable(map(positions, ahead))
        self._loader: Any = None
        self._made: Iterator[Outcome] | None = None

    def __iter__(self) -> Iterator[list[Made]]:
        return self

    def __next__(self) -> list[Made]:
        """Return what stands at the positions of the next step, in order.

        Raises:
            StopIteration: there are no more steps.
            SttsError: an example cannot be made, for another reason than a broken clip.
        """
        positions = self._positions(next(self._steps))
        outcomes = self._started()
        made: list[Made] = []
        for _ in positions:
            one = next(outcomes)
            if isinstance(one, SttsError):
                raise one
            made.append(one)
        return made

    def _started(self) -> Iterator[Outcome]:
        if self._made is None and self._workers:
            loader = DataLoader(
                self._make,
                batch_size=None,
                sampler=self._ahead,
                num_workers=self._workers,
                collate_fn=_packed,
                prefetch_factor=self._prefetch,
                multiprocessing_context="spawn",
                worker_init_fn=_in_own_group,
                generator=torch.Generator(),  # the global one belongs to the training
            )
            with _interrupts_put_off():
                self._loader = iter(loader)
            self._made = map(_unpacked, self._loader)
        elif self._made is None:
            self._made = map(self._make.__getitem__, self._ahead)
        return self._made

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; there are no more steps then."""
        self._steps = iter(())
        self._made = iter(())
        if self._loader is not None:
            # Otherwise they end when the garbage collector comes by.
            self._loader._shutdown_workers()
            self._loader = None


Outcome = Example | BrokenClip | SttsError


class _Maker(Dataset[Outcome]):
    """Returns what ought not to end a worker with a traceback."""

    def __init__(self, make: Callable[[int], Example]) -> None:
        self._make = make

    def __getitem__(self, position: int) -> Outcome:
        try:
            return self._make(position)
        except (BrokenClip, SttsError) as error:
            return error


@contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach; this one gets it when they have started."""
    resource_tracker.ensure_running()  # which would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    # Other threads of this process are not blocked, and hand a signal on to the main one.
    caught: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if caught:
            signal.raise_signal(signal.SIGINT)


def _in_own_group(worker: int) -> None:
    """Leave the process group: what ends it, such as torchrun's SIGTERM, is for the run alone.

    The run saves first, and needs its workers until then.
    """
    os.setpgid(0, 0)


Packed = tuple[Outcome, Tensor | None]


def _packed(made: Any) -> Packed:
    """Take the pixels out as a tensor, which travels in shared memory and not through a pipe."""
    if not isinstance(made, Example) or made.visual is None:
        return made, None
    name, pixels = _pixels(made)
    # Shared here: in the thread that sends it a worker that is told to end would abort.
    tensor = torch.from_numpy(np.require(pixels, requirements=["C", "W"])).share_memory_()
    return _with_pixels(made, name, pixels[:0]), tensor


def _unpacked(packed: Packed) -> Outcome:
    made, tensor = packed
    if tensor is None:
        return made
    assert isinstance(made, Example)
    return _with_pixels(made, _pixels(made)[0], tensor.numpy())


def _pixels(example: Example) -> tuple[str, NDArray[np.uint8]]:
    visual = example.visual
    assert visual is not None
    return ("frames", visual.frames) if isinstance(visual, VideoInput) else ("crops", visual.crops)


def _with_pixels(example: Example, name: str, pixels: NDArray[np.uint8]) -> Example:
    visual: Any = example.visual
    return replace(example, visual=replace(visual, **{name: pixels}))
