"""What three processes do together, for `test_parallel`: `python -m tests.training.processes`.

Two of them train, save and fail; then all three go on from what was saved.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from stts_export.errors import InputError
from stts_export.training.config import OptimSettings, Rates
from stts_export.training.parallel import (
    Kind,
    Parallel,
    checkpoint_activations,
    clip_,
    whole_tensor,
)
from stts_export.training.start import save_model, start_from, trainable_groups
from stts_export.training.state import load_state, save_state
from tests.training.small_runs import SmallTrainee, full_disk, small_run

CLIPS = 6
"""Of a step, over all processes."""
CONFIG = small_run(optim=OptimSettings(rates=Rates(1e-3, 1e-3, 0.0, 1e-3)))
KINDS: tuple[Kind, ...] = ("ddp", "fsdp")


@dataclass
class Small:
    """A small run on some processes."""

    parallel: Parallel
    kind: Kind
    checkpointed: bool = False

    def __post_init__(self) -> None:
        self.start = start_from(CONFIG)
        torch.manual_seed(0)
        scorer = self.start.model.vision.scorer
        assert scorer is not None
        # Where scores are all alike, their rounding is what the log-bias magnifies.
        nn.init.normal_(scorer.w3.weight, std=0.5)
        self.trainee = SmallTrainee(self.start.model)
        if self.checkpointed:
            checkpoint_activations(self.start.model)
        self.wrapped = self.parallel.wrap(self.trainee, self.kind)
        groups = trainable_groups(self.start.model, self.trainee.labels, CONFIG)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        self.norms: list[float] = []

    def steps(self, numbers: Sequence[int]) -> list[float]:
        """Losses of steps that are done, mean over clips."""
        return [self.step(number) for number in numbers]

    def step(self, number: int) -> float:
        loss = self.backward(number)
        self.norms.append(clip_(self.parameters, 1.0))
        self.optimizer.step()
        return loss

    def backward(self, number: int) -> float:
        self.optimizer.zero_grad()
        own = range(CLIPS * number, CLIPS * (number + 1))[self.parallel.rank :: self.parallel.world]
        total = 0.0
        for clip in own:
            with self.parallel.no_sync(clip != own[-1]):
                loss: Tensor = self.wrapped([clip]) / CLIPS
                (loss * self.parallel.world).backward()
            total += loss.item()
        return self.parallel.sum({"loss": total})["loss"]

    def gradients(self) -> dict[str, Tensor]:
        named = self.trainee.named_parameters()
        return {name: whole_tensor(p.grad).clone() for name, p in named if p.grad is not None}

    def look(self) -> None:
        """A pass without a backward one, which leaves shards gathered."""
        with torch.no_grad():
            self.wrapped([0])

    def save(self, run: Path, step: int) -> None:
        save_state(run, step, self.wrapped, self.optimizer, {"step": step}, self.parallel)

    def load(self, run: Path) -> dict[str, Any] | None:
        return load_state(run, self.wrapped, self.optimizer, self.parallel)


def main(folder: Path, rank: int, ports: Sequence[str]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if rank < 2:
        with Parallel("cpu", environment=_environment(rank, 2, ports[0])) as parallel:
            for kind in KINDS:
                found[kind] = _train(folder / kind, Small(parallel, kind, kind == "fsdp"))
    with Parallel("cpu", environment=_environment(rank, 3, ports[1])) as parallel:
        found["together"] = _together(parallel)
        small = Small(parallel, "fsdp")
        found["resumed"] = [small.load(folder / "fsdp"), small.steps([2, 3])]
    (folder / f"found{rank}.json").write_text(json.dumps(found))


def _train(run: Path, small: Small) -> dict[str, Any]:
    run.mkdir(exist_ok=True)
    small.backward(0)
    if small.parallel.is_main:
        gradients = small.gradients()
        torch.save(gradients, run / "gradients.pt")
    else:
        small.gradients()
    losses = small.steps([0, 1])
    small.look()
    small.save(run, 2)
    small.look()
    save_model(small.start.model, small.start, run / "step2", {}, small.parallel)
    losses += small.steps([2, 3])
    return {"losses": losses, "norms": small.norms, "errors": _failures(run, small)}


def _failures(run: Path, small: Small) -> list[str]:
    """One process cannot write; all hear of it."""
    errors = []
    full = OSError(errno.ENOSPC, "No space left on device") if small.parallel.rank == 1 else None
    try:
        with patch.object(os, "fsync", side_effect=full):
            small.save(run, 4)
    except InputError as error:
        errors.append(str(error))
    try:
        with full_disk(20_000 if small.parallel.is_main else None):
            save_model(small.start.model, small.start, run / "step4", {}, small.parallel)
    except InputError as error:
        errors.append(str(error))
    return errors


def _together(parallel: Parallel) -> dict[str, Any]:
    """What processes say to each other."""

    def fails() -> None:
        raise InputError("is wrong", where="somewhere", fix="nothing")

    errors = []
    for attempt in (
        lambda: parallel.on_main(fails),
        lambda: parallel.raise_together(InputError("late") if parallel.rank == 2 else None),
    ):
        try:
            attempt()
        except InputError as error:
            errors.append(str(error))
    parallel.raise_together(None)
    parallel.barrier()
    return {
        "place": [parallel.rank, parallel.world, parallel.is_main, str(parallel.device)],
        "sum": parallel.sum({"b": parallel.rank, "a": 2**50 + 0.5}),
        "told": parallel.broadcast_object({"rank": parallel.rank}),
        "main": parallel.on_main(lambda: os.getpid()),
        "errors": errors,
    }


def _environment(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun sets."""
    values = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update(values)
    return values


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
